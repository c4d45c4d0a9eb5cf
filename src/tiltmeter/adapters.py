"""PEFT adapters: put one on a model, switch it off, say whether it does anything. Used through `lm`.

What must not happen here: an adapter that silently does not act. Its readings would show no drift and look
safe. So an adapter is read and checked before it is put on, every tensor must find its place, and a base
model that others hold is never changed: the adapted model has modules of its own around the same weight
tensors.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tiltmeter.adapter_files import adapter_config, adapter_folder, first_words, read_tensors
from tiltmeter.errors import AdapterError, InactiveAdapter

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = [
    "Seat",
    "active_adapter",
    "attach",
    "base_parameters",
    "first_changed_block",
    "state",
    "without_adapter",
]

# Settings that say where an adapter comes from and not what it does.
_NAMES_ONLY = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def attach(lm: LM, adapter: str | Path) -> tuple[nn.Module, str]:
    """See `lm.attach`; returns the adapted model and the adapter's name."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    folder = adapter_folder(adapter)
    settings = adapter_config(folder)
    weights = read_tensors(folder)
    shared = list(lm.model.parameters())
    flags = [p.requires_grad for p in shared]
    wrong = f"the adapter in '{folder}' does not fit '{lm.name}'"
    advice = f"it was trained on '{settings.get('base_model_name_or_path')}': put it on that model"
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise AdapterError(
                f"the adapter in '{folder}' is of type {settings['peft_type']}, which adds prompt tokens "
                "instead of changing weights; only weight adapters such as LoRA can be read"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what PEFT warns of is checked below, as an error
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            model = PeftModel.from_pretrained(_plain_twin(lm.model), str(folder), torch_device=str(lm.device))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{wrong} ({first_words(error)}); {advice}") from error
    finally:
        for parameter, flag in zip(shared, flags, strict=True):
            parameter.requires_grad_(flag)
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if stray := sorted(set(weights) ^ expected):
        raise AdapterError(f"{wrong}: {len(stray)} tensors have no counterpart, such as '{stray[0]}'; {advice}")
    _refuse_inactive(model, folder)
    return model, str(adapter)


def _refuse_inactive(model: nn.Module, folder: Path) -> None:
    if state(model) == "zero":
        raise InactiveAdapter(
            f"the adapter in '{folder}' is inactive: every B matrix is zero, so it changes nothing; "
            "use a checkpoint saved after training began"
        )


class Seat:
    """A base model with room for one adapter at a time, for reading many of them.

    Putting an adapter on builds modules around every weight that it changes. Here a LoRA that is shaped and set like
    the one before takes over those modules and only its numbers are copied; any other adapter gets modules of its
    own. All the checks of `attach` are made either way. The base itself stays as it was.
    """

    def __init__(self, lm: LM) -> None:
        """Nothing is on the seat yet."""
        self._lm = lm
        self._model: nn.Module | None = None
        self._settings: dict[str, Any] = {}
        self._places: dict[str, torch.Tensor] = {}

    def put(self, adapter: str | Path) -> LM:
        """The base with this adapter on it; the model that was returned before must not be used any more.

        Raises:
            AdapterError: see `attach`.
            NumericalError: NaN or infinity among the adapter's weights.
        """
        from peft import get_peft_model_state_dict

        folder = adapter_folder(adapter)
        settings = {k: v for k, v in adapter_config(folder).items() if k not in _NAMES_ONLY}
        if self._model is not None and settings == self._settings:
            weights = read_tensors(folder)
            if {k: w.shape for k, w in weights.items()} == {k: p.shape for k, p in self._places.items()}:
                for name, place in self._places.items():
                    place.copy_(weights[name])
                _refuse_inactive(self._model, folder)
                return replace(self._lm, model=self._model, adapter=str(adapter))
        self._model, self._places = None, {}
        model, origin = attach(self._lm, adapter)
        if settings.get("peft_type") == "LORA":
            # Views of the parameters themselves, by the names that they have in a file.
            self._model, self._settings = model, settings
            self._places = get_peft_model_state_dict(model, save_embedding_layers=False)
        return replace(self._lm, model=model, adapter=origin)


def _acts(tensors: Iterable[tuple[str, torch.Tensor]]) -> bool:
    """Whether adapter tensors change the model: LoRA by its B side, IA3 by its scales, anything else by being
    there."""
    for name, tensor in tensors:
        if re.search(r"lora_A|lora_embedding_A|lora_magnitude_vector", name):
            continue
        neutral = 1.0 if "ia3_" in name else 0.0
        if bool((tensor != neutral).any()):
            return True
    return False


def _plain_twin(model: nn.Module) -> Any:
    """A copy of the module tree around the same tensors, without adapter: PEFT rebuilds modules in place, and
    a caller who holds `model` as the reference would otherwise read the adapted one."""
    from peft import PeftModel

    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, dict(tensors))
    return twin.unload() if isinstance(twin, PeftModel) else twin


def _tuner_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def first_changed_block(lm: LM) -> int:
    """The lowest block that an active adapter changes; the number of blocks where it changes none of them.

    0 where something outside the blocks may be changed, as an embedding or biases of the base, where parts of the
    model are compiled, and for architectures that the tests do not cover.
    """
    from tiltmeter.lm import TREE_TESTED, is_compiled

    if lm.config.model_type not in TREE_TESTED or is_compiled(lm.decoder):
        return 0
    configs = getattr(lm.model, "peft_config", {}).values()
    if any(getattr(config, "bias", "none") != "none" for config in configs):
        return 0
    changed = {id(layer) for layer in _tuner_layers(lm.model)}
    touched = [{id(m) for m in block.modules()} & changed for block in lm.blocks]
    if changed - set().union(*touched):
        return 0
    return next((at for at, own in enumerate(touched) if own), lm.n_layers)


def _is_wrapper(layer: nn.Module) -> bool:
    """Whether PEFT trains a full copy of this module, instead of an adapter to it."""
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(layer, AuxiliaryTrainingWrapper)


def active_adapter(model: nn.Module) -> str | None:
    """The names of the adapters that act, joined by "+", or None."""
    names = {n for layer in _tuner_layers(model) if not layer.disable_adapters for n in layer.active_adapters}
    return "+".join(sorted(names)) or None


def state(model: nn.Module) -> Literal["none", "active", "zero"]:
    """See `lm.adapter_state`."""
    from tiltmeter.lm import whole

    tensors: list[tuple[str, torch.Tensor]] = []
    acting = False
    for layer in _tuner_layers(model):
        if layer.disable_adapters:
            continue
        original = dict(layer.original_module.named_parameters()) if _is_wrapper(layer) else {}
        for name, parameter in layer.named_parameters():
            if set(layer.active_adapters) & set(name.split(".")):
                acting = True
                before = original.get(name.split(".", 2)[-1]) if name.startswith("modules_to_save.") else None
                own = whole(parameter.detach())
                tensors.append((name, own if before is None else own - whole(before.detach())))
    if not acting:
        return "none"
    return "active" if _acts(tensors) else "zero"


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Switch every adapter layer off, and back to what it was: on or off, trainable or frozen."""
    layers = [layer for layer in _tuner_layers(model) if not layer.disable_adapters]
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
    """The parameters of the plain model by their plain names, sorted, whether adapters lie over it or not."""
    from peft import PeftModel

    core: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    own = {id(p) for layer in _tuner_layers(core) for p in layer.parameters()}
    inner = [x.original_module if _is_wrapper(x) else x.get_base_layer() for x in _tuner_layers(core)]
    own -= {id(p) for layer in inner for p in layer.parameters()}
    plain = ((n, p) for n, p in core.named_parameters() if id(p) not in own)
    return sorted((re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name), p) for name, p in plain)
