"""Steering: change what leaves one decoder block while a model reads or writes.

With unit directions V (k, hidden), the stored mean activation norm n of that layer and a strength s:

    add      h' = h + s n * sum of the rows of V            (persona vectors; contrastive activation addition)
    clamp    h' = h + V^+ (s n - V h)                       so that V h' = s n on every direction
    ablate   h' = h - V^+ V h                               so that V h' = 0: clamp to nothing

where V^+ is the pseudo-inverse, so directions need not be orthogonal. A vector may carry a map of low rank beside
("add" only): h' = h + s (n sum of V + (h G') O), which pushes differently where the activation differs. A position
counts from the first real token of its own prompt: what a block sees of a step is a chunk (one token under a
key-value cache) and, with left padding, an offset one, so positions are worked out from the attention mask where the
whole decoder is called. This module knows nothing of where a direction comes from.

    vector = SteeringVector(layer=14, vectors=basis.directions[:1], strength=0.8, norm=basis.reference_norm)
    with apply(lm, vector, positions="prompt"):
        answers = lm.generate(conversations)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tiltmeter import sound
from tiltmeter.artifacts import made, read_artifact, write_artifact
from tiltmeter.errors import ArtifactError, InputError, LayerError, NumericalError
from tiltmeter.lm import LM
from tiltmeter.untrusted import check_safetensors

__all__ = ["Mode", "Positions", "SteeringVector", "apply", "apply_rows", "edit", "listen", "load", "save"]

FloatArray = npt.NDArray[np.float32]
Mode = Literal["add", "ablate", "clamp"]
Positions = Literal["all", "prompt"] | int
Change = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

_KIND, _FORMAT = "steering_vector", 1
_LOW_RANK = ("gates", "outputs")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions at one layer and how far to go along them.

    Attributes:
        layer: the block whose output is changed, counted from 0.
        vectors: (k, hidden) directions; rows are scaled to unit length when this is made.
        strength: in units of `norm`; negative goes the other way.
        norm: the mean activation norm at that layer, so that one strength means the same across layers and
            models.
        meta: JSON-able notes: where the directions come from, the model's fingerprint.
        low_rank: None, or G and O, both (r, hidden): what is added beside, per unit of strength, is (h G') O.

    Raises:
        InputError: not (k, hidden), a zero row, or a norm that is not positive.
        NumericalError: NaN or infinity.
    """

    layer: int
    vectors: FloatArray
    strength: float
    norm: float
    meta: Mapping[str, Any] = field(default_factory=dict)
    low_rank: tuple[FloatArray, FloatArray] | None = None

    def __post_init__(self) -> None:
        vectors = np.atleast_2d(np.asarray(self.vectors, dtype=np.float64))
        if vectors.ndim != 2 or not vectors.size:
            raise InputError(f"steering directions must be (k, hidden), got shape {vectors.shape}; pass one row each")
        if not np.isfinite([self.strength, self.norm]).all() or not np.isfinite(vectors).all():
            raise NumericalError("a steering vector holds NaN or infinity; make it again from finite activations")
        lengths = np.linalg.norm(vectors, axis=1)
        if not lengths.all() or self.norm <= 0:
            raise InputError(
                "a steering vector needs directions of some length and a positive norm, got lengths "
                f"{lengths.tolist()} and norm {self.norm}; give the mean activation norm of its layer"
            )
        object.__setattr__(self, "vectors", (vectors / lengths[:, None]).astype(np.float32))
        if self.low_rank is not None:
            gates, outputs = (np.asarray(part, dtype=np.float32) for part in self.low_rank)
            if gates.ndim != 2 or gates.shape != outputs.shape or gates.shape[1] != vectors.shape[1]:
                raise InputError(
                    f"the map of low rank has gates {gates.shape} and outputs {outputs.shape}; both must be "
                    f"(r, {vectors.shape[1]})"
                )
            if not (np.isfinite(gates).all() and np.isfinite(outputs).all()):
                raise NumericalError("the map of low rank holds NaN or infinity; train it again with a smaller step")
            object.__setattr__(self, "low_rank", (gates, outputs))

    @property
    def added(self) -> FloatArray:
        """(hidden,) what "add" adds to every activation alike, in activation units; the low-rank part is beside it."""
        return np.asarray(self.strength * self.norm * self.vectors.sum(axis=0), dtype=np.float32)


@contextlib.contextmanager
def apply(
    lm: LM,
    vector: SteeringVector,
    *,
    mode: Mode = "add",
    strength: float | None = None,
    positions: Positions = "all",
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Steer every pass through the model while the context lasts; no hook is left behind, whatever happens
    inside. Of nested contexts on one block, the inner acts first.

    Args:
        lm: the model.
        vector: what to steer along, and where.
        mode: "add", "ablate" or "clamp" (see the module); "ablate" ignores the strength.
        strength: instead of the vector's own.
        positions: "all"; "prompt", tokens of the prompt only; or k, tokens from position k of each prompt on.
        prompt_lengths: tokens per prompt, in the order of the batch or of the conversations given to
            `LM.generate`; for "prompt". Without it, a pass that finds the cache empty is the prompt: true of
            generation with a cache and of reading, not of generation with the cache off.

    Raises:
        LayerError: the vector's layer is outside the model.
        InputError: another width, mode or position than there is, or prompt lengths of another batch.
    """
    if mode not in get_args(Mode):
        raise InputError(f"steering mode '{mode}' is not known; choose one of {', '.join(get_args(Mode))}")
    if positions not in ("all", "prompt") and (isinstance(positions, bool) or not isinstance(positions, int)):
        raise InputError(f"positions must be 'all', 'prompt' or a token number, got {positions!r}")
    if isinstance(positions, int) and positions < 0:
        raise InputError(f"a position counts from the first token of the prompt, so it is 0 or more; got {positions}")
    _check(lm, vector.layer, vector.vectors.shape[1])
    amount = vector.strength if strength is None else strength
    if not np.isfinite(amount):
        raise NumericalError(f"the steering strength must be a finite number, got {amount}")
    change = _operator(vector, mode, amount)
    if positions == "all":
        with _hooked(lm, vector.layer, change, None):
            yield
        return
    where = _Where(positions, None if prompt_lengths is None else torch.as_tensor(list(prompt_lengths)))
    with _hooked(lm, vector.layer, change, where):
        yield


@contextlib.contextmanager
def apply_rows(lm: LM, layer: int, vectors: npt.NDArray[np.floating[Any]]) -> Iterator[None]:
    """Add one vector per conversation, at every position: many steerings in one batch.

    Args:
        lm: the model.
        layer: the block whose output is changed.
        vectors: (rows, hidden) in activation units, added as they are; row i belongs to conversation i given
            to `LM.generate` (however it batches them), or to row i of the batch in any other pass.

    Raises:
        LayerError: the layer is outside the model.
        InputError: another width, or another number of rows than the pass has.
        NumericalError: NaN or infinity.
    """
    if vectors.ndim != 2:
        raise InputError(f"row vectors must be (rows, hidden), got shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise NumericalError("the row vectors hold NaN or infinity; make them again from finite activations")
    _check(lm, layer, vectors.shape[1])
    table = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    where = _Where("all", None, n_rows=len(vectors))

    def change(hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        chosen = table if rows is None else table[rows]
        return hidden + chosen.to(hidden.device)[:, None]

    with _hooked(lm, layer, change, where):
        yield


@contextlib.contextmanager
def edit(lm: LM, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put any differentiable change on a block's output while the context lasts; vectors are trained through it.

    Args:
        lm: the model.
        layer: the block.
        change: from activations (batch, chunk, hidden), in float32, to what replaces them.

    Raises:
        LayerError: the layer is outside the model.
    """
    _check(lm, layer, lm.hidden_size)
    with _hooked(lm, layer, lambda hidden, rows: change(hidden), None):
        yield


@contextlib.contextmanager
def listen(
    lm: LM,
    begin: Callable[[Mapping[str, Any]], None],
    hear: Mapping[int, Callable[[torch.Tensor], None]],
) -> Iterator[None]:
    """Hear what leaves blocks, after whatever steering acts there, while the model is used by others.

    Args:
        lm: the model.
        begin: called before each pass through the decoder, with its keyword arguments.
        hear: by layer, called with (batch, chunk, hidden) as the block leaves it; layer -1 is what enters block 0.

    Raises:
        LayerError: a layer is outside the model.
    """
    for layer in hear:
        _check(lm, max(layer, 0), lm.hidden_size)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin(kwargs)

    def hook(heard: Callable[[torch.Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: heard(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack:
        stack.callback(lm.decoder.register_forward_pre_hook(note, with_kwargs=True).remove)
        for layer, heard in hear.items():
            if layer < 0:
                first: Any = lm.blocks[0]
                entering = lambda module, args, kwargs: hear[-1](args[0] if args else kwargs["hidden_states"])  # noqa: E731
                stack.callback(first.register_forward_pre_hook(entering, with_kwargs=True).remove)
            else:
                stack.callback(lm.blocks[layer].register_forward_hook(hook(heard)).remove)
        yield


def _check(lm: LM, layer: int, width: int) -> None:
    if not 0 <= layer < lm.n_layers:
        raise LayerError(
            f"layer {layer} is outside the model: '{lm.name}' has blocks 0 to {lm.n_layers - 1}; choose one of them"
        )
    if width != lm.hidden_size:
        raise InputError(
            f"a steering vector of width {width} does not fit '{lm.name}', whose width is {lm.hidden_size}; "
            "use a vector made from this model"
        )


def _operator(vector: SteeringVector, mode: Mode, strength: float) -> Change:
    directions = torch.from_numpy(vector.vectors)  # (k, hidden)
    target = strength * vector.norm
    if mode == "add":
        added = target * directions.sum(0)
        if vector.low_rank is None:
            return lambda hidden, rows: hidden + added.to(hidden.device)
        gates, outputs = (torch.from_numpy(part) for part in vector.low_rank)
        matrix = strength * (gates.T @ outputs)  # (hidden, hidden)
        return lambda hidden, rows: hidden + added.to(hidden.device) + hidden @ matrix.to(hidden.device)
    inverse = torch.from_numpy(np.linalg.pinv(vector.vectors.astype(np.float64)).astype(np.float32))  # (hidden, k)
    goal = 0.0 if mode == "ablate" else target

    def set_coordinates(hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        here = hidden @ directions.to(hidden.device).T  # (batch, chunk, k)
        return hidden + (goal - here) @ inverse.to(hidden.device).T

    return set_coordinates


class _Where:
    """Which tokens of the pass in progress to steer, noted when the decoder is called and used inside its
    block."""

    def __init__(self, positions: Positions, lengths: torch.Tensor | None, *, n_rows: int | None = None) -> None:
        self.wanted = positions
        self.lengths = lengths
        self.n_rows = n_rows if lengths is None else len(lengths)
        self.chosen: torch.Tensor | None = None  # (batch, chunk) bool
        self.rows: torch.Tensor | None = None  # (batch,) conversation numbers, where the cache knows them

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out the absolute positions of this chunk."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise InputError("the model was called without input_ids or inputs_embeds; steering needs one of them")
        batch, chunk = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self.rows = getattr(cache, "rows", None)
        self._check_rows(batch, getattr(cache, "total", batch))
        positions = _positions(kwargs, past, batch, chunk, tokens.device)
        if self.wanted == "all":
            self.chosen = None
        elif self.wanted != "prompt":
            self.chosen = positions >= int(self.wanted)
        elif self.lengths is None:
            self.chosen = torch.full_like(positions, past == 0, dtype=torch.bool)
        else:
            lengths = self.lengths if self.rows is None else self.lengths[self.rows]
            self.chosen = positions < lengths.to(positions.device)[:, None]

    def _check_rows(self, batch: int, total: int) -> None:
        if self.n_rows is not None and self.n_rows != total:
            raise InputError(
                f"steering was given {self.n_rows} rows and the pass has {total} (batch of {batch}); "
                "give one row per conversation"
            )


def _positions(kwargs: Mapping[str, Any], past: int, batch: int, chunk: int, device: torch.device) -> torch.Tensor:
    """(batch, chunk) each token's place in its own prompt. The mask is asked first: models with rotary
    positions are right under left padding without position ids, which then count the padding too."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] == past + chunk:
        return (mask.long().cumsum(-1) - 1)[:, -chunk:]
    if isinstance(ids, torch.Tensor) and ids.ndim == 2:
        return ids.expand(batch, chunk)
    return torch.arange(past, past + chunk, device=device).expand(batch, chunk)


@contextlib.contextmanager
def _hooked(lm: LM, layer: int, change: Change, where: _Where | None) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        old = hidden.float()
        new = change(old, None if where is None else where.rows)
        if where is not None and where.chosen is not None:
            new = torch.where(where.chosen.to(hidden.device)[..., None], new, old)
        new = new.to(hidden.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    block, decoder = lm.blocks[layer], lm.decoder
    with contextlib.ExitStack() as stack:
        if where is not None:
            stack.callback(decoder.register_forward_pre_hook(where.note, with_kwargs=True).remove)
        # Before every other hook, so that whoever listens to the block hears what it now says.
        stack.callback(block.register_forward_hook(hook, prepend=True).remove)
        yield


# ---------------------------------------------------------------------- files


def save(vector: SteeringVector, path: str | Path) -> Path:
    """Write a steering vector as safetensors with one JSON header; the file appears whole or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    header = {
        "after_block": vector.layer,
        "strength": vector.strength,
        "norm": vector.norm,
        "meta": dict(vector.meta),
    }
    arrays = {"vectors": vector.vectors}
    if vector.low_rank is not None:
        arrays |= dict(zip(_LOW_RANK, vector.low_rank, strict=True))
    return write_artifact(path, _KIND, _FORMAT, header, arrays)


def load(path: str | Path) -> SteeringVector:
    """Read what `save` wrote.

    Raises:
        ArtifactError: missing, truncated, foreign, or of another format version.
    """
    remedy = "make the vector again, or read it with the matching import function of steer_formats"
    header, arrays = read_artifact(path, _KIND, _FORMAT, remedy=remedy)

    def make() -> SteeringVector:
        sound.whole("after_block", header["after_block"])
        for name in ("strength", "norm"):
            sound.number(name, header[name])
        return SteeringVector(
            header["after_block"],
            arrays["vectors"],
            float(header["strength"]),
            float(header["norm"]),
            header["meta"],
            (arrays[_LOW_RANK[0]], arrays[_LOW_RANK[1]]) if _LOW_RANK[0] in arrays else None,
        )

    return made(path, "steering vector", remedy, make)


def read_safetensors(path: str | Path) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """All tensors of a file as float32, and its metadata.

    Raises:
        ArtifactError: missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(Path(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118 - no mapping
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{path}' is truncated or no safetensors file ({error}); make it again") from error
