"""What lies in an adapter's folder: its config and its tensors, looked at before anything is built from them.

Used by `adapters`, which puts what is found here on a model.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch

from tiltmeter.errors import AdapterError, AmbiguousAdapter, NumericalError
from tiltmeter.untrusted import check_safetensors, path_in, read_json

__all__ = [
    "adapter_base",
    "adapter_config",
    "adapter_folder",
    "first_words",
    "holds_adapter",
    "left_out",
    "read_tensors",
]

_DTYPES = ("F32", "BF16", "F16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")  # torch computes with no others
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What TRL calls the frozen copy that preference training compares with, now and before.
_REFERENCES = ("ref", "reference")
# What stands beside an adapter that was saved on its own, and never beside one that PEFT saved as part of a model.
_OWN_SAVE = ("README.md", "training_args.bin", "trainer_state.json", "tokenizer_config.json", "config.json")


def adapter_folder(adapter: str | Path, *, together: Sequence[str | Path] = ()) -> Path:
    """The local folder of an adapter, fetched from the hub if it is no path.

    Args:
        adapter: the folder, or a hub id.
        together: all that are put on together, so that one in a subfolder of another is not taken for left out.

    Raises:
        AdapterError: there is no such folder or repository, or it holds no adapter.
    """
    try:
        folder = Path(adapter).expanduser()
        there = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, nobody's home
        raise AdapterError(f"no folder can be called '{str(adapter)[:80]}' ({first_words(error)})") from error
    if not there:
        from tiltmeter.lm import looks_like_hub_id

        if isinstance(adapter, Path) or not looks_like_hub_id(adapter) or "/" not in adapter:
            raise AdapterError(f"the adapter folder '{adapter}' does not exist; check the path")
        folder = _fetch(str(adapter))
    folder = _the_adapter(folder, {Path(one).expanduser().resolve() for one in together})
    if not (folder / _CONFIG).is_file():
        raise AdapterError(
            f"'{adapter}' holds no {_CONFIG}; a folder that PEFT saved is needed, such as a trainer's checkpoint-N"
        )
    if not (folder / _WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code and is never read)"
        extra = pickled if (folder / "adapter_model.bin").exists() else ""
        raise AdapterError(f"'{adapter}' holds no {_WEIGHTS}{extra}; save the adapter as safetensors")
    return folder


def holds_adapter(folder: Path) -> bool:
    """Whether a checkpoint holds an adapter, at its root or in a subfolder."""
    return (folder / _CONFIG).is_file() or bool(_parts(folder))


def _parts(folder: Path) -> list[str]:
    """The subfolders that PEFT saved further adapters of the same model in, by the adapters' names."""
    found = sorted(path.parent for path in folder.glob(f"*/{_CONFIG}") if path.is_file())
    return [sub.name for sub in found if not any((sub / name).exists() for name in _OWN_SAVE)]


def _full_weights(folder: Path) -> str | None:
    names = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
    return next((path.name for name in names for path in sorted(folder.glob(name))), None)


def left_out(adapter: str | Path) -> tuple[str, ...]:
    """What a checkpoint's adapters leave out of a reading on purpose: sentences without full stops."""
    frozen = [name for name in _parts(Path(adapter).expanduser()) if name in _REFERENCES]
    return tuple(f"the adapter in the subfolder '{name}' was not read: it is a frozen reference" for name in frozen)


def _the_adapter(folder: Path, together: Set[Path]) -> Path:
    """The folder of the one adapter that a checkpoint holds; a reference adapter does not count, and is named.

    Raises:
        AmbiguousAdapter: it holds several, or full weights beside one: which of them acted is not written anywhere.
    """
    parts = _parts(folder)
    others = [name for name in parts if name not in _REFERENCES and (folder / name).resolve() not in together]
    at_root = (folder / _CONFIG).is_file()
    if (at_root or others) and (full := _full_weights(folder)) is not None:
        raise AmbiguousAdapter(
            f"'{folder}' holds an adapter and full weights ({full}), and which of them is meant is not written there; "
            "keep each in a folder of its own"
        )
    if others and (at_root or len(others) > 1):
        names = ", ".join(f"'{name}'" for name in others[:5])
        read = "the adapter at its root" if at_root else "none"
        raise AmbiguousAdapter(
            f"'{folder}' holds several adapters: {read}, and in subfolders {names}; which acted together is not "
            "written there: name them all together, read the run from inside with TiltmeterCallback, or move away what "
            "did not act"
        )
    return folder / others[0] if others else folder


def _fetch(adapter: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                adapter, allow_patterns=[_CONFIG, _WEIGHTS, *(f"*/{name}" for name in (_CONFIG, *_OWN_SAVE[:1]))]
            )
        )
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
