"""How prompts are laid into forward passes: the batch plan, and the prefix tree of one row. Torch-free.

Batch composition moves half-precision activations, so the plan is part of a reading: it is deterministic
given the token ids, it is stored with a basis, and every later reading uses the same one.

Method "tree". The prompts of a row are laid in one sequence as a prefix tree over their token ids: each
shared prefix stands there once, a token's position is its depth, and a mask lets it see its ancestors only.
No padding, no cache, and the arithmetic of each prompt is that of the prompt alone. Rows are runs of the
lexicographically sorted prompts, where neighbours share most. Long rows share more but pay for attention
between strangers, which is computed and then masked; so the runs minimise

    sum over rows of   fixed + linear * tokens + quadratic * tokens^2

exactly, by dynamic programming over the sorted prompts.

    plan = BatchPlan("tree", 2048, tree_rows(ids, cost=RowCost(1.0, 1e-3, 30.0), max_tokens=2048), "")
    row = lay_tree(ids, plan.rows[0])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt

from tiltmeter import sound
from tiltmeter.errors import ArtifactError, InputError
from tiltmeter.fingerprint import sha

__all__ = ["BatchPlan", "Method", "RowCost", "Stretches", "TreeRow", "lay_tree", "padded_rows", "tree_rows"]

Method = Literal["tree", "padded", "single"]
TokenIds = Sequence[Sequence[int]]


@dataclass(frozen=True)
class BatchPlan:
    """Which prompts share a forward pass, and how.

    Attributes:
        method: "tree" (one prefix tree per row), "padded" (right padding), "single" (one prompt per row).
        max_tokens: the most tokens that a row of several prompts may hold.
        rows: indices into the prompts; each prompt occurs exactly once.
        reason: why this method, in one sentence.
    """

    method: Method
    max_tokens: int
    rows: tuple[tuple[int, ...], ...]
    reason: str

    @property
    def n_prompts(self) -> int:
        """How many prompts the plan covers."""
        return sum(map(len, self.rows))

    def check(self, n_prompts: int) -> None:
        """Refuse a plan that was made for another prompt list.

        Raises:
            InputError: a prompt is missing, doubled, or out of range.
        """
        if sorted(i for row in self.rows for i in row) != list(range(n_prompts)):
            raise InputError(
                f"the batch plan covers {self.n_prompts} prompts and {n_prompts} were given; "
                "a plan belongs to its own prompt list: pass those prompts, or leave the plan out"
            )

    def digest(self) -> str:
        """The sha256 (hex) of what decides the arithmetic: method and rows."""
        return sha({"method": self.method, "rows": self.rows})

    def to_dict(self) -> dict[str, object]:
        """A JSON-able form."""
        return {
            "method": self.method,
            "max_tokens": self.max_tokens,
            "rows": [list(row) for row in self.rows],
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> BatchPlan:
        """Inverse of `to_dict`.

        Raises:
            ArtifactError: a field is missing, of another type or outside its range.
        """
        try:
            sound.choice("method", data.get("method"), get_args(Method))
            sound.whole("max_tokens", data.get("max_tokens"), least=1)
            sound.text("reason", data.get("reason", ""), blank=True)
            rows = data.get("rows")
            if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
                raise InputError("rows must be lists of prompt indices, none of them empty")
            for number in (i for row in rows for i in row):
                sound.whole("a prompt index", number)
        except InputError as error:
            raise ArtifactError(
                f"the stored batch plan is unsound: {error}; the file is damaged or foreign, so make it again"
            ) from error
        return cls(
            cast(Method, data["method"]),
            cast(int, data["max_tokens"]),
            tuple(tuple(row) for row in rows),
            str(data.get("reason", "")),
        )


class RowCost(NamedTuple):
    """The modelled cost of one row of T tokens: fixed + linear * T + quadratic * T^2 (any unit)."""

    linear: float
    quadratic: float
    fixed: float


def tree_rows(token_ids: TokenIds, *, cost: RowCost, max_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Split the sorted prompts into the runs of least modelled cost, none above `max_tokens` tree tokens.

    A prompt that is itself longer than `max_tokens` gets a row of its own.
    """
    order = sorted(range(len(token_ids)), key=lambda i: tuple(token_ids[i]))
    lengths = [len(token_ids[i]) for i in order]
    fresh = [0] + [
        lengths[b] - _shared(token_ids[order[a]], token_ids[order[b]]) for a, b in pairwise(range(len(order)))
    ]
    reach = np.cumsum(np.array(fresh, dtype=np.int64))
    best = np.full(len(order) + 1, np.inf)
    best[0] = 0.0
    start = np.zeros(len(order) + 1, dtype=np.int64)
    for first, length in enumerate(lengths):
        limit = max(max_tokens, length)
        last = int(np.searchsorted(reach, reach[first] + limit - length, side="right"))
        tokens = (length + reach[first:last] - reach[first]).astype(np.float64)
        total = best[first] + cost.fixed + tokens * (cost.linear + cost.quadratic * tokens)
        better = np.flatnonzero(total < best[first + 1 : last + 1])
        best[first + 1 + better] = total[better]
        start[first + 1 + better] = first
    rows: list[tuple[int, ...]] = []
    end = len(order)
    while end:
        rows.append(tuple(order[start[end] : end]))
        end = int(start[end])
    return tuple(reversed(rows))


def padded_rows(token_ids: TokenIds, *, max_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Group prompts of similar length, longest first, so that count times longest stays within
    `max_tokens`."""
    order = sorted(range(len(token_ids)), key=lambda i: (-len(token_ids[i]), tuple(token_ids[i])))
    rows: list[list[int]] = []
    width = 0
    for i in order:
        if not rows or (len(rows[-1]) + 1) * width > max_tokens:
            rows.append([])
            width = len(token_ids[i])
        rows[-1].append(i)
    return tuple(tuple(row) for row in rows)


class TreeRow(NamedTuple):
    """One row as a prefix tree of T tokens.

    Attributes:
        ids: (T,) token ids in depth-first order.
        depths: (T,) each token's position in its own prompt.
        ends: (T,) the place behind each token's last descendant.
        paths: per prompt, the places of its tokens in the row, in order; the last one is its last token.
    """

    ids: npt.NDArray[np.int64]
    depths: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    paths: tuple[npt.NDArray[np.int64], ...]

    @property
    def visible(self) -> npt.NDArray[np.bool_]:
        """(T, T) whether the row's token may see the column's: itself and its ancestors."""
        places = np.arange(len(self.ids))
        return _sees(places, places, self.ends)

    def stretches(self, size: int) -> list[Stretches]:
        """The row cut into stretches of `size` tokens, and what is left over, each with the keys that it can see.

        A token's descendants stand right behind it. So a stretch sees, beside itself, those tokens before it whose
        descendants reach into it: the path to its first token.
        """
        n = len(self.ids)
        whole = n - n % size
        found = []
        for first, last, width in ((0, whole, size), (whole, n, n - whole)):
            if first == last:
                continue
            starts = range(first, last, width)
            paths = [np.flatnonzero(self.ends[:start] > start) for start in starts]
            longest = max(map(len, paths))
            keys = np.zeros((len(paths), longest + width), dtype=np.int64)
            visible = np.zeros((len(paths), width, longest + width), dtype=np.bool_)
            for at, (start, path) in enumerate(zip(starts, paths, strict=True)):
                own = np.arange(start, start + width)
                keys[at, : len(path)], keys[at, longest:] = path, own
                visible[at, :, : len(path)] = _sees(own, path, self.ends)
                visible[at, :, longest:] = _sees(own, own, self.ends)
            found.append(Stretches(first, last, keys, visible))
        return found


class Stretches(NamedTuple):
    """Stretches of equal length that follow each other in a row.

    Attributes:
        first: place of the first token of the first stretch.
        last: place behind the last token of the last one.
        keys: (stretches, K) places of the tokens that each may look at, filled up with place 0.
        visible: (stretches, length, K) which of them each token sees.
    """

    first: int
    last: int
    keys: npt.NDArray[np.int64]
    visible: npt.NDArray[np.bool_]


def lay_tree(token_ids: TokenIds, row: Sequence[int], *, multiple: int = 1) -> TreeRow:
    """Lay the prompts of one row, given as indices, into a prefix tree; paths follow the order of `row`.

    The row is filled up to a multiple of so many tokens with tokens that stand alone and on no path.
    """
    order = sorted(range(len(row)), key=lambda j: tuple(token_ids[row[j]]))
    paths: dict[int, npt.NDArray[np.int64]] = {}
    ids: list[int] = []
    depths: list[int] = []
    closed: list[tuple[npt.NDArray[np.int64], int]] = []
    previous: Sequence[int] = ()
    trunk = np.zeros(0, dtype=np.int64)
    for j in order:
        prompt = token_ids[row[j]]
        shared = _shared(previous, prompt)
        closed.append((trunk[shared:], len(ids)))
        trunk = np.concatenate([trunk[:shared], np.arange(len(ids), len(ids) + len(prompt) - shared)])
        ids.extend(prompt[shared:])
        depths.extend(range(shared, len(prompt)))
        paths[j] = trunk
        previous = prompt
    n_real, n_filled = len(ids), -len(ids) % multiple
    ids.extend([ids[0]] * n_filled)
    depths.extend([0] * n_filled)
    ends = np.full(len(ids), n_real, dtype=np.int64)
    for places, end in closed:
        ends[places] = end
    ends[n_real:] = np.arange(n_real, len(ids)) + 1
    return TreeRow(
        np.array(ids, dtype=np.int64),
        np.array(depths, dtype=np.int64),
        ends,
        tuple(paths[j] for j in range(len(row))),
    )


def _sees(
    tokens: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """(tokens, keys) whether each key is the token itself or an ancestor of it."""
    seen: npt.NDArray[np.bool_] = (keys[None] <= tokens[:, None]) & (tokens[:, None] < ends[keys][None])
    return seen


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two prompts have in common."""
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return min(len(left), len(right))
