"""Read activations: what leaves chosen decoder blocks, at the last prompt token or averaged over the prompt.

One pass reads every wanted layer. Prompts that share a prefix share its computation (see `plan`), the pass
ends at the last wanted block, no logits are made, and only the wanted rows leave the model, in float32. Under an
adapter that acts by what else stands in the row, each prompt of a plan has a row of its own instead. Of a model in
half precision the residual stream is kept in float32 meanwhile: rounding it after every block costs more of a
direction than half-precision products do. This module knows neither traits nor drift; architectures are `lm`'s affair.

    activations = capture(lm, lm.encode_prompts(prompts), layers=[10, 14])
    activations.at(14)                                       # (prompts, hidden)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tiltmeter import attention
from tiltmeter.adapters import conduct
from tiltmeter.attention import Enough, TreeAttention
from tiltmeter.errors import AdapterError, InputError, LayerError, NumericalError
from tiltmeter.lm import LM, TREE_TESTED, context_length, length_limit, stream_parts, tree_obstacle, undisturbed
from tiltmeter.plan import BatchPlan, Method, RowCost, TreeRow, lay_tree, padded_rows, tree_rows

__all__ = [
    "Activations",
    "BatchPlan",
    "Below",
    "Pooling",
    "Projections",
    "capture",
    "plan_batches",
    "project",
    "read_below",
]

FloatArray = npt.NDArray[np.float32]
Pooling = Literal["last_token", "mean"]
Progress = Callable[[int, int, str], None]

_TREE_TOKENS = 4096
_TENSOR_BYTES = 2**24  # on a CPU, of the widest tensor of a block; see `_row_tokens`
_WIDE_BYTES = 4  # of a number of the residual stream or of attention scores, which are float32 in any model
_HALF_MULTIPLE = 16  # tokens of a row: bfloat16 products of 1,762 rows took a tenth longer on a CPU than of 1,768
_ARENA_BYTES = 31 * 2**20
_MASKED_TOKENS = 2048  # bounds the mask and the attention scores, which grow with the square
_PADDED_TOKENS = 4096
# Under a mask, attention between strangers in a tree row is computed and thrown away: its time per operation
# against that of a matrix product (0.8 measured on a CPU with a 135M model; more where attention is eager), and
# what launching one block costs, in operations.
_ATTENTION_PENALTY = 1.5
_BLOCK_OVERHEAD = 2.5e7
_PROBES = 4
_LEAST_NOISE, _NOISE_FACTOR = 1e-6, 8.0  # relative, for adapters of unknown kinds
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative, for the probe; half precision: 5e-2


@dataclass(frozen=True)
class Activations:
    """Pooled block outputs.

    Attributes:
        layers: which blocks.
        values: (layers, prompts, hidden) float32, in the order of `layers` and of the prompts.
        pooling: "last_token" or "mean" (over the prompt's tokens).
        plan: how the prompts were batched.
    """

    layers: tuple[int, ...]
    values: FloatArray
    pooling: Pooling
    plan: BatchPlan

    def at(self, layer: int) -> FloatArray:
        """The (prompts, hidden) activations after block `layer`.

        Raises:
            LayerError: that layer was not read.
        """
        if layer not in self.layers:
            raise LayerError(f"layer {layer} was not captured; there is {list(self.layers)}: capture it as well")
        values: FloatArray = self.values[self.layers.index(layer)]
        return values


class Projections(NamedTuple):
    """What leaves the device: `values` (prompts, directions), `norms` (prompts,) and the mean pooled
    activation `mean` (hidden,), all float32."""

    values: FloatArray
    norms: FloatArray
    mean: FloatArray


@dataclass(frozen=True, eq=False)
class Below:
    """What enters one block, for models that share everything below it and need not compute that again.

    Attributes:
        layer: the block, counted from 0.
        plan: of the prompts.
        inputs: per row of the plan, (prompts or 1, T, hidden).
    """

    layer: int
    plan: BatchPlan
    inputs: tuple[torch.Tensor, ...]


def plan_batches(
    lm: LM,
    token_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int | None = None,
    method: Method | None = None,
    verify: bool | None = None,
) -> BatchPlan:
    """Lay prompts into forward passes; deterministic given the token ids and the model's shape, dtype and device.

    Args:
        lm: the model.
        token_ids: the prompts.
        max_tokens: the most tokens per row of several prompts; default 4,096; as a tree 2,048 under a
            mask, else as many as keep the widest tensor of a block small on a CPU.
        method: "tree", "padded" or "single"; default: "tree" where the model allows it. A method that is
            asked for and cannot be right is replaced, with the reason in the plan.
        verify: compare the tree with the plain pass on a few prompts first, and fall back where they differ.
            Default: only for architectures that the tests do not cover.

    Raises:
        InputError: no prompts, an empty prompt, or one beyond the model's context.
    """
    _check_prompts(lm, token_ids)
    if method is not None and method not in get_args(Method):
        raise InputError(f"method '{method}' is not known; choose one of {', '.join(get_args(Method))}")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    longest = max(map(len, token_ids))
    if method == "single" or longest > length_limit(lm):
        reason = "asked for" if method == "single" else "rotary frequencies depend on the longest prompt of a batch"
        return BatchPlan("single", longest, tuple((i,) for i in range(len(token_ids))), reason)
    obstacle = tree_obstacle(lm, longest)
    if method != "padded" and not obstacle:
        unit = lm.unit
        masked = bool(attention.obstacle(lm))
        pairs = unit.per_pair * _ATTENTION_PENALTY if masked else 0.0
        cost = RowCost(unit.per_token, pairs, unit.per_layer * _BLOCK_OVERHEAD)
        limit = max_tokens or (_MASKED_TOKENS if masked else _row_tokens(lm))
        plan = BatchPlan(
            "tree", limit, tree_rows(token_ids, cost=cost, max_tokens=limit), "shared prefixes are read once"
        )
        tested = lm.config.model_type in TREE_TESTED
        if not (verify or (verify is None and not tested)):
            return plan
        error = _probe(lm, token_ids)
        if error <= _TOLERANCE.get(lm.dtype, 5e-2):
            return plan
        obstacle = f"on {lm.config.model_type} the prefix tree differs from the plain pass by {error:.2g} (relative)"
    limit = max_tokens or _PADDED_TOKENS
    return BatchPlan("padded", limit, padded_rows(token_ids, max_tokens=limit), obstacle or "asked for")


def capture(
    lm: LM,
    token_ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    pooling: Pooling = "last_token",
    plan: BatchPlan | None = None,
    progress: Progress | None = None,
) -> Activations:
    """Read the outputs of blocks `layers`, pooled per prompt; the model is left exactly as it was.

    Args:
        lm: the model.
        token_ids: the prompts, as `LM.encode_prompts` gives them.
        layers: block numbers from 0, in the order wanted.
        pooling: "last_token", or "mean" over all tokens of the prompt.
        plan: a plan made for these prompts; default `plan_batches(lm, token_ids)`.
        progress: called with (prompts done, prompts in all, what is done).

    Raises:
        InputError: no prompts or layers, or a plan of other prompts.
        LayerError: a layer outside the model.
        NumericalError: NaN or infinity in what was read.
    """
    wanted = _check_layers(lm, layers)
    plan = _check_plan(lm, token_ids, plan, pooling)
    values = np.empty((len(wanted), len(token_ids), lm.hidden_size), dtype=np.float32)
    done = 0
    for row, pooled in _read(lm, token_ids, wanted, pooling, plan):
        for at, layer in enumerate(wanted):
            values[at, row] = pooled[layer].cpu().numpy()
        done += len(row)
        if progress is not None:
            progress(done, len(token_ids), "reading activations")
    _refuse_non_numbers(values, lm)
    return Activations(wanted, values, pooling, plan)


def project(
    lm: LM,
    token_ids: Sequence[Sequence[int]],
    layer: int,
    directions: npt.NDArray[np.floating[Any]],
    *,
    pooling: Pooling = "last_token",
    plan: BatchPlan | None = None,
    below: Below | None = None,
) -> Projections:
    """Project pooled activations after block `layer` onto directions, on the device and in float32.

    Args:
        lm: the model.
        token_ids: the prompts.
        layer: the block.
        directions: (directions, hidden); used as they are, so give unit vectors for projections in activation
            units.
        pooling: as in `capture`.
        plan: as in `capture`.
        below: what `read_below` gave for these prompts, this plan and a model that is the same up to there.

    Returns:
        The projections, the activation norms and the mean activation: all that leaves the device.

    Raises:
        InputError: directions of another width, or `below` of another plan or of blocks above `layer`; otherwise as
            `capture`.
    """
    if directions.ndim != 2 or directions.shape[1] != lm.hidden_size:
        raise InputError(
            f"directions of shape {directions.shape} do not fit a model of width {lm.hidden_size}; "
            "they must be (directions, hidden) and come from this model"
        )
    wanted = _check_layers(lm, [layer])
    plan = _check_plan(lm, token_ids, plan, pooling)
    if below is not None and (below.layer > layer or below.plan.rows != plan.rows or below.plan.method != plan.method):
        raise InputError(
            f"what was kept below block {below.layer} does not serve a reading after block {layer} with this batch "
            "plan; make it for this plan and a block no higher"
        )
    matrix = torch.from_numpy(np.ascontiguousarray(directions, dtype=np.float32)).to(lm.device)
    values = np.empty((len(token_ids), len(directions)), dtype=np.float32)
    norms = np.empty(len(token_ids), dtype=np.float32)
    total = np.zeros(lm.hidden_size, dtype=np.float64)
    for row, pooled in _read(lm, token_ids, wanted, pooling, plan, below):
        hidden = pooled[wanted[0]]
        total += hidden.sum(dim=0).double().cpu().numpy()
        values[list(row)] = (hidden @ matrix.to(hidden.device).T).cpu().numpy()
        norms[list(row)] = torch.linalg.vector_norm(hidden, dim=-1).cpu().numpy()
    _refuse_non_numbers(values, lm)
    _refuse_non_numbers(norms, lm)
    return Projections(values, norms, (total / len(token_ids)).astype(np.float32))


def read_below(lm: LM, token_ids: Sequence[Sequence[int]], layer: int, *, plan: BatchPlan) -> Below:
    """What enters block `layer`, for `project` with models that differ from this one only in that block and above.

    Kept on the device: as many numbers as the prompts' unique tokens times the width.

    Raises:
        InputError: a plan of other prompts.
        LayerError: a layer outside the model, or block 0, below which there is nothing to keep.
    """
    (first,) = _check_layers(lm, [layer])
    if first == 0:
        raise LayerError("nothing lies below block 0; read the model as it is")
    plan = _check_plan(lm, token_ids, plan, "last_token")
    inputs = []
    for _, whole in _read(lm, token_ids, (first - 1,), None, plan):
        inputs.append(whole[first - 1])
    return Below(first, plan, tuple(inputs))


# ---------------------------------------------------------------------- forward passes


class _Row(NamedTuple):
    """What one row feeds the model, and how its prompts are taken from it.

    Attributes:
        arguments: of the forward pass.
        pool: (1 or n, T, hidden) to (n, hidden) float32, one line per prompt.
        tree: the row as a tree, where its attention is computed stretch by stretch (no mask among the arguments).
        ends: the places of the prompts' last tokens, where only these are wanted.
    """

    arguments: dict[str, torch.Tensor]
    pool: Callable[[torch.Tensor], torch.Tensor]
    tree: TreeRow | None = None
    ends: tuple[int, ...] | None = None


def _read(
    lm: LM,
    token_ids: Sequence[Sequence[int]],
    layers: tuple[int, ...],
    pooling: Pooling | None,
    plan: BatchPlan,
    below: Below | None = None,
) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
    """Yield per row the prompt indices and, by layer, the pooled (prompts, hidden) activations in float32.

    Without pooling everything that leaves a block, as it leaves it. With `below`, only the blocks above are run. Under
    an adapter that acts by row, the prompts of a row are read one by one.

    Raises:
        InputError: such an adapter, and no pooling, or blocks that are not to be run.
        AdapterError: an adapter of an unknown kind that does not read the same twice.
    """
    apart = plan.method != "single" and _acts_by_row(lm, token_ids, plan.method)
    if apart and (pooling is None or below is not None):
        raise InputError(
            f"the adapter '{lm.adapter}' acts by what stands where in a row, so nothing can be kept of rows that "
            "several prompts share; read the model as it is"
        )
    yield from _read_rows(lm, token_ids, layers, pooling, plan, below, apart=apart)


def _read_rows(
    lm: LM,
    token_ids: Sequence[Sequence[int]],
    layers: tuple[int, ...],
    pooling: Pooling | None,
    plan: BatchPlan,
    below: Below | None = None,
    *,
    apart: bool = False,
) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
    """The passes of `_read`, with the prompts together or each apart."""
    _keep_pages(lm)
    whole = plan.method != "tree" or lm.sharded or bool(attention.obstacle(lm))
    skipped = 0 if below is None else below.layer
    for number, row in enumerate(plan.rows):
        pooled = None
        with undisturbed(lm), _wide_stream(lm), _answering(lm.blocks[:skipped], below, number):
            if apart:
                each = [_forward(lm, _padded_row(lm, token_ids, [i], pooling), layers) for i in row]
                pooled = {layer: torch.cat([one[layer] for one in each]) for layer in layers}
            elif not whole:
                pooled = _forward_in_stretches(lm, _stretch_row(lm, token_ids, row, pooling), layers, skipped)
                whole = pooled is None  # the blocks did not take the attention that they were given
            if pooled is None:
                lay = _masked_row if plan.method == "tree" else _padded_row
                pooled = _forward(lm, lay(lm, token_ids, row, pooling), layers)
        yield list(row), pooled


def _acts_by_row(lm: LM, token_ids: Sequence[Sequence[int]], method: Method) -> bool:
    """Whether prompts must not share rows, because an adapter acts by what stands where in them.

    Of a kind that is not known, shared rows are compared with rows of one prompt; how far they may lie apart comes
    from the base, where they differ by rounding alone.

    Raises:
        AdapterError: two readings of the same prompts differ.
    """
    found = conduct(lm.model)
    if found != "unknown":
        return found == "by row"
    with lm.base() as base:
        noise = _LEAST_NOISE + _NOISE_FACTOR * _probe(base, token_ids, method)
    if (error := _probe(lm, token_ids, "single")) > noise:
        raise AdapterError(
            f"the adapter '{lm.adapter}' is of a kind that is not known here, and two readings of the same prompts "
            f"differ by {error:.2g} (relative); nothing can be told from them: give the merged model"
        )
    return _probe(lm, token_ids, method) > noise


def _keep_pages(lm: LM) -> None:
    """Let the C library keep memory that tensors have given back, instead of fetching fresh pages for each tensor.

    glibc returns free memory to the system beyond twice the largest block that was ever freed, up to 32 MiB. Where
    that block was small, a float32 reading of a 135M model met 140,000 page faults, a tenth of its time. Giving one
    untouched block of nearly that size back is all that it takes; other systems ignore it.
    """
    if lm.device.type == "cpu":
        block = torch.empty(_ARENA_BYTES, dtype=torch.uint8)
        del block


@contextlib.contextmanager
def _wide_stream(lm: LM) -> Iterator[None]:
    """Keep the residual stream of a half-precision model in float32; products and attention stay in half precision.

    What enters the stream is widened, and what blocks read of it is narrowed again behind their norms: the additions
    in between are float32 by themselves. Models that are not known well enough for it are read as they are.
    """
    dtype = lm.dtype

    def widen(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    def narrow(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(x.to(dtype) for x in output) if isinstance(output, tuple) else output.to(dtype)

    def narrow_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(x.to(dtype) for x in args)

    parts = stream_parts(lm)
    with contextlib.ExitStack() as stack:
        for module in parts.sources:
            stack.callback(module.register_forward_hook(widen).remove)
        for module in parts.readers:
            stack.callback(module.register_forward_hook(narrow).remove)
            if isinstance(module, nn.LayerNorm):  # refuses numbers that are wider than its weights
                stack.callback(module.register_forward_pre_hook(narrow_input).remove)
        yield


@contextlib.contextmanager
def _answering(blocks: nn.ModuleList, below: Below | None, row: int) -> Iterator[None]:
    """Let blocks give back at once what is known to leave the last of them."""
    own = [vars(block).get("forward") for block in blocks]  # a library may have put its own there
    try:
        for block in blocks:
            assert below is not None
            block.forward = lambda *_, known=below.inputs[row], **__: known
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if before is not None:
                block.forward = before


def _forward(lm: LM, row: _Row, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """One pass that ends with the last wanted block."""
    pooled: dict[int, torch.Tensor] = {}
    last = max(layers)

    def listen(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            pooled[layer] = row.pool(hidden)
            if layer == last and not lm.sharded:  # there every process has to go through every block
                raise Enough

        return hook

    blocks = lm.blocks
    with contextlib.ExitStack() as stack:
        for layer in set(layers):
            stack.callback(blocks[layer].register_forward_hook(listen(layer)).remove)
        with contextlib.suppress(Enough):
            lm.forward(**row.arguments)
    if lm.sharded:
        for module in lm.model.modules():
            # The outermost part would stay whole until a backward pass.
            reshard = getattr(module, "reshard", None)
            if callable(reshard):
                reshard()
    return pooled


def _forward_in_stretches(lm: LM, row: _Row, layers: tuple[int, ...], skipped: int) -> dict[int, torch.Tensor] | None:
    """The same with attention stretch by stretch; None where the blocks computed theirs in another way.

    The first `skipped` blocks compute nothing.

    Of the last block only the wanted rows are computed, unless somebody else listens to it.
    """
    assert row.tree is not None
    last = max(layers)
    block = lm.blocks[last]
    wanted, back = np.unique(row.ends or (), return_inverse=True)  # prompts that are the same end at one place
    ends = None if row.ends is None or _has_listeners(block) else wanted
    attend = TreeAttention(row.tree, n_blocks=last + 1 - skipped, ends=ends)
    call: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        call[:] = args, kwargs

    with attention.attending(lm, attend):
        with contextlib.ExitStack() as stack:
            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            pooled = _forward(lm, row, layers)
        if attend.calls != last + 1 - skipped:
            return None
        if attend.complete:
            hidden = attend.finish(block, *call)[0]
            pooled[last] = hidden.index_select(0, torch.from_numpy(back).to(hidden.device)).float()
    return pooled


def _has_listeners(block: nn.Module) -> bool:
    """Whether anything but the library's own dormant recorders hooks into a block: it may expect all tokens."""
    hooks = (h for m in block.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    known = ("transformers.", __name__)
    return any(not (getattr(hook, "__module__", None) or "").startswith(known) for hook in hooks)


def _stretch_row(lm: LM, token_ids: Sequence[Sequence[int]], row: Sequence[int], pooling: Pooling | None) -> _Row:
    """A tree without a mask, for attention stretch by stretch."""
    device = lm.device
    half = device.type == "cpu" and lm.dtype in (torch.bfloat16, torch.float16)
    tree = lay_tree(token_ids, row, multiple=_HALF_MULTIPLE if half else 1)
    arguments = {
        "input_ids": torch.from_numpy(tree.ids)[None].to(device),
        "position_ids": torch.from_numpy(tree.depths)[None].to(device),
    }
    ends = tuple(int(path[-1]) for path in tree.paths)
    if pooling is None:
        return _Row(arguments, torch.clone, tree=tree)
    if pooling == "last_token":
        places = torch.tensor(ends)
        return _Row(
            arguments, lambda hidden: hidden[0].index_select(0, places.to(hidden.device)).float(), tree=tree, ends=ends
        )
    weights = torch.zeros(len(row), len(tree.ids))
    for at, path in enumerate(tree.paths):
        weights[at, torch.from_numpy(path)] = 1 / len(path)
    return _Row(arguments, lambda hidden: weights.to(hidden.device) @ hidden[0].float(), tree=tree)


def _masked_row(lm: LM, token_ids: Sequence[Sequence[int]], row: Sequence[int], pooling: Pooling | None) -> _Row:
    """A tree with a mask over the whole row, for any model that takes one."""
    laid = _stretch_row(lm, token_ids, row, pooling)
    assert laid.tree is not None
    # Additive, since eager attention adds it; the lowest finite value, since -inf less -inf is NaN.
    mask = torch.zeros((len(laid.tree.ids),) * 2, dtype=lm.dtype)
    mask.masked_fill_(torch.from_numpy(~laid.tree.visible), torch.finfo(lm.dtype).min)
    return _Row(laid.arguments | {"attention_mask": mask[None, None].to(lm.device)}, laid.pool)


def _padded_row(lm: LM, token_ids: Sequence[Sequence[int]], row: Sequence[int], pooling: Pooling | None) -> _Row:
    lengths = torch.tensor([len(token_ids[i]) for i in row])
    width = int(lengths.max())
    ids = torch.full((len(row), width), lm.pad_id)
    for at, i in enumerate(row):
        ids[at, : len(token_ids[i])] = torch.tensor(token_ids[i])
    real = torch.arange(width)[None] < lengths[:, None]  # (prompts, width): padding on the right
    arguments = {"input_ids": ids.to(lm.device)}
    if not bool(real.all()):
        arguments["attention_mask"] = real.long().to(lm.device)
    if pooling is None:
        return _Row(arguments, torch.clone)
    if pooling == "last_token":
        return _Row(
            arguments,
            lambda hidden: hidden[
                torch.arange(len(row), device=hidden.device), (lengths - 1).to(hidden.device)
            ].float(),
        )
    weights = real.float() / lengths[:, None]
    return _Row(arguments, lambda hidden: torch.einsum("pt,pth->ph", weights.to(hidden.device), hidden.float()))


def _row_tokens(lm: LM) -> int:
    """The most tokens of a tree row without a mask.

    Half precision does not halve what a row needs: its stream and its scores are float32 (counted with two bytes a
    number, rows of 4,096 tokens took a 135M model's extraction to 305 MB).
    """
    if lm.device.type != "cpu":
        return _TREE_TOKENS
    return min(_TREE_TOKENS, max(512, _TENSOR_BYTES // (lm.unit.widest * max(_WIDE_BYTES, lm.dtype.itemsize))))


def _probe(lm: LM, token_ids: Sequence[Sequence[int]], method: Method = "tree") -> float:
    """The largest relative difference, after the last block and on a few prompts, between rows laid by a method and
    rows of one prompt; by "single", between two readings of the same rows."""
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    picks = sorted({order[round(at)] for at in np.linspace(0, len(order) - 1, _PROBES)})
    # A short stem of the longest prompt branches off inside it, so that there is always a prefix to share.
    longest = list(token_ids[order[-1]])
    prompts = [list(token_ids[i]) for i in picks] + [longest[: max(1, len(longest) // 2)]]
    layers = (lm.n_layers - 1,)
    plain = BatchPlan("single", 0, tuple((i,) for i in range(len(prompts))), "")
    shared = plain if method == "single" else BatchPlan(method, 0, (tuple(range(len(prompts))),), "")
    together, alone = (
        torch.cat([pooled[layers[0]] for _, pooled in _read_rows(lm, prompts, layers, "last_token", plan)])
        for plan in (shared, plain)
    )
    scale = torch.linalg.vector_norm(alone, dim=-1)
    error = float((torch.linalg.vector_norm(together - alone, dim=-1) / scale).max())
    return error if np.isfinite(error) else float("inf")


# ---------------------------------------------------------------------- checks


def _check_prompts(lm: LM, token_ids: Sequence[Sequence[int]]) -> None:
    if not len(token_ids):
        raise InputError("no prompts were given; a reading needs at least one")
    lengths = [len(ids) for ids in token_ids]
    if min(lengths) == 0:
        raise InputError(f"prompt {lengths.index(0)} has no tokens; leave it out or give it text")
    limit = context_length(lm)
    if max(lengths) > limit:
        raise InputError(
            f"prompt {lengths.index(max(lengths))} has {max(lengths)} tokens and the model's context is "
            f"{limit}; shorten it"
        )


def _check_layers(lm: LM, layers: Sequence[int]) -> tuple[int, ...]:
    if not len(layers):
        raise InputError("no layers were given; name at least one block")
    for layer in layers:
        if not 0 <= layer < lm.n_layers:
            raise LayerError(
                f"layer {layer} is outside the model: '{lm.name}' has blocks 0 to {lm.n_layers - 1}; choose one of them"
            )
    return tuple(int(layer) for layer in layers)


def _check_plan(lm: LM, token_ids: Sequence[Sequence[int]], plan: BatchPlan | None, pooling: Pooling) -> BatchPlan:
    if pooling not in get_args(Pooling):
        raise InputError(f"pooling '{pooling}' is not known; choose one of {', '.join(get_args(Pooling))}")
    if plan is None:
        return plan_batches(lm, token_ids)
    _check_prompts(lm, token_ids)
    plan.check(len(token_ids))
    if plan.method == "tree" and (obstacle := tree_obstacle(lm, max(map(len, token_ids)))):
        raise InputError(f"the batch plan lays prompts as a prefix tree, but {obstacle}; make the plan for this model")
    return plan


def _refuse_non_numbers(values: FloatArray, lm: LM) -> None:
    if not np.isfinite(values).all():
        raise NumericalError(
            f"the activations of '{lm.name}' hold NaN or infinity; its weights diverged or its dtype "
            "overflows: read an earlier checkpoint, or load it in float32 or bfloat16"
        )
