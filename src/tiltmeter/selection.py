"""Which of several layers to watch: the one where steering changes what the model says most.

At each candidate layer every direction is added, and subtracted, with a length in units of that layer's mean
activation norm; the divergence is how far the greedy answers move from those without, word by word. All candidates
get the same prompts and directions, so two of them are compared answer by answer. A candidate that lies three standard
errors behind the best is not asked further. Those within two standard errors of the best at the end are tied, and the
tie goes to the layer whose linear probes do best on system prompts that they were not fitted on.

The standard errors take the answers for independent, though those to one prompt are not quite. In a 135M model the
candidates between 40 % and 75 % of the depth are mostly tied, and directions drawn at random change its answers nearly
as much (docs/speed.md): there it is the probes that decide. This module knows no trait.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tiltmeter.lm import LM, Message

__all__ = ["STRENGTH", "Candidate", "LayerScore", "LayerSelection", "changes_by_steering", "choose"]

STRENGTH = 0.5
"""Steering strength for layer selection, in units of the layer's mean activation norm.

A fixed length, such as the paper's 16, is twice the norm of one model and a twentieth of another's. Half of the
norm is large against what separates the poles (1 to 6 % of the norm in a model of 135M weights), so that greedy
answers do change.
"""
PROBE_PASS = 0.8
PROBE_SHARE = 0.75
_TOKENS = 32
_ROWS = 64  # answers in one batch: more need memory, fewer wait for the weights at every token
_BEHIND, _TIED = 3.0, 2.0  # standard errors

FloatArray = NDArray[np.floating[Any]]
Progress = Callable[[int, int, str], None]


class Candidate(NamedTuple):
    """What was found at one candidate layer.

    Attributes:
        layer: the block after which was read, counted from 0.
        directions: (k, hidden) unit rows.
        norm: mean activation norm of the measurement prompts there.
        probes: accuracy of each trait's probe over shuffled folds.
        transfers: the same over folds that leave out whole system prompts.
    """

    layer: int
    directions: FloatArray
    norm: float
    probes: tuple[float, ...]
    transfers: tuple[float, ...]


class LayerScore(NamedTuple):
    """What is known of one candidate layer.

    Attributes:
        layer: the block after which was read, counted from 0.
        norm: mean activation norm of the measurement prompts there.
        divergence: mean change of greedy answers under steering, 0 (none) to 1; None where not measured.
        probe_accuracy: accuracy of each trait's linear probe over five shuffled folds, 0 to 1; it saturates.
        transfer_accuracy: the same over folds that leave out whole system prompts (where a pole has only one,
            whole questions): whether the trait is read, or only the sentences that call it forth.
        answers: how many steered answers the divergence rests on; 0 where that was not kept.
        divergence_se: standard error of the divergence over these answers.
    """

    layer: int
    norm: float
    divergence: float | None
    probe_accuracy: tuple[float, ...]
    transfer_accuracy: tuple[float, ...] = ()
    answers: int = 0
    divergence_se: float | None = None


@dataclass(frozen=True)
class LayerSelection:
    """How the layer was chosen.

    Attributes:
        scores: one per candidate, in the order of the layers.
        strength: steering strength in units of each layer's mean activation norm; None where nothing was
            steered.
        probes_pass: whether at the chosen layer at least 75 % of the traits have a probe accuracy above 0.8.
        reason: why this layer, in one sentence.
    """

    scores: tuple[LayerScore, ...]
    strength: float | None
    probes_pass: bool
    reason: str


def changes_by_steering(
    lm: LM,
    candidates: Sequence[Candidate],
    conversations: Sequence[Sequence[Message]],
    *,
    strength: float = STRENGTH,
    progress: Progress | None = None,
) -> list[NDArray[np.float64]]:
    """How far steering at each candidate layer moves the greedy answers, each 0 (not at all) to 1.

    The answers to one conversation are made together, for all layers, directions and signs.

    Args:
        lm: the model.
        candidates: layers with directions; all with as many.
        conversations: what is asked.
        strength: in units of each layer's mean activation norm.
        progress: called with (answers done, answers in all, what is done).

    Returns:
        Per candidate (answers,): conversation by conversation, first all directions added, then all subtracted. A
        candidate that cannot win any more has fewer.
    """
    from tiltmeter.steer import apply_rows

    found: list[list[float]] = [[] for _ in candidates]
    total = sum(2 * len(c.directions) for c in candidates) * len(conversations)
    plain = lm.generate(conversations, max_new_tokens=_TOKENS, temperature=0.0, batch_size=len(conversations))
    for conversation, before in zip(conversations, plain, strict=True):
        if progress is not None:
            progress(sum(map(len, found)), total, "steering candidate layers")
        live = racing([np.array(changes) for changes in found])
        tables = [np.concatenate([c.directions, -c.directions]) * (strength * c.norm) for c in candidates]
        n_rows = sum(len(tables[at]) for at in live)
        start = 0
        with contextlib.ExitStack() as stack:
            for at in live:  # everybody's rows go through every steered block; others' rows get nothing added there
                vectors = np.zeros((n_rows, tables[at].shape[1]))
                vectors[start : start + len(tables[at])] = tables[at]
                stack.enter_context(apply_rows(lm, candidates[at].layer, vectors))
                start += len(tables[at])
            after = lm.generate([conversation] * n_rows, max_new_tokens=_TOKENS, temperature=0.0, batch_size=_ROWS)
        answers = iter(after)
        for at in live:
            found[at] += [_change(before, next(answers)) for _ in tables[at]]
    if progress is not None:
        progress(total, total, "steering candidate layers")
    return [np.array(changes) for changes in found]


def racing(changes: Sequence[FloatArray]) -> list[int]:
    """The candidates that may still win: those with all answers so far that are not clearly behind the best."""
    most = max(map(len, changes))
    live = [at for at, own in enumerate(changes) if len(own) == most]
    if not most:
        return live
    best = max(live, key=lambda at: float(changes[at].mean()))
    return [at for at in live if not _behind(changes[at], changes[best], _BEHIND)]


def choose(
    candidates: Sequence[Candidate],
    changes: Sequence[FloatArray] | None,
    *,
    strength: float = STRENGTH,
    given: bool = False,
) -> tuple[Candidate, LayerSelection]:
    """The layer, and why.

    Args:
        candidates: one or more.
        changes: what `changes_by_steering` gave; None where there was nothing to choose.
        strength: what was steered with.
        given: whether the layer was asked for.
    """
    if changes is None:
        chosen = candidates[0]
        why = f"block {chosen.layer} was {'asked for' if given else 'the only candidate'}"
    else:
        most = max(map(len, changes))
        whole = [at for at, own in enumerate(changes) if len(own) == most]
        best = max(whole, key=lambda at: float(changes[at].mean()))  # the earliest of equals
        tied = [at for at in whole if not _behind(changes[at], changes[best], _TIED)]
        chosen = candidates[max(tied, key=lambda at: _transfer(candidates[at]))]
        listed = ", ".join(f"{c.layer}: {own.mean():.3f}" for c, own in zip(candidates, changes, strict=True))
        by_block = f"(divergence by block: {listed})"
        if len(tied) == 1:
            why = (
                f"steering by {strength} of the activation norm changed greedy answers most after block "
                f"{chosen.layer} {by_block}"
            )
        else:
            blocks = ", ".join(str(candidates[at].layer) for at in tied)
            known = ", ".join(f"{candidates[at].layer}: {_transfer(candidates[at]):.3f}" for at in tied)
            why = (
                f"steering by {strength} of the activation norm does not tell blocks {blocks} apart {by_block}, and "
                f"probes know unseen system prompts best after block {chosen.layer} (accuracy by block: {known})"
            )
    share = float(np.mean([accuracy > PROBE_PASS for accuracy in chosen.probes]))
    reason = f"{why}; {share:.0%} of the traits have a probe accuracy above {PROBE_PASS} there"
    scores = tuple(
        LayerScore(c.layer, c.norm, None, c.probes, c.transfers)
        if changes is None
        else LayerScore(
            c.layer, c.norm, float(changes[at].mean()), c.probes, c.transfers, len(changes[at]), _error(changes[at])
        )
        for at, c in enumerate(candidates)
    )
    return chosen, LayerSelection(scores, None if changes is None else strength, share >= PROBE_SHARE, reason)


def _behind(own: FloatArray, best: FloatArray, errors: float) -> bool:
    """Whether the paired differences to the best lie below zero by more than so many of their standard errors."""
    apart = best - own
    return float(apart.mean()) > errors * (_error(apart) or 0.0)


def _error(values: FloatArray) -> float | None:
    """Standard error of the mean; None for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _transfer(candidate: Candidate) -> float:
    return float(np.mean(candidate.transfers))


def _change(before: str, after: str) -> float:
    """1 - the similarity of two texts word by word; difflib's shortcut for long texts is off."""
    return 1.0 - difflib.SequenceMatcher(None, before.split(), after.split(), autojunk=False).ratio()
