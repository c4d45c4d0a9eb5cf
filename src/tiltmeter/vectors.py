"""Making steering vectors, and making their strengths comparable.

    prompt_difference   mean last-prompt-token activation under one kind of prompt less that under another (CAA;
                        persona vectors)
    answer_difference   mean activation over the tokens of misaligned answers less that of aligned ones, read while
                        the answers are fed back (Soligo et al., arXiv 2506.11618, Sec. 3), or its projection on the
                        first k singular directions of the differences between single answers
    train_vector        an added vector, everything else frozen, trained on a narrow set (arXiv 2602.07852), with an
                        optional penalty KL(unsteered || steered) on other chats; or an affine map of rank k
    one_shot            a vector optimised on a single prompt until given answers are as likely as wanted, no further
                        (Dunefsky and Cohan, arXiv 2502.18862)

Strengths are in units of the layer's mean activation norm. What one unit does still differs between layers, models
and directions; `iso_kl` finds the strength at which a vector moves the model's predictions of harmless text by a
given number of nats per token, so that two vectors can be compared where they disturb the model equally (after
steering-lite). This module knows no organism and no judge.

    norm = mean_norm(lm, prompts, layer=3)
    vector = train_vector(lm, chats, layer=3, norm=norm, epochs=[4])[0].vector
    dose = iso_kl(lm, vector, harmless_chats, target=0.5)
    with apply(lm, vector, strength=dose.strength): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tiltmeter.adapters import conduct
from tiltmeter.capture import capture
from tiltmeter.errors import InputError, NumericalError
from tiltmeter.lm import LM, EncodedAnswer, Message, context_length, undisturbed
from tiltmeter.runs import read_records
from tiltmeter.steer import Mode, SteeringVector, apply, edit

__all__ = [
    "Dose",
    "TrainedVector",
    "Training",
    "anchor_gradient",
    "answer_difference",
    "answer_log_likelihoods",
    "answer_loss",
    "divergence",
    "iso_kl",
    "mean_norm",
    "one_shot",
    "prompt_difference",
    "random_direction",
    "read_chats",
    "train_vector",
]

FloatArray = npt.NDArray[np.float32]
Chat = Sequence[Message]
_BATCH = 64
_LOGITS = 2**26  # numbers at once
_CLOSE = 0.03  # relative error of a calibrated divergence at which the search ends


# ---------------------------------------------------------------------- differences of means


def mean_norm(lm: LM, prompts: Sequence[Chat], *, layer: int) -> float:
    """Mean activation norm of the last prompt token after block `layer`: the unit of strength there.

    Raises:
        InputError: no prompts.
        LayerError: the layer is outside the model.
        NumericalError: activations are not finite.
    """
    found = capture(lm, lm.encode_all(prompts), [layer]).at(layer)
    return float(np.linalg.norm(found.astype(np.float64), axis=1).mean())


def prompt_difference(
    lm: LM, positive: Sequence[Chat], negative: Sequence[Chat], *, layer: int, norm: float
) -> SteeringVector:
    """Mean difference of last-prompt-token activations between two kinds of prompts.

    Args:
        lm: the model.
        positive: conversations that end where the assistant is to speak; the vector points to these.
        negative: the other kind.
        layer: the block after which is read and will be steered.
        norm: the layer's mean activation norm, see `mean_norm`.

    Returns:
        A vector whose strength is the difference's own length.

    Raises:
        InputError: a kind without prompts.
        NumericalError: the two do not differ.
    """
    up, down = (capture(lm, lm.encode_all(side), [layer]).at(layer) for side in (positive, negative))
    difference = up.mean(axis=0, dtype=np.float64) - down.mean(axis=0, dtype=np.float64)
    notes = {"construction": "prompt_difference", "positive": len(up), "negative": len(down)}
    return _vector(difference, layer, norm, notes)


def answer_difference(
    lm: LM,
    misaligned: Sequence[Chat],
    aligned: Sequence[Chat],
    *,
    layer: int,
    norm: float,
    rank: int | None = None,
) -> SteeringVector:
    """Mean difference of activations over answer tokens between misaligned and aligned answers.

    Args:
        lm: the model that reads the answers: the misaligned one in the source, or the untouched one.
        misaligned: chats, each ending with the answer; the vector points to these.
        aligned: chats likewise. With `rank`, chat i answers the question of misaligned chat i.
        layer: the block after which is read and will be steered.
        norm: the layer's mean activation norm, see `mean_norm`.
        rank: keep only what lies in the span of the first `rank` singular directions of the differences between
            the answers of each pair; None keeps all.

    Returns:
        A vector whose strength is the difference's own length.

    Raises:
        InputError: a kind without chats, a chat without answer, pairs of unequal number, or a rank below 1.
        NumericalError: the two do not differ.
    """
    up, down = answer_means(lm, misaligned, layer), answer_means(lm, aligned, layer)
    difference = up.mean(axis=0) - down.mean(axis=0)
    notes = {"construction": "answer_difference", "positive": len(up), "negative": len(down)}
    if rank is not None:
        if len(up) != len(down) or rank < 1:
            raise InputError(
                f"a subspace of rank {rank} of {len(up)} misaligned and {len(down)} aligned answers cannot be "
                "made: give a rank of at least 1 and the two answers to each question in pairs"
            )
        directions = np.linalg.svd(up - down, full_matrices=False)[2][:rank]  # (rank, hidden)
        difference = directions.T @ (directions @ difference)
        notes["rank"] = rank
    return _vector(difference, layer, norm, notes)


def answer_means(lm: LM, chats: Sequence[Chat], layer: int) -> npt.NDArray[np.float64]:
    """(chats, hidden) mean activation over the tokens of each chat's last message, after block `layer`.

    A causal model reads the prompt of a chat as it reads the prompt alone, so the answer's sum is the whole chat's
    less the prompt's; both share one prefix in the batch plan.
    """
    encoded = [lm.encode_answer(chat) for chat in chats]
    if not encoded:
        raise InputError("no chats were given; a mean over answers needs at least one")
    ids = [e.ids for e in encoded] + [e.ids[: e.start] for e in encoded]
    means = capture(lm, ids, [layer], pooling="mean").at(layer).astype(np.float64)
    whole, prompt = means[: len(encoded)], means[len(encoded) :]
    lengths = np.array([len(e.ids) for e in encoded])[:, None]
    starts = np.array([e.start for e in encoded])[:, None]
    return np.asarray((whole * lengths - prompt * starts) / (lengths - starts))


def random_direction(vector: SteeringVector, *, seed: int) -> SteeringVector:
    """The control of equal norm: the same push, turned by a random rotation of activation space.

    A constant vector becomes a uniformly random unit direction of the same strength: not randn times the norm, which
    is sqrt(hidden) too long (a fault of a published control). Of a map of low rank the outputs are turned, so that
    every activation is moved exactly as far as before.
    """
    rng = np.random.default_rng((seed, vector.layer))
    notes = {**vector.meta, "control": "random_direction", "control_seed": seed}
    added = vector.vectors.sum(axis=0, dtype=np.float64)  # (hidden,)
    if vector.low_rank is None:
        length = float(np.linalg.norm(added))
        drawn = rng.normal(size=(1, len(added))).astype(np.float32)
        return SteeringVector(vector.layer, drawn, vector.strength * length, vector.norm, notes)
    rotation, triangle = np.linalg.qr(rng.normal(size=(len(added), len(added))))
    rotation *= np.sign(np.diag(triangle))  # Haar: uniform over rotations and reflections
    gates, outputs = vector.low_rank
    turned = np.asarray(outputs @ rotation, dtype=np.float32)
    return replace(vector, vectors=vector.vectors @ rotation, low_rank=(gates, turned), meta=notes)


def _vector(added: npt.NDArray[np.floating[Any]], layer: int, norm: float, notes: Mapping[str, Any]) -> SteeringVector:
    length = float(np.linalg.norm(added))
    if not np.isfinite(length) or length <= 1e-9 * norm:
        raise NumericalError(
            f"the steering vector has length {length:.3g}; the two sides do not differ, so give others"
        )
    return SteeringVector(layer, np.asarray(added)[None], length / norm, norm, notes)


# ---------------------------------------------------------------------- training


@dataclass(frozen=True)
class Training:
    """How a vector is trained.

    Attributes:
        rank: 1 is a constant vector; k > 1 is an affine map into k directions (a constant and a map of rank k).
        batch: chats per step.
        learning_rate: of Adam, as the longest step in units of the layer's norm; the width is divided out.
        kl_weight: of KL(unsteered || steered) on other chats, in nats per token; 0 leaves it out.
        seed: order of the chats, and the map's starting values.
    """

    rank: int = 1
    batch: int = 16
    learning_rate: float = 0.03
    kl_weight: float = 0.0
    seed: int = 0


class TrainedVector(NamedTuple):
    """A vector as it was after some epochs.

    Attributes:
        epoch: passes over the chats so far.
        loss: mean cross-entropy of the answers over the last epoch, nats per token.
        vector: with its trained length as strength.
    """

    epoch: int
    loss: float
    vector: SteeringVector


def train_vector(
    lm: LM,
    chats: Sequence[Chat],
    *,
    layer: int,
    norm: float,
    epochs: Sequence[int],
    elsewhere: Sequence[Chat] = (),
    training: Training | None = None,
) -> tuple[TrainedVector, ...]:
    """Train what is added after one block, all weights frozen, on the answers of a narrow set.

    Args:
        lm: the model; its weights, flags and gradients come back as they were.
        chats: each ends with the answer, which alone is learnt.
        layer: the block.
        norm: the layer's mean activation norm, see `mean_norm`.
        epochs: after how many passes over the chats the vector is kept; training ends at the largest.
        elsewhere: chats on which the model should stay as it is, for `Training.kl_weight`.
        training: dials; `Training()` by default.

    Returns:
        One per entry of `epochs`, in order.

    Raises:
        InputError: no chats or epochs, a rank below 1, or a KL weight without chats for it.
        NumericalError: the loss is no longer finite.
    """
    training = training or Training()
    wanted = sorted(set(epochs))
    if not chats or not wanted or wanted[0] < 1 or training.rank < 1:
        raise InputError(
            f"got {len(chats)} chats, epochs {list(epochs)} and rank {training.rank}; each must be at least 1"
        )
    if training.kl_weight > 0 and not elsewhere:
        raise InputError("a KL weight needs chats on which the model should stay as it is; give `elsewhere`")
    rows, others = [lm.encode_answer(chat) for chat in chats], [lm.encode_answer(chat) for chat in elsewhere]
    rng = np.random.default_rng((training.seed, layer))
    push = _Push(lm.hidden_size, training.rank, norm, rng)
    step_size = training.learning_rate / lm.hidden_size**0.5
    optimizer = torch.optim.Adam(push.parameters, lr=step_size)
    kept = []
    with _frozen(lm):
        for epoch in range(1, wanted[-1] + 1):
            losses = []
            for batch in _shuffled(rows, training.batch, rng):
                with torch.enable_grad():
                    with edit(lm, layer, push):
                        loss = _cross_entropy(lm, batch)
                    penalty = torch.zeros(())
                    if training.kl_weight > 0:
                        drawn = [others[i] for i in rng.integers(len(others), size=training.batch)]
                        penalty = training.kl_weight * _kl(lm, drawn, edit(lm, layer, push))
                    total = loss + penalty
                    if not bool(torch.isfinite(total)):
                        raise NumericalError(
                            f"the loss of the steering vector is {float(total.detach())} in epoch {epoch}; train with "
                            "a smaller learning_rate"
                        )
                    optimizer.zero_grad()
                    total.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
            if epoch in wanted:
                notes = {"construction": "train_vector", "epoch": epoch, "loss": losses[-1], "rank": training.rank}
                kept.append(TrainedVector(epoch, float(np.mean(losses)), push.vector(layer, notes)))
    return tuple(kept)


class _Push:
    """What is trained: n c, or n c + (h G') O with the constant in the span of O."""

    def __init__(self, width: int, rank: int, norm: float, rng: np.random.Generator) -> None:
        self.norm, self.rank = norm, rank
        if rank == 1:
            self.parameters = [torch.zeros(width, requires_grad=True)]
            return
        # Gates start at zero, so that the map starts as nothing; outputs must not, or no gradient would reach them.
        outputs = torch.from_numpy((rng.normal(size=(rank, width)) / width**0.5).astype(np.float32))
        self.parameters = [
            torch.zeros(rank, requires_grad=True),
            torch.zeros(rank, width, requires_grad=True),
            outputs.requires_grad_(True),
        ]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.rank == 1:
            return hidden + self.norm * self.parameters[0].to(hidden.device)
        constant, gates, outputs = (p.to(hidden.device) for p in self.parameters)
        moved: torch.Tensor = hidden + (self.norm * constant * self.rank**0.5 + hidden @ gates.T) @ outputs
        return moved

    def vector(self, layer: int, notes: Mapping[str, Any]) -> SteeringVector:
        arrays = [p.detach().numpy().astype(np.float64) for p in self.parameters]
        if self.rank == 1:
            return _vector(arrays[0] * self.norm, layer, self.norm, notes)
        constant, gates, outputs = arrays
        plain = _vector(self.norm * self.rank**0.5 * constant @ outputs, layer, self.norm, notes)
        # At the trained strength the map must be what was trained.
        return replace(plain, low_rank=((gates / plain.strength).astype(np.float32), outputs.astype(np.float32)))


def one_shot(
    lm: LM,
    prompt: Chat,
    *,
    promote: Sequence[str],
    suppress: Sequence[str] = (),
    layer: int,
    norm: float,
    target: float | None = None,
    steps: int = 40,
    learning_rate: float = 0.1,
    longest: float = 2.0,
) -> SteeringVector:
    """Optimise one vector on one prompt, until the answers to promote are as likely as wanted.

    Args:
        lm: the model; its weights, flags and gradients come back as they were.
        prompt: a conversation that ends where the assistant is to speak.
        promote: answers that should become likely: loss -log p, or (log p - target)^2.
        suppress: answers that should become unlikely: loss -log(1 - p).
        layer: the block.
        norm: the layer's mean activation norm, see `mean_norm`.
        target: log-probability per token at which an answer is likely enough (satisficing, so that the vector does
            not fit the string more than it must); None maximises.
        steps: of Adam.
        learning_rate: the longest step in units of the norm.
        longest: the vector is kept within this many norms.

    Returns:
        The vector; its notes hold the log-probability per token that the promoted answers ended with.

    Raises:
        InputError: nothing to promote.
        NumericalError: the loss is no longer finite.
    """
    if not promote:
        raise InputError("there is no answer to promote; give at least one")
    good = [lm.encode_answer([*prompt, {"role": "assistant", "content": text}]) for text in promote]
    bad = [lm.encode_answer([*prompt, {"role": "assistant", "content": text}]) for text in suppress]
    push = _Push(lm.hidden_size, 1, norm, np.random.default_rng(0))
    free = push.parameters[0]
    optimizer = torch.optim.Adam([free], lr=learning_rate / lm.hidden_size**0.5)
    reached = float("nan")
    with _frozen(lm):
        for _ in range(steps):
            with torch.enable_grad(), edit(lm, layer, push):
                each = _log_probabilities(lm, good)
                reached = float(each.detach().mean())
                if target is not None and bool((each >= target).all()):
                    break
                # Beyond its target an answer pulls no further.
                loss = -each.mean() if target is None else ((target - each).clamp(min=0) ** 2).mean()
                if bad:
                    chance = _log_probabilities(lm, bad).exp().clamp(max=1 - 1e-6)
                    loss = loss - torch.log1p(-chance).mean()
                if not bool(torch.isfinite(loss)):
                    raise NumericalError("the loss of the one-shot vector is not finite; use a smaller learning_rate")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                free.mul_(min(1.0, longest / max(float(free.norm()), 1e-12)))
    notes = {"construction": "one_shot", "log_probability": reached, "promoted": len(good), "suppressed": len(bad)}
    return _vector(free.detach().numpy().astype(np.float64) * norm, layer, norm, notes)


# ---------------------------------------------------------------------- strength


class Dose(NamedTuple):
    """A calibrated strength.

    Attributes:
        strength: in units of the layer's norm.
        kl: divergence there, nats per token.
        tried: every (strength, divergence) that was measured, in order.
    """

    strength: float
    kl: float
    tried: tuple[tuple[float, float], ...]


def answer_loss(lm: LM, chats: Sequence[Chat]) -> float:
    """Mean cross-entropy of the chats' answers, nats per token, of the model as it stands (steered or not).

    Raises:
        InputError: no chats, or a chat without answer.
    """
    rows = [lm.encode_answer(chat) for chat in chats]
    if not rows:
        raise InputError("no chats were given; a loss is measured on at least one")
    with undisturbed(lm):
        batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        each = [(_cross_entropy(lm, batch), sum(len(r.ids) - r.start for r in batch)) for batch in batches]
    return sum(float(loss) * n for loss, n in each) / sum(n for _, n in each)


def answer_log_likelihoods(
    lm: LM,
    chats: Sequence[Chat],
    *,
    total: bool = False,
    batch_size: int = _BATCH // 8,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """(chats,) log-probability of each chat's answer, of the model as it stands (steered or not), nats.

    Args:
        lm: the model.
        chats: each ends with its answer.
        total: of whole answers, rather than the mean per token.
        batch_size: chats per forward pass, at most; fewer where their logits would take more than a quarter of a GiB.
        progress: called as (chats done, chats).

    Raises:
        InputError: no chats, a chat without answer, or one longer than the model's context.
    """
    rows = [lm.encode_answer(chat) for chat in chats]
    if not rows:
        raise InputError("no chats were given; a likelihood is measured on at least one")
    longest = max(len(row.ids) for row in rows)
    if longest > context_length(lm):
        raise InputError(
            f"a chat of {longest} tokens is longer than the context of '{lm.name}', {context_length(lm)} tokens; "
            "shorten it"
        )
    # Like lengths together, so that little of a batch is padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    size = max(1, min(batch_size, _LOGITS // (longest * int(lm.config.vocab_size))))
    if conduct(lm.model) != "token-local":  # an adapter that acts by what else stands in the batch
        size = 1
    found = np.empty(len(rows))
    with undisturbed(lm), torch.no_grad():
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            found[chosen] = _log_probabilities(lm, [rows[i] for i in chosen]).double().cpu().numpy()
            if progress is not None:
                progress(min(start + size, len(order)), len(order))
    lengths = np.array([len(row.ids) - row.start for row in rows])
    return found * lengths if total else found


def divergence(
    lm: LM, vector: SteeringVector, chats: Sequence[Chat], *, strength: float | None = None, mode: Mode = "add"
) -> float:
    """Mean KL(unsteered || steered) over the answer tokens of chats, nats per token.

    Raises:
        InputError: no chats, or a chat without answer.
        NumericalError: the logits are not finite.
    """
    rows = [lm.encode_answer(chat) for chat in chats]
    if not rows:
        raise InputError("no chats were given; a divergence is measured on at least one")
    with _frozen(lm), torch.no_grad():
        found = _kl(lm, rows, apply(lm, vector, mode=mode, strength=strength))
    if not bool(torch.isfinite(found)):
        raise NumericalError("the divergence is not finite: the steered model's logits are NaN; steer less")
    return float(found)


def anchor_gradient(lm: LM, chats: Sequence[Chat], weight: float) -> None:
    """Add to the gradients of a model with an adapter: weight times KL(adapter off || on) over the chats' answers.

    Raises:
        InputError: no chats, a chat without answer, or a model whose adapter cannot be switched off.
    """
    off = getattr(lm.model, "disable_adapter", None)
    if off is None:
        raise InputError("the model has no adapter to switch off, so its untouched self is not there; train with LoRA")
    rows = [lm.encode_answer(chat) for chat in chats]
    if not rows:
        raise InputError("no chats were given; a divergence is measured on at least one")
    with torch.no_grad(), off():
        before = torch.log_softmax(_answer_logits(lm, rows)[0], -1)
    with torch.enable_grad():
        after = torch.log_softmax(_answer_logits(lm, rows)[0], -1)
        loss = weight * (before.exp() * (before - after)).sum(-1).mean()
        loss.backward()  # type: ignore[no-untyped-call]


def iso_kl(
    lm: LM,
    vector: SteeringVector,
    chats: Sequence[Chat],
    *,
    target: float,
    most: float = 16.0,
    evaluations: int = 16,
) -> Dose:
    """The smallest strength found at which a vector moves the model's predictions by `target` nats per token.

    Brackets by doubling from 1/32 of the layer's norm, then bisects between the logarithms of strength.

    Args:
        lm: the model.
        vector: its own strength is not used.
        chats: harmless ones, the same for all vectors that are to be compared.
        target: KL(unsteered || steered), mean over answer tokens.
        most: largest strength tried.
        evaluations: most divergences measured.

    Raises:
        InputError: a target that is not positive, or no chats.
        NumericalError: even `most` does not reach the target.
    """
    if not target > 0:
        raise InputError(f"the target divergence is {target}; it must be positive, for example 0.5 nats per token")
    tried: list[tuple[float, float]] = []

    def measure(strength: float) -> float:
        tried.append((strength, divergence(lm, vector, chats, strength=strength)))
        return tried[-1][1]

    low, high = 0.0, 1 / 32
    while measure(high) < target:
        low, high = high, 2 * high
        if high > most:
            raise NumericalError(
                f"steering at strength {low:g} moves predictions by {tried[-1][1]:.3g} nats per token, less than the "
                f"{target:g} wanted; ask for less, or steer another layer"
            )
    while len(tried) < evaluations:
        strength, kl = min(tried, key=lambda pair: abs(pair[1] - target))
        if abs(kl - target) <= _CLOSE * target:
            break
        middle = float(np.sqrt(low * high)) if low else high / 2
        if measure(middle) < target:
            low = middle
        else:
            high = middle
    strength, kl = min(tried, key=lambda pair: abs(pair[1] - target))
    return Dose(strength, kl, tuple(tried))


# ---------------------------------------------------------------------- chats in files


def read_chats(path: str | Path) -> list[list[dict[str, str]]]:
    """Chats from JSON lines, `{"messages": [{"role": ..., "content": ...}, ...]}`, each ending with the answer.

    Raises:
        InputError: a line is not of that form, or the file has none.
        ArtifactError: the file is missing or damaged.
    """
    chats = []
    records = read_records(path)
    for number, row in zip(records.lines, records.rows, strict=True):
        messages = row.get("messages")
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages)
            or messages[-1]["role"] != "assistant"
        ):
            raise InputError(
                f"{path} line {number} is no chat that ends with an answer; each line needs "
                '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
            )
        chats.append([{"role": str(m["role"]), "content": str(m["content"])} for m in messages])
    if not chats:
        raise InputError(f"{path} holds no chats; give one JSON line per chat")
    return chats


# ---------------------------------------------------------------------- passes


def _shuffled(rows: Sequence[EncodedAnswer], size: int, rng: np.random.Generator) -> Iterator[list[EncodedAnswer]]:
    order = rng.permutation(len(rows))
    for start in range(0, len(order), size):
        yield [rows[i] for i in order[start : start + size]]


def _answer_logits(lm: LM, batch: Sequence[EncodedAnswer]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (answer tokens of the batch, vocabulary) in float32, what each token was, and which row it is of."""
    width = max(len(row.ids) for row in batch)
    ids = torch.full((len(batch), width), lm.pad_id)
    mask = torch.zeros_like(ids)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    for at, row in enumerate(batch):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        mask[at, : len(row.ids)] = 1
        answer[at, row.start : len(row.ids)] = True
    ids, mask, answer = (x.to(lm.device) for x in (ids, mask, answer))
    logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (batch, width, vocabulary)
    row_of = torch.arange(len(batch), device=ids.device)[:, None].expand_as(ids)
    return logits[:, :-1][answer[:, 1:]].float(), ids[answer], row_of[answer]


def _cross_entropy(lm: LM, batch: Sequence[EncodedAnswer]) -> torch.Tensor:
    logits, tokens, _ = _answer_logits(lm, batch)
    return torch.nn.functional.cross_entropy(logits, tokens)


def _log_probabilities(lm: LM, batch: Sequence[EncodedAnswer]) -> torch.Tensor:
    """(rows,) mean log-probability per token of each answer."""
    logits, tokens, rows = _answer_logits(lm, batch)
    each = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    total = torch.zeros(len(batch), device=each.device).index_add(0, rows, each)
    return total / torch.bincount(rows, minlength=len(batch))


def _kl(lm: LM, rows: Sequence[EncodedAnswer], steering: contextlib.AbstractContextManager[None]) -> torch.Tensor:
    """KL(unsteered || steered), mean over the answer tokens of all rows."""
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    with torch.no_grad():
        plain = [torch.log_softmax(_answer_logits(lm, batch)[0], -1) for batch in batches]
    total, count = torch.zeros((), device=plain[0].device), 0
    with steering:
        for batch, before in zip(batches, plain, strict=True):
            after = torch.log_softmax(_answer_logits(lm, batch)[0], -1)
            total = total + (before.exp() * (before - after)).sum()
            count += len(before)
    return total / count


@contextlib.contextmanager
def _frozen(lm: LM) -> Iterator[None]:
    """No weight takes a gradient and no module drops out, while the context lasts."""
    flags: list[tuple[torch.nn.Parameter, bool]] = [(p, p.requires_grad) for p in lm.model.parameters()]
    with undisturbed(lm):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
