"""What lies in an adapter's folder: its config and its tensors, looked at before anything is built from them.

Used by `adapters`, which puts what is found here on a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiltmeter.errors import AdapterError, NumericalError
from tiltmeter.untrusted import check_safetensors, path_in, read_json

__all__ = ["adapter_base", "adapter_config", "adapter_folder", "first_words", "read_tensors"]

_DTYPES = ("F32", "BF16", "F16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")  # torch computes with no others
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(adapter: str | Path) -> Path:
    """The local folder of an adapter, fetched from the hub if it is no path.

    Raises:
        AdapterError: there is no such folder or repository, or it holds no adapter.
    """
    folder = Path(adapter).expanduser()
    if not folder.exists():
        from tiltmeter.lm import looks_like_hub_id

        if isinstance(adapter, Path) or not looks_like_hub_id(adapter) or "/" not in adapter:
            raise AdapterError(f"the adapter folder '{adapter}' does not exist; check the path")
        folder = _fetch(str(adapter))
    if not (folder / _CONFIG).is_file():
        raise AdapterError(
            f"'{adapter}' holds no {_CONFIG}; a folder that PEFT saved is needed, such as a trainer's checkpoint-N"
        )
    if not (folder / _WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code and is never read)"
        extra = pickled if (folder / "adapter_model.bin").exists() else ""
        raise AdapterError(f"'{adapter}' holds no {_WEIGHTS}{extra}; save the adapter as safetensors")
    return folder


def _fetch(adapter: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(adapter, allow_patterns=[_CONFIG, _WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(
            f"the adapter '{adapter}' is no folder here and could not be fetched from the hub ({error}); "
            "check the spelling and the connection"
        ) from error


def adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        AdapterError: it is no JSON object.
    """
    content = read_json(folder / _CONFIG, error=AdapterError, advice="save the adapter again")
    if not isinstance(content.get("peft_type"), str):
        raise AdapterError(f"{folder / _CONFIG} names no peft_type, so it is no PEFT config; save the adapter again")
    if content.get("megatron_config") is not None:  # it names a module, which PEFT would import
        raise AdapterError(f"{folder / _CONFIG} asks for Megatron's layers, which are not read; save it without them")
    tokens = content.get("alora_invocation_tokens") or []
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
        raise AdapterError(f"{folder / _CONFIG}: alora_invocation_tokens are no list of token ids; save it again")
    base = content.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        path_in(folder, base, error=AdapterError, advice="save the adapter with the name of its base")
    return content


def adapter_base(folder: Path) -> str:
    """The base model that an adapter names.

    Raises:
        AdapterError: it names none.
    """
    base = adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"the adapter in '{folder}' does not name its base model; load the base and pass adapter=")
    return str(base)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by the names that they have in its file.

    Raises:
        AdapterError: the file is damaged or holds none.
        NumericalError: NaN or infinity among them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _WEIGHTS
    check_safetensors(path, dtypes=_DTYPES, error=AdapterError, advice="save the adapter again in one of these")
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is truncated or no safetensors file ({error}); save the adapter again") from error
    if not weights:
        raise AdapterError(f"{path} holds no tensors; save the adapter again")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(
                f"the tensor '{name}' in {path} holds NaN or infinity; the run diverged, so use an earlier checkpoint"
            )
    return weights


def first_words(error: BaseException) -> str:
    """What a library's error says, for use inside a sentence: its first two lines, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".")[:300] or type(error).__name__
