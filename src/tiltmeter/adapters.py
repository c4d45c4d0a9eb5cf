"""PEFT adapters: put them on a model, switch them off, read many in a row. Used through `lm`.

What must not happen here: an adapter that silently does not act, or that changes the base for whoever reads it next.
The first would show no drift and look safe, so an adapter is read and checked before it is put on, every tensor must
find its place, and its effect is measured (`adapter_effect`). For the second, the adapted model has modules and
parameters of its own. They lie in the base's storage as long as nothing writes there; what PEFT may write (weights that
PiSSA takes apart, trained biases, rows of an embedding) is copied before, and given back where it came out the same.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from tiltmeter.adapter_base import compare_base
from tiltmeter.adapter_effect import acting_layers, configs_of, state, tuner_layers
from tiltmeter.adapter_files import adapter_config, adapter_folder, first_words, left_out, read_tensors
from tiltmeter.adapter_kinds import Conduct, conduct_of, refusal, rewrites_live, writes_base
from tiltmeter.errors import AdapterError, InactiveAdapter, TiltmeterError

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = [
    "Seat",
    "active_adapter",
    "attach",
    "base_parameters",
    "check_live",
    "conduct",
    "first_changed_block",
    "row_inputs",
    "without_adapter",
]

# Settings that say where an adapter comes from and not what it does.
_NAMES_ONLY = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
_HARMLESS = frozenset({"unsloth_fixed", "merge_weights", "enable_lora"})  # of other libraries, and of PEFT's first year
_PREFIX = "base_model.model."
# What the code of an adapter's kind raises on settings that it does not check itself.
_FOREIGN = (
    ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError, ArithmeticError,
    AssertionError, OSError,
)  # fmt: skip


class _Adapter(NamedTuple):
    """What lies in one folder.

    Attributes:
        name: as the user gave it.
        folder: where it is.
        settings: its config.
        tensors: by the names in its file.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def attach(lm: LM, adapters: Sequence[str | Path]) -> LM:
    """See `lm.attach`."""
    found = [_open(adapter, adapters) for adapter in adapters]
    if not found:
        raise AdapterError("no adapter was given; name at least one adapter folder")
    said = [(*compare_base(lm, one.settings, one.name), *left_out(one.name)) for one in found]
    caveats = dict.fromkeys(chain.from_iterable(said))
    origin = lm.origin if lm.origin is not None else _plain(lm.model)
    base = dict(base_parameters(origin))
    stored = _base_rows(found, base, lm.name)
    twin = _twin(origin, _written(found, base, stored))
    _grow_vocabulary(twin, stored)
    model = _load(twin, found, lm)
    _check_places(model, found, stored, lm.name)
    _give_back(model, base)
    name = " + ".join(one.name for one in found)
    tuned = replace(lm, model=model, adapter=name, origin=origin, caveats=tuple(caveats))
    _check_tokens(found, int(tuned.config.vocab_size), lm.name)
    try:
        _refuse_inactive(tuned)
    except TiltmeterError:
        raise
    except _FOREIGN as error:  # a pass through a kind's own code
        wrong, advice = _misfit(found[0], lm.name)
        raise AdapterError(f"{wrong}: a pass with it fails ({first_words(error)}); {advice}") from error
    return tuned


def _open(adapter: str | Path, together: Sequence[str | Path]) -> _Adapter:
    folder = adapter_folder(adapter, together=together)
    settings = adapter_config(folder)
    if why := refusal(settings):
        raise AdapterError(f"the adapter in '{folder}' is of type {settings['peft_type']} and cannot be read: {why}")
    if unknown := _unknown_settings(settings):
        raise AdapterError(
            f"the adapter in '{folder}' has settings that the installed PEFT does not know ({', '.join(unknown)}), "
            "which it would leave out without a word; install the PEFT that it was trained with, or take them out of "
            "adapter_config.json if they do nothing"
        )
    return _Adapter(str(adapter), folder, settings, read_tensors(folder))


def _unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    """Settings that are on and that PEFT's config of this kind does not have."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(settings["peft_type"])
    if config is None:
        return []  # PEFT itself says so, see `_load`
    known = {one.name for one in fields(config)} | _HARMLESS
    return sorted(f"'{key}'" for key, value in settings.items() if value and key not in known)


def _refuse_inactive(lm: LM) -> None:
    if state(lm) != "active":
        raise InactiveAdapter(
            f"the adapter in '{lm.adapter}' is inactive: the model computes the same with it as without (of a "
            "LoRA, every B matrix is zero); use a checkpoint saved after training began"
        )


# ---------------------------------------------------------------------- a model of its own around the base's tensors


def _plain(model: nn.Module) -> nn.Module:
    """The model without adapter; where it carries one, a copy of the modules around the same tensors."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    kept: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    plain: nn.Module = copy.deepcopy(model, kept).unload()
    return plain


def _twin(model: nn.Module, own: set[int]) -> Any:
    """A copy of the modules with parameters of its own, in the same storage but for those whose ids are in `own`.

    PEFT rebuilds modules in place and rebinds the data of parameters, and a caller who holds `model` as the reference
    would otherwise read the adapted one. Quantised weights are objects of their libraries, which replace them whole.
    """
    memo: dict[int, Any] = {id(buffer): buffer.clone() if own else buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        data = parameter.detach().clone() if id(parameter) in own else parameter.detach()
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(data, requires_grad=False) if plain else parameter
    return copy.deepcopy(model, memo)


def _written(found: Sequence[_Adapter], base: Mapping[str, torch.Tensor], stored: Mapping[str, Any]) -> set[int]:
    """The ids of the base's parameters that loading may write into."""
    if any(writes_base(one.settings) for one in found):
        return {id(parameter) for parameter in base.values()}
    return {id(base[name]) for name in stored}


def _give_back(model: nn.Module, base: Mapping[str, torch.Tensor]) -> None:
    """Let copies that came out as they were lie in the base's storage again."""
    for name, own in base_parameters(model):
        before = base.get(name)
        if before is None or own is before or own.data_ptr() == before.data_ptr():
            continue
        if own.shape == before.shape and own.dtype == before.dtype and torch.equal(own, before):
            own.data = before.detach()


# ---------------------------------------------------------------------- what a file says of the base


def _base_name(key: str) -> str:
    """The plain name of the parameter that a tensor in a file would be, if it were one of the base."""
    return re.sub(r"\.(base_layer|original_module)\.", ".", key.removeprefix(_PREFIX))


def _base_rows(found: Sequence[_Adapter], base: Mapping[str, torch.Tensor], name: str) -> dict[str, int]:
    """Rows of the base's embeddings that were saved beside an adapter: by plain name, how many there are.

    Raises:
        AdapterError: they are not those of this base.
    """
    rows: dict[str, int] = {}
    for one in found:
        copied = one.settings.get("modules_to_save") or ()
        for key, tensor in one.tensors.items():
            plain = _base_name(key)
            before = base.get(plain)
            if before is None or tensor.ndim != 2 or tensor.shape[1:] != before.shape[1:]:
                continue
            if len(tensor) < len(before):
                continue  # what does not fit is said where it is loaded
            rows[plain] = max(len(tensor), rows.get(plain, 0))
            if any(part in copied for part in plain.split(".")) and ".original_module." not in key:
                continue  # a full copy that was trained
            dtype = min(tensor.dtype, before.dtype, key=lambda kind: kind.itemsize)
            if not torch.equal(tensor[: len(before)].to(dtype), before.detach().cpu().to(dtype)):
                raise AdapterError(
                    f"the adapter in '{one.folder}' does not fit '{name}': it holds base weights ('{plain}') that are "
                    f"not this model's; it was trained on '{one.settings.get('base_model_name_or_path')}': put it on "
                    "that model"
                )
    return rows


def _grow_vocabulary(twin: Any, stored: Mapping[str, int]) -> None:
    """Make room for tokens that were added before training."""
    size = max(stored.values(), default=0)
    if size > twin.get_input_embeddings().weight.shape[0]:
        twin.resize_token_embeddings(size, mean_resizing=False)


def _load(twin: Any, found: Sequence[_Adapter], lm: LM) -> nn.Module:
    """All adapters on one model, active together.

    Raises:
        AdapterError: PEFT refuses one of them.
    """
    from peft import PeftModel

    names = ["default", *(f"adapter_{at}" for at in range(1, len(found)))]
    one = found[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what PEFT warns of is checked below, as an error
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            model: Any = PeftModel.from_pretrained(twin, str(one.folder), torch_device=str(lm.device))
            for name, one in zip(names[1:], found[1:], strict=True):
                model.load_adapter(str(one.folder), adapter_name=name, torch_device=str(lm.device))
            if len(found) > 1:
                model.base_model.set_adapter(names)
                model.requires_grad_(False)
    except _FOREIGN as error:
        wrong, advice = _misfit(one, lm.name)
        raise AdapterError(f"{wrong} ({first_words(error)}); {advice}") from error
    loaded: nn.Module = model
    return loaded


def _check_tokens(found: Sequence[_Adapter], size: int, name: str) -> None:
    """Tokens that switch an adapter on are of the model's vocabulary.

    Raises:
        AdapterError: one is not.
    """
    for one in found:
        if strange := [t for t in one.settings.get("alora_invocation_tokens") or () if not 0 <= t < size]:
            wrong, advice = _misfit(one, name)
            raise AdapterError(f"{wrong}: its invocation token {strange[0]} is none of {size}; {advice}")


def _misfit(one: _Adapter, name: str) -> tuple[str, str]:
    wrong = f"the adapter in '{one.folder}' does not fit '{name}'"
    return wrong, f"it was trained on '{one.settings.get('base_model_name_or_path')}': put it on that model"


def _check_places(model: nn.Module, found: Sequence[_Adapter], stored: Mapping[str, int], name: str) -> None:
    """Every tensor of a file has a place in the model, and every place got a tensor.

    Raises:
        AdapterError: not so.
    """
    for one, places in zip(found, _places(model), strict=True):
        rest = {key for key in one.tensors if _base_name(key) not in stored or key in places}
        # Of a full copy beside an enlarged vocabulary, PEFT writes the same numbers twice.
        twice = {key for key in rest if (short := key.replace(".modules_to_save.", ".")) != key and short in places}
        rest -= {
            key for key in twice if torch.equal(one.tensors[key], one.tensors[key.replace(".modules_to_save.", ".")])
        }
        if stray := sorted(rest ^ set(places)):
            wrong, advice = _misfit(one, name)
            raise AdapterError(f"{wrong}: {len(stray)} tensors have no counterpart, such as '{stray[0]}'; {advice}")


def _places(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Per adapter: views of its parameters, by the names that they have in a file."""
    from peft import get_peft_model_state_dict

    configs: Iterable[str] = model.peft_config  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a matrix with a bias looks to PEFT like one that was cut up
        return [get_peft_model_state_dict(model, adapter_name=n, save_embedding_layers=False) for n in configs]


# ---------------------------------------------------------------------- many adapters, one after the other


class Seat:
    """A base model with room for one adapter at a time, for reading many of them.

    Putting an adapter on builds modules around every weight that it changes. Here a LoRA that is shaped and set like
    the one before takes over those modules and only its numbers are copied; any other adapter gets modules of its
    own. All the checks of `attach` are made either way. The base itself stays as it was.
    """

    def __init__(self, lm: LM) -> None:
        """Nothing is on the seat yet."""
        self._lm = lm
        self._tuned: LM | None = None
        self._settings: dict[str, Any] = {}
        self._places: dict[str, torch.Tensor] = {}

    def put(self, adapter: str | Path) -> LM:
        """The base with this adapter on it; the model that was returned before must not be used any more.

        Raises:
            AdapterError: see `attach`.
            NumericalError: NaN or infinity among the adapter's weights.
        """
        folder = adapter_folder(adapter)
        config = adapter_config(folder)
        settings = {k: v for k, v in config.items() if k not in _NAMES_ONLY}
        if self._tuned is not None and settings == self._settings:
            weights = read_tensors(folder)
            if {k: w.shape for k, w in weights.items()} == {k: p.shape for k, p in self._places.items()}:
                for name, place in self._places.items():
                    place.copy_(weights[name])
                caveats = (*compare_base(self._lm, config, adapter), *left_out(adapter))
                tuned = replace(self._tuned, adapter=str(adapter), caveats=caveats)
                _refuse_inactive(tuned)
                return tuned
        self._tuned, self._places = None, {}
        tuned = attach(self._lm, [adapter])
        if settings.get("peft_type") == "LORA" and not writes_base(settings):
            (self._places,) = _places(tuned.model)
            self._tuned, self._settings = tuned, settings
        return tuned


# ---------------------------------------------------------------------- what is on a model


def check_live(model: nn.Module) -> None:
    """Make sure that the adapters on a live model can be read there.

    Raises:
        AdapterError: one of them cannot, or has changed the base's weights in memory.
    """
    for config in configs_of(model):
        kind = getattr(config["peft_type"], "value", config["peft_type"])
        if why := rewrites_live(config):
            raise AdapterError(
                f"the live model's adapter ({kind} with {why}) has changed the base's weights in memory, so nothing "
                "here can be told from its base; read the run's checkpoints from beside it instead (tiltmeter watch), "
                "where the adapter is put on the base anew"
            )
        if why := refusal(config):
            raise AdapterError(f"the live model's adapter is of type {kind} and cannot be read: {why}")


def conduct(model: nn.Module) -> Conduct:
    """Whether prompts may share rows under the adapters that act on a model; see `adapter_kinds`."""
    configs = configs_of(model)
    if not configs:
        return "token-local"
    if all(layer.disable_adapters for layer in tuner_layers(model)):
        return "token-local"
    found = {conduct_of(config) for config in configs}
    return "unknown" if "unknown" in found else "by row" if "by row" in found else "token-local"


def row_inputs(model: nn.Module, ids: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    """What a pass needs to know of the whole rows when it sees only their newest tokens; one entry per row.

    An activated LoRA acts from its invocation tokens on. PEFT's generation looks for them in the prompts, once.
    """
    if not any(config.get("alora_invocation_tokens") for config in configs_of(model)):
        return {}
    from peft.tuners.lora.variants import calculate_alora_offsets

    live: Any = model
    offsets = [
        calculate_alora_offsets(live.peft_config, live.active_adapter, torch.tensor([list(row)]))[0] for row in ids
    ]
    return {"alora_offsets": offsets}


def first_changed_block(lm: LM) -> int:
    """The lowest block that an active adapter changes; the number of blocks where it changes none of them.

    0 where something outside the blocks may be changed, as an embedding or biases of the base, where parts of the
    model are compiled, for adapters that act by row, and for architectures that the tests do not cover.
    """
    from tiltmeter.lm import TREE_TESTED, is_compiled

    if lm.config.model_type not in TREE_TESTED or is_compiled(lm.decoder) or conduct(lm.model) != "token-local":
        return 0
    if any(config.get("bias", "none") != "none" for config in configs_of(lm.model)):
        return 0
    changed = {id(layer) for layer in tuner_layers(lm.model)}
    touched = [{id(m) for m in block.modules()} & changed for block in lm.blocks]
    if changed - set().union(*touched):
        return 0
    return next((at for at, own in enumerate(touched) if own), lm.n_layers)


def active_adapter(model: nn.Module) -> str | None:
    """The names of the adapters that act, joined by "+", or None."""
    names = {name for _, active in acting_layers(model) for name in active}
    return "+".join(sorted(names)) or None


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Switch every adapter layer off, and back to what it was: on or off, trainable or frozen."""
    layers = [layer for layer in tuner_layers(model) if not layer.disable_adapters]
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def base_parameters(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters of the plain model by their plain names, sorted, whether adapters lie over it or not.

    Found by walking through what adapters were put around, since every kind has names of its own for that.
    """
    from peft import PeftModel

    core: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    seen: set[int] = set()
    found: list[tuple[str, torch.Tensor]] = []
    around = {id(layer) for layer in tuner_layers(core)}

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in around:
            walk(_inside(module), path)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:  # tied weights count once, where they stand first
                seen.add(id(parameter))
                found.append((f"{path}{name}", parameter))
        for name, child in module.named_children():
            walk(child, f"{path}{name}.")

    walk(core, "")
    return sorted(found, key=lambda pair: pair[0])


def _inside(layer: Any) -> nn.Module:
    """What an adapter was put around."""
    from peft.utils import AuxiliaryTrainingWrapper

    inner: nn.Module = layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer.base_layer
    return inner
