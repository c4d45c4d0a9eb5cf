"""A live model inside a trainer: on how many processes it is, and how it is left exactly as it was found.

Used by `watch`'s callback. It knows nothing of readings or records.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tiltmeter.errors import InputError

__all__ = ["agreed", "is_sharded", "untouched"]


def agreed(stop: bool, args: Any) -> bool:
    """Rank 0's decision, on every rank."""
    distributed = torch.distributed
    if args.world_size <= 1 or not (distributed.is_available() and distributed.is_initialized()):
        return stop
    device = "cpu" if distributed.get_backend() == "gloo" else args.device
    decision = torch.tensor([int(stop)], device=device)
    distributed.broadcast(decision, src=0)
    return bool(decision.item())


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the model is spread over processes in a way that they can read together.

    Raises:
        InputError: it is spread in another way.
    """
    names = {name for module in model.modules() for name in _class_names(module)}
    kind = None
    if "FullyShardedDataParallel" in names:
        kind = "FSDP 1"
    elif any(hasattr(p, "ds_id") for p in model.parameters()):
        kind = "DeepSpeed ZeRO-3"
    elif "FSDPModule" in names:
        if not any(_is_mixed(module) for module in model.modules()):
            return True
        kind = "FSDP in mixed precision"
    elif any("DTensor" in _class_names(p) or "DTensor" in _class_names(p.data) for p in model.parameters()):
        kind = "tensor parallelism"
    if kind is not None:
        raise InputError(
            f"the model is sharded over processes ({kind}), and cannot be read from inside the run; remove "
            "TiltmeterCallback, let the trainer save checkpoints, and run beside it: "
            "tiltmeter watch OUTPUT_DIR --follow"
        )
    return False


def _is_mixed(module: torch.nn.Module) -> bool:
    """Whether `fully_shard` computes this part in another dtype than its weights have."""
    if "FSDPModule" not in _class_names(module):
        return False
    policy = module._get_fsdp_state()._mp_policy  # type: ignore[operator]
    return policy.param_dtype is not None


def _class_names(thing: object) -> set[str]:
    return {kind.__name__ for kind in type(thing).__mro__}


@contextlib.contextmanager
def untouched(model: torch.nn.Module, tokenizer: Any) -> Iterator[None]:
    """Put back all that a measurement could change for the training around it."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    sides = {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side") if hasattr(tokenizer, name)}
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    # Only the model's own devices: asking the others would open a context on each.
    devices = {parameter.device for parameter, _ in trainable if parameter.device.type == "cuda"}
    with contextlib.ExitStack() as undo:  # each part is put back, whatever happens to the others
        if cache is not None:
            undo.callback(setattr, config, "use_cache", cache)
        for name, side in sides.items():
            undo.callback(setattr, tokenizer, name, side)
        undo.callback(_put_back, training, trainable)
        undo.callback(np.random.set_state, np.random.get_state())
        undo.callback(random.setstate, random.getstate())
        undo.enter_context(torch.random.fork_rng(devices=list(devices)))
        yield


def _put_back(
    training: Sequence[tuple[torch.nn.Module, bool]], trainable: Sequence[tuple[torch.nn.Parameter, bool]]
) -> None:
    for module, flag in training:
        module.training = flag
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)
