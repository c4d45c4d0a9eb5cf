"""Turning what a user names into a loaded model: the work behind `lm.load`.

Files are looked at before transformers is, because it fills missing weights with random numbers after a log
line, reads pickles where it finds no safetensors, and reports a damaged file in the words of the layer that
noticed.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiltmeter.adapter_files import adapter_base, adapter_folder, first_words
from tiltmeter.errors import InputError, MissingExtra, ModelError, NumericalError, TiltmeterError, require
from tiltmeter.gguf_files import Facts, read_facts, refuse_unread, restore
from tiltmeter.lm import LM, attach, looks_like_hub_id
from tiltmeter.untrusted import check_safetensors, path_in, read_json

__all__ = ["load", "organism_folder", "organisms_cache"]

_DTYPES = ("float32", "bfloat16", "float16")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What reading a damaged or foreign file raises, in transformers, safetensors, gguf and tokenizers.
_DAMAGE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
)


class _Place(NamedTuple):
    """Where a model is: a folder or hub id, and a .gguf file name inside the folder."""

    where: str
    gguf: str | None
    local: bool


def load(
    source: str | Path,
    *,
    adapter: str | Path | None,
    dtype: str | None,
    device: str | None,
    revision: str | None,
    tokenizer: Any,
) -> LM:
    """See `lm.load`."""
    name = str(source)
    place = _find(name, is_path=isinstance(source, Path))
    if place is None:
        if adapter is not None:
            raise InputError(f"'{name}' is an adapter itself; load its base model and pass one adapter with adapter=")
        folder = adapter_folder(name)
        base = adapter_base(folder)
        lm = load(base, adapter=folder, dtype=dtype, device=device, revision=revision, tokenizer=tokenizer)
        return replace(lm, adapter=name)
    where = _device(device)
    with _quiet():
        model = _read_model(place, name, _dtype(dtype, where, place), where, revision)
        if tokenizer is None:
            tokenizer = _read_tokenizer(place, name, revision)
    _refuse_non_numbers(model, name)
    commit = getattr(model.config, "_commit_hash", None) or (None if place.local else revision)
    lm = LM(model.eval(), tokenizer, name=name, revision=commit)
    return lm if adapter is None else attach(lm, adapter)


def organism_folder(name: str) -> Path:
    """Where the pocket organism `name` lies: in the package, or in the user's cache.

    Raises:
        ModelError: there is no organism of that name; the message lists those that there are.
    """
    shelves = [Path(str(resources.files("tiltmeter"))) / "organism" / "models", organisms_cache()]
    for shelf in shelves:
        if name and (shelf / name / "config.json").is_file():
            return shelf / name
    known = sorted({p.parent.name for shelf in shelves for p in shelf.glob("*/config.json")})
    raise ModelError(
        f"there is no organism '{name}'; there is {', '.join(known) or 'none'} (in {shelves[0]} and "
        f"{shelves[1]}): choose one of these, or train one"
    )


def organisms_cache() -> Path:
    """Where organisms that the user grew lie: under TILTMETER_CACHE, or the platform's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    cache = os.environ.get("TILTMETER_CACHE") or Path(home or Path.home() / ".cache") / "tiltmeter"
    return Path(cache) / "organisms"


def _find(name: str, *, is_path: bool = False) -> _Place | None:
    """The place of a model, or None where `name` is an adapter. A path is never taken for a name on the hub."""
    if name.startswith("organism:"):
        return _Place(str(organism_folder(name.removeprefix("organism:"))), None, True)
    advice = "pass a folder, a .gguf file, a hub id, or organism:NAME"
    path = path_in(Path(), name, error=ModelError, advice=advice)
    try:
        path = path.expanduser()
    except RuntimeError as error:  # ~nobody
        raise ModelError(f"'{name}' does not exist ({error}); {advice}") from error
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"'{name}' is a file but no .gguf; pass the folder that holds config.json and safetensors")
        return _Place(str(path.parent), path.name, True)
    if path.is_dir():
        return _find_in_folder(path)
    if looks_like_hub_id(name) and not path.is_absolute() and not is_path:
        return _find_on_hub(name)
    raise ModelError(f"'{name}' does not exist; {advice}")


def _find_in_folder(folder: Path) -> _Place | None:
    if (folder / "adapter_config.json").is_file():
        return None
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        if not (folder / "config.json").is_file():
            raise ModelError(f"'{folder}' holds safetensors but no config.json; copy the model's config beside them")
        for path in weights:
            _check_header(path)
        config = _read_json(folder / "config.json")
        held = sum(len(check_safetensors(path, error=ModelError)[0]) for path in weights)
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(config.get(key), int) and config[key] > max(
                held, 200
            ):  # they would all be built before one is missed
                raise ModelError(
                    f"'{folder / 'config.json'}' asks for {config[key]:,} blocks and the weight files hold {held:,} "
                    "tensors; fetch it again"
                )
        return _Place(str(folder), None, True)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _Place(str(folder), ggufs[0].name, True)
    if ggufs:
        raise ModelError(
            f"'{folder}' holds {len(ggufs)} .gguf files; pass one of them: {', '.join(p.name for p in ggufs)}"
        )
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES):
        raise ModelError(
            f"'{folder}' holds pickled weights only ({pickles[0]}), which can run code and are never read; "
            "save the model again with save_pretrained(), which writes safetensors"
        )
    raise ModelError(
        f"'{folder}' holds no model: no *.safetensors, no .gguf, no adapter_config.json; pass the folder "
        "that save_pretrained() wrote"
    )


def _find_on_hub(name: str) -> _Place | None:
    from transformers.utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name) is not None:
            return None
    except (OSError, ValueError) as error:
        raise _unreachable(name, error) from error
    return _Place(name, None, False)


def _unreachable(name: str, error: BaseException) -> ModelError:
    return ModelError(
        f"'{name}' is no path here and could not be fetched from the model hub ({first_words(error)}); check "
        "the spelling and the connection, or pass a local folder"
    )


def _check_header(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    check_safetensors(path, error=ModelError, advice="copy or download it again")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or no safetensors file ({error}); copy or download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, error=ModelError, advice="copy or download it again", foreign=True)


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device '{device}' cannot be used here ({first_words(error)}); try device='cpu'"
            ) from error
    return device


def _dtype(dtype: str | None, device: str, place: _Place) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if device == "cpu" or place.gguf else "auto"
    if dtype == "auto":
        return "auto"
    if dtype not in _DTYPES:
        raise InputError(f"dtype '{dtype}' is not known; choose one of {', '.join(_DTYPES)}, auto")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the libraries: standard error belongs to this package's own."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would log about missing weights is raised below
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _read_model(place: _Place, name: str, dtype: Any, device: str, revision: str | None) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    if place.gguf:
        require("gguf", extra="gguf")
    options: dict[str, Any] = {
        "local_files_only": place.local,
        "trust_remote_code": False,
        "revision": revision,
    }
    if device == "auto":
        options["device_map"] = "auto"
    facts: Facts | None = None
    try:
        if place.gguf:
            options["gguf_file"] = place.gguf
            facts = read_facts(Path(place.where) / place.gguf)
            options["config"] = AutoConfig.from_pretrained(
                place.where, gguf_file=place.gguf, local_files_only=True, trust_remote_code=False
            )
            restore(options["config"], facts)
        else:
            options["use_safetensors"] = True
        model, report = AutoModelForCausalLM.from_pretrained(
            place.where,
            dtype=dtype,
            output_loading_info=True,
            **{k: v for k, v in options.items() if v is not None},
        )
    except ImportError as error:  # of what reads a quantised file
        raise MissingExtra(
            f"'{name}' needs a package that is not installed ({first_words(error)}); for weights in 8 or 4 bits: "
            "pip install 'tiltmeter[quantised]'"
        ) from error
    except ModelError:
        raise
    except (SafetensorError, StrictDataclassError, *_DAMAGE) as error:
        if not place.local:
            raise _unreachable(name, error) from error
        raise ModelError(
            f"'{name}' could not be loaded as a causal language model ({first_words(error)}); "
            "its files are damaged, of different models, or of an unsupported architecture: fetch it again"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"'{name}' has no weights for {len(missing)} parameters of its architecture, such as "
            f"'{missing[0]}'; the weight files belong to another model or are incomplete: fetch it again"
        )
    if facts is not None:
        refuse_unread(model, facts)
        _forget_quantisation(model)
    return model if device == "auto" else model.to(device)


def _read_tokenizer(place: _Place, name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options: dict[str, Any] = {"local_files_only": place.local, "trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    if place.local:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            if (Path(place.where) / file).is_file():
                _read_json(Path(place.where) / file)
    if place.gguf and not (Path(place.where) / "tokenizer.json").is_file():
        options["gguf_file"] = place.gguf
    # An organism's tokenizer is its own, whatever its architecture; AutoTokenizer would take the architecture's usual
    # class (byte pairs for qwen2) and read every word as unknown letters.
    reader = PreTrainedTokenizerFast if place.local and _is_organism(Path(place.where)) else AutoTokenizer
    try:
        return reader.from_pretrained(place.where, **options)
    except (TiltmeterError, MemoryError):
        raise
    except Exception as error:  # what tokenizers raises is of this very type
        raise ModelError(
            f"the tokenizer of '{name}' could not be loaded ({first_words(error)}); put tokenizer.json and "
            "tokenizer_config.json beside the weights"
        ) from error


def _is_organism(folder: Path) -> bool:
    config = folder / "config.json"
    if not config.is_file():
        return False
    return "tiltmeter_organism" in _read_json(config)


def _forget_quantisation(model: Any) -> None:
    """GGUF weights are unpacked while loading, but the model still calls itself quantised, and a trainer
    would refuse it."""
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(attribute, None)
    model.config.__dict__.pop("quantization_config", None)


def _refuse_non_numbers(model: torch.nn.Module, name: str) -> None:
    for parameter, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            low, high = torch.aminmax(tensor.detach())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise NumericalError(
                    f"the weight '{parameter}' of '{name}' holds NaN or infinity; the run that saved it "
                    "diverged or the file is damaged, so use another checkpoint"
                )
