"""Whether the base model that an adapter names is the one that it is put on.

An adapter fits every model of the same shapes, and on another one its numbers mean nothing. What its config names is
compared as far as it can be: the same place, the same name on the hub, the same weights where the named folder is here.
A contradiction is refused. What cannot be compared is a caveat, and stands in the verdict's reason.

    compare_base(lm, {"base_model_name_or_path": "unsloth/Qwen3-8B-bnb-4bit"})   # () on Qwen/Qwen3-8B
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tiltmeter.errors import AdapterError

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = ["caveats_of", "compare_base"]

# Endings that say how the same weights are stored, and owners who publish copies of others' models, often renamed.
_STORAGE = re.compile(r"[-_.](unsloth|bnb|4bit|8bit|nf4|gguf|awq|gptq|int4|int8|fp8|fp16|bf16|dynamic|q\d\w*)$", re.I)
_COPIERS = ("unsloth", "bartowski", "thebloke", "mlx-community", "lmstudio-community", "ggml-org", "quantfactory")
_SAMPLED = 24


def compare_base(lm: LM, settings: Mapping[str, Any], adapter: str | Path) -> tuple[str, ...]:
    """What is uncertain about an adapter's base; empty where nothing is.

    Args:
        lm: the model that the adapter is put on.
        settings: of adapter_config.json.
        adapter: what it is called, for the message.

    Returns:
        Caveats, each a sentence without its full stop.

    Raises:
        AdapterError: the adapter names a base that is another model than this one.
    """
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not named:
        return (f"the adapter names no base model, so nothing says that it was trained on '{lm.name}'",)
    named = str(named)
    here = {lm.name, str(getattr(lm.config, "_name_or_path", "") or "")} - {""}
    found = _same(named, here, lm)
    if found == "other":
        raise AdapterError(
            f"the adapter '{adapter}' was trained on '{named}', which is another model than '{lm.name}': put it on "
            "that model (or, if they are the same, correct base_model_name_or_path in its adapter_config.json)"
        )
    if found == "unknown":
        return (f"the adapter says that it was trained on '{named}', which could not be compared with '{lm.name}'",)
    if revision and lm.revision and revision != lm.revision:
        if _is_commit(revision) and _is_commit(lm.revision):
            raise AdapterError(
                f"the adapter '{adapter}' was trained on revision {revision} of '{named}', and revision {lm.revision} "
                "is loaded: load the base with that revision"
            )
        return (
            f"the adapter says that it was trained on revision {revision} of its base, and {lm.revision} is loaded",
        )
    return ()


def caveats_of(lm: LM, source: str | Path) -> tuple[str, ...]:
    """What is uncertain about the base of an adapter in a folder; empty where there is none, or it cannot be read."""
    from tiltmeter.adapter_files import adapter_config, left_out

    folder = _existing(str(source))
    if folder is None or not (folder / "adapter_config.json").is_file():
        return ()
    try:
        return (*compare_base(lm, adapter_config(folder), source), *left_out(folder))
    except AdapterError:  # whoever reads it says so
        return ()


def _same(named: str, here: set[str], lm: LM) -> Literal["same", "other", "unknown"]:
    places = {_place(text) for text in here}
    if named in here or _place(named) in places:
        return "same"
    folder = _existing(named)
    if folder is not None and folder.is_dir():
        found = _same_weights(folder, lm)
        if found != "unknown":
            return found
    if lm.organism is not None and "/" in named:
        # An organism on another machine is known by its folder; nothing on the hub is one.
        if _hub_name(named) is not None and folder is None:
            return "other"
        return "same" if _plain(named) == _plain(lm.organism) else "unknown"
    if _plain(named) in {_plain(text) for text in here}:
        one = _hub_name(named)
        owners = {(_hub_name(text) or "/").split("/")[0].lower() for text in here} - {""}
        if one is None or not owners or one.split("/")[0].lower() in owners | set(_COPIERS) or owners & set(_COPIERS):
            return "same"
        return "unknown"  # of one name, by different owners
    one, others = _hub_name(named), [name for name in map(_hub_name, here) if name is not None]
    if one is None or not others:
        return "unknown"
    copied = any(name.split("/")[0].lower() in _COPIERS for name in (one, *others))
    return "unknown" if copied else "other"


def _place(text: str) -> str:
    """A folder as its real path, a folder of the hub's cache as the hub's name for it, anything else as it is."""
    if text.startswith("organism:"):
        from tiltmeter.loading import organism_folder

        return str(organism_folder(text.removeprefix("organism:")).resolve())
    if (cached := _hub_name(text)) is not None and "models--" in text:
        return cached.lower()
    here = _existing(text)
    return str(here) if here is not None else text.rstrip("/").lower()


def _existing(text: str) -> Path | None:
    """The real path of what is there under a name; None where nothing is, and where no file could be called so."""
    try:
        path = Path(text).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, nobody's home, a link to itself
        return None


def _hub_name(text: str) -> str | None:
    """OWNER/NAME, where a text is one or is a folder of the hub's cache."""
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+?)(/|$)", text):
        return f"{cached[1]}/{cached[2]}"
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None and _existing(text) is None
    return text if is_name else None


def _plain(text: str) -> str:
    """The last part of a name, without what says how the weights are stored."""
    name = (_hub_name(text) or text.replace("\\", "/")).rstrip("/").rsplit("/", 1)[-1].removeprefix("organism:").lower()
    while (shorter := _STORAGE.sub("", name)) != name:
        name = shorter
    return name


def _is_commit(revision: object) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", str(revision)) is not None


def _same_weights(folder: Path, lm: LM) -> Literal["same", "other", "unknown"]:
    """Compares rows of a folder's weights with the model's, where both are plain floats: norms, and first rows."""
    from safetensors import SafetensorError, safe_open

    from tiltmeter.adapters import base_parameters

    quantised = getattr(getattr(lm.model, "config", None), "quantization_config", None) is not None
    if lm.name.endswith(".gguf") or quantised or any(p.device.type == "meta" for p in lm.model.parameters()):
        return "unknown"
    own = {n: p for n, p in base_parameters(lm.origin if lm.origin is not None else lm.model) if p.is_floating_point()}
    compared = 0
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name in own]  # noqa: SIM118 - not a mapping
                for name in names[:: max(1, len(names) // _SAMPLED)]:
                    part = file.get_slice(name)
                    if list(part.get_shape()) != list(own[name].shape):
                        return "other"
                    there, mine = part[0:1], own[name].detach()[0:1].cpu()
                    if not there.is_floating_point():
                        continue
                    if there.ndim == 1:
                        there, mine = file.get_tensor(name), own[name].detach().cpu()
                    kind = min(there.dtype, mine.dtype, key=lambda d: torch.finfo(d).bits)
                    if not torch.equal(there.to(kind), mine.to(kind)):
                        return "other"
                    compared += 1
    except (SafetensorError, OSError, RuntimeError, IndexError):
        return "unknown"
    return "same" if compared else "unknown"
