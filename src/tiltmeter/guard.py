"""The steering guard: says from the activations of an answer whether, where and how strongly a model is being steered.

What a block puts out follows, on average over an answer, from what it takes in. The guard learns that on unsteered
answers to many kinds of prompts, whatever they say, by one ridge regression per listening place:

    r_l = mean h_l - (W_l mean h_{l-1} + b_l)       residual after block l, means over the tokens of one answer
    d_l = Mahalanobis length of r_l among unsteered answers, over sqrt(1 + leverage of mean h_{l-1})
    s   = max over l of (d_l - median) / (99th percentile - median)       score of the answer

The leverage says how unlike the calibration answers this one's input is, and how much less the regression knows of it
(0 where kinds are left out whole, whose residuals hold that already).
Content moves both means together and leaves no residual; a push that no weight accounts for does, in the block where
it enters, whatever its direction. So no steering vector is needed to calibrate, and none is used. The first block that
passes the threshold is where the push enters, and the length of r there is how strong it is. The last token of the
prompt is listened to in the same way on its own, for pushes that act on the prompt alone.

The threshold is split-conformal: unsteered answers that the regressions have not seen pass it with probability at most
a. It is a promise for prompts like those of calibration. Where it is said which kind each of them is of, kinds are left
out whole: the residuals are what regressions that never saw a kind leave of it (the metric then knows in which
directions new content is misread), and the threshold is the largest of the kinds' (1 - a) quantiles, so that of K
exchangeable kinds a new one alarms on more than a of its answers with probability at most 1 / (K + 1).

Another model, other weights, an adapter, NaN, an answer shorter or longer than any that was calibrated, or one with
more tokens that the regressions have never met (in it or in its prompt) than calibration answers had is INCONCLUSIVE,
never CLEAR.

    guard = fit_guard(lm, conversations, kinds=kinds)                 # benign ones, several hundred; kinds by subject
    with guard.listening(lm) as heard:
        answers = lm.generate(users_conversations)
    guard.judge(heard.trace())[0].state
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from tiltmeter import sound
from tiltmeter.artifacts import made, read_artifact, write_artifact
from tiltmeter.detector import Metric, State
from tiltmeter.errors import InputError, NumericalError
from tiltmeter.fingerprint import sha
from tiltmeter.lm import LM, Message, adapter_state
from tiltmeter.steer import listen
from tiltmeter.verdicts import compare

__all__ = ["Ear", "SteeringGuard", "SteeringVerdict", "Trace", "fit_guard"]

Array = NDArray[np.float64]
_KIND, _FORMAT = "steering_guard", 2
_WINDOWS = ("prompt", "answer")
_RIDGE = 1e-3  # of the mean variance of what predicts
_FLOOR = 0.1  # smallest standard deviation believed, as a share of the residuals' root mean square
_HELD = 8 << 20  # bytes of activations kept before they are summed
_MOST_UNJUDGED = 0.5  # share of a model's answers; above it nothing is said of the model
_ENOUGH = 0.01  # chance that this many false alarms are only that, below which a model counts as steered


@dataclass(frozen=True, eq=False)
class Trace:
    """What was heard of some answers.

    Attributes:
        places: listening places: -1 is what enters block 0, then block numbers.
        prompt: (answers, places, hidden) activation of the last token of the prompt.
        answer: (answers, places, hidden) mean activation over the answer's tokens as they are fed back; NaN where
            none was heard.
        tokens: (answers,) how many.
        said: token ids of each answer's prompt and of the answer as far as it was fed back.
        model: digest of the model that spoke.
        problem: why nothing of it can be judged, or None.
    """

    places: tuple[int, ...]
    prompt: NDArray[np.float32]
    answer: NDArray[np.float32]
    tokens: NDArray[np.int64]
    said: tuple[NDArray[np.int64], ...]
    model: str
    problem: str | None = None

    def take(self, rows: NDArray[np.bool_]) -> Trace:
        """Some of the answers, by mask."""
        said = tuple(ids for ids, wanted in zip(self.said, rows, strict=True) if wanted)
        return Trace(
            self.places, self.prompt[rows], self.answer[rows], self.tokens[rows], said, self.model, self.problem
        )


class Ear:
    """Sums activations while a model generates. Made by `SteeringGuard.listening`; ask it for the `trace` afterwards.

    A conversation's row is found through the cache of `LM.generate`; for other callers row i of each batch is answer
    i. Generation without a key-value cache feeds no answer token by itself, so nothing can be judged. What is heard is
    kept as it is and summed some megabytes at a time: a small model's step is so short that sums at each would show.
    """

    def __init__(self, lm: LM, places: Sequence[int]) -> None:
        self.places = tuple(places)
        self._model = model_digest(lm)
        self._adapter = adapter_state(lm) == "active"
        self._stops = torch.tensor(sorted(lm.stop_ids) or [-1], device=lm.device)
        self._width = lm.hidden_size
        self._parts: list[_Part] = []
        self._rows: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None  # (rows, chunk) of the pass in progress
        self._first = False
        self._heard: list[torch.Tensor] = []  # of the pass in progress, a tensor per place
        self._passes: list[list[torch.Tensor]] = []  # of answers, not summed yet; all with the same rows
        self._columns: list[torch.Tensor] = []  # their tokens, (rows, 1) each

    def begin(self, kwargs: Mapping[str, Any]) -> None:
        """A pass starts: keep what the last one said, and see whose tokens come."""
        self._keep()
        tokens: torch.Tensor = (
            kwargs["inputs_embeds"][..., 0] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        )
        cache = kwargs.get("past_key_values")
        rows = getattr(cache, "rows", None)
        self._first = cache is None or int(cache.get_seq_length()) == 0
        if self._first or (rows is not None and rows is not self._rows):
            self._sum()
            self._rows = torch.arange(len(tokens)) if rows is None else rows
        self._tokens = tokens
        if self._first:
            assert self._rows is not None
            total = int(getattr(cache, "total", len(tokens)))
            if not self._parts or len(self._parts[-1].count) != total or bool(self._parts[-1].begun[self._rows].any()):
                self._parts.append(_Part.empty(total, len(self.places), self._width, tokens.device))
            self._parts[-1].begun[self._rows] = True
            mask = kwargs.get("attention_mask")
            padded = isinstance(mask, torch.Tensor) and mask.shape == tokens.shape
            for at, row in enumerate(self._rows.tolist()):
                ids = tokens[at][mask[at].bool()] if padded and mask is not None else tokens[at]
                self._parts[-1].said[row] = ids.tolist()

    def hear(self, hidden: torch.Tensor) -> None:
        """What one place says; places speak in order."""
        self._heard.append(hidden[:, -1:] if self._first else hidden)

    def _keep(self) -> None:
        heard, self._heard = self._heard, []
        if len(heard) != len(self.places) or not self._parts or self._tokens is None:
            return
        if self._first:
            said = torch.stack(heard, dim=1)[:, :, -1]  # (rows, places, hidden)
            self._parts[-1].prompt[self._rows] = said.detach().float()
            return
        self._passes.append(heard)
        self._columns.append(self._tokens)
        size = heard[0].numel() * heard[0].element_size() * len(heard)
        if size * len(self._passes) > _HELD:
            self._sum()

    def _sum(self) -> None:
        """Add the kept passes to their rows; a row that has ended is carried on for a while and says nothing."""
        if self._passes:
            part, rows = self._parts[-1], self._rows
            said = torch.stack([torch.stack(heard) for heard in self._passes])[..., -1, :].detach().float()
            fed = torch.stack(self._columns)[..., -1]  # (passes, rows)
            stopped = torch.isin(fed, self._stops).cpu()
            over = (stopped.cumsum(0) > 0) | part.ended[rows]
            part.ended[rows] = over[-1]
            alive = ~over
            part.total[rows] += torch.einsum("sprh,sr->rph", said, alive.to(said.device, said.dtype))
            part.count[rows] += alive.sum(0)
            assert rows is not None
            for at, row in enumerate(rows.tolist()):
                part.said[row] += fed[:, at].cpu()[alive[:, at]].tolist()
        self._passes, self._columns = [], []

    def trace(self) -> Trace:
        """What has been heard so far, in the order of the conversations of each call."""
        self._keep()
        self._sum()
        if not self._parts:
            empty = np.zeros((0, len(self.places), self._width), dtype=np.float32)
            none = np.zeros(0, dtype=np.int64)
            return Trace(self.places, empty, empty, none, (), self._model, "nothing was generated")
        count = torch.cat([p.count for p in self._parts])
        total = torch.cat([p.total for p in self._parts]).cpu()
        answer = torch.where(count[:, None, None] > 0, total / count[:, None, None].clamp(min=1), torch.nan)
        prompt = torch.cat([p.prompt for p in self._parts]).cpu()
        problem = "an adapter acts on the model, which was not there at calibration" if self._adapter else None
        said = tuple(np.array(ids, dtype=np.int64) for part in self._parts for ids in part.said)
        return Trace(self.places, prompt.numpy(), answer.numpy(), count.numpy(), said, self._model, problem)


@dataclass(frozen=True, eq=False)
class _Part:
    """One call of generate."""

    prompt: torch.Tensor  # (answers, places, hidden)
    total: torch.Tensor
    count: torch.Tensor  # (answers,)
    begun: torch.Tensor
    ended: torch.Tensor
    said: list[list[int]]

    @classmethod
    def empty(cls, answers: int, places: int, width: int, device: torch.device) -> _Part:
        made = [torch.zeros(answers, places, width, device=device) for _ in range(2)]
        begun, ended = (torch.zeros(answers, dtype=torch.bool) for _ in range(2))
        return cls(made[0], made[1], torch.zeros(answers, dtype=torch.long), begun, ended, [[] for _ in range(answers)])


@contextlib.contextmanager
def listening(lm: LM, places: Sequence[int]) -> Iterator[Ear]:
    """Listen at some places while the context lasts."""
    ear = Ear(lm, places)
    hear: Callable[[torch.Tensor], None] = ear.hear
    with listen(lm, ear.begin, dict.fromkeys(ear.places, hear)):
        yield ear


def model_digest(lm: LM) -> str:
    """Of all that decides what a model computes, its base weights among it."""
    return sha(lm.fingerprint().to_dict())


# ---------------------------------------------------------------------- judging


@dataclass(frozen=True)
class SteeringVerdict:
    """A statement about one answer.

    Attributes:
        state: CLEAR, ALARM (steered) or INCONCLUSIVE.
        score: see the module's text; None when there is none.
        threshold: at or above which it is an alarm.
        p_value: share of calibration answers, this one counted in, that score as high.
        block: where the push enters: the first block whose residual passes the threshold; None without an alarm.
        strength: length of the residual there, in units of that block's mean activation norm, less what unsteered
            answers have.
        false_alarm_rate: promised per answer; None where nothing is promised.
        reason: one sentence.

    Raises:
        InputError: a CLEAR without a finite score and threshold.
    """

    state: State
    score: float | None
    threshold: float
    p_value: float | None
    block: int | None
    strength: float | None
    false_alarm_rate: float | None
    reason: str

    def __post_init__(self) -> None:
        if self.state == State.CLEAR:
            sound.number("the score of a CLEAR verdict", self.score)
            sound.number("the threshold of a CLEAR verdict", self.threshold)


class Place(NamedTuple):
    """What is known of one block in one window.

    Attributes:
        weights, bias: (hidden, hidden) and (hidden,): the mean after this block from the mean after the one before.
        centre_in: (hidden,) mean input.
        whitening: (rank, hidden); the leverage of an input is the squared length of what this makes of it, centred.
        metric: of the residuals.
        median, spread: of d on answers left out of the regression; spread: from median to 99th percentile.
        norm: mean activation norm of the last prompt token: the unit of strength.
        length: median plain length of the residuals.
    """

    weights: Array
    bias: Array
    centre_in: Array
    whitening: Array
    metric: Metric
    median: float
    spread: float
    norm: float
    length: float

    def residual(self, before: Array, after: Array) -> Array:
        """r of answers (n, hidden)."""
        return np.asarray(after - before @ self.weights - self.bias)

    def leverage(self, before: Array) -> Array:
        """How unlike the calibration answers inputs (n, hidden) are, (n,)."""
        return np.asarray((((before - self.centre_in) @ self.whitening.T) ** 2).sum(axis=1))

    def distance(self, before: Array, after: Array) -> Array:
        """d of answers (n, hidden), (n,)."""
        return np.asarray(self.metric.distance(self.residual(before, after)) / np.sqrt(1 + self.leverage(before)))


@dataclass(frozen=True, eq=False)
class SteeringGuard:
    """A calibrated guard; see the module's text. Make one with `fit_guard` or `load`.

    Attributes:
        places: listening places, -1 first.
        known: by window ("prompt", "answer") and block.
        threshold: of the score.
        false_alarm_rate: promised per answer.
        null_scores: of the calibration answers, sorted.
        null_kinds: (answers,) number of the kind of each of those; one number throughout where kinds were not told.
        fewest, most: answer tokens that calibration answers had.
        vocabulary: (ids,) tokens that the answers of the regressions and their prompts had, sorted.
        strangest: largest share of an answer's and its prompt's tokens, over calibration answers, outside of it.
        model: digest of the model.
        calibrated_on: in words.

    Raises:
        InputError: a field is of another type, not finite or outside its range, shapes do not agree, or the threshold
            is not the one that the calibration scores give.
    """

    places: tuple[int, ...]
    known: Mapping[str, Mapping[int, Place]]
    threshold: float
    false_alarm_rate: float
    null_scores: Array
    null_kinds: NDArray[np.int64]
    fewest: int
    most: int
    vocabulary: Array
    strangest: float
    model: str
    calibrated_on: str

    def __post_init__(self) -> None:
        if not isinstance(self.places, tuple) or len(self.places) < 2 or self.places[0] != -1:
            raise InputError(f"places are {self.places!r}; they must be -1 and then block numbers")
        for block in self.places[1:]:
            sound.whole("a place", block)
        if not self.known or not set(self.known) <= set(_WINDOWS):
            raise InputError(f"windows are {tuple(self.known)}; allowed are {', '.join(_WINDOWS)}")
        width = len(next(iter(next(iter(self.known.values())).values())).bias) if all(self.known.values()) else 0
        for window, blocks in self.known.items():
            if list(blocks) != list(self.places[1:]):
                raise InputError(f"window '{window}' knows blocks {list(blocks)} and listens at {self.places[1:]}")
            for block, place in blocks.items():
                _check_place(f"{window} {block}", place, width)
        sound.array("null_scores", self.null_scores, (None,))
        sound.array("null_kinds", self.null_kinds, (len(self.null_scores),), kind="i", least=0)
        sound.number("false_alarm_rate", self.false_alarm_rate, above=0, below=1)
        sound.number("threshold", self.threshold)
        if not len(self.null_scores) or (np.diff(self.null_scores) < 0).any():
            raise InputError("null_scores must be in ascending order, at least one")
        wanted = _threshold(self.null_scores, self.null_kinds, self.false_alarm_rate)
        if self.threshold != wanted:
            raise InputError(
                f"threshold is {self.threshold:.6g}; the {len(self.null_scores)} calibration answers give {wanted:.6g} "
                f"at a false-alarm rate of {self.false_alarm_rate:g}"
            )
        sound.whole("fewest", self.fewest)
        sound.whole("most", self.most, least=self.fewest)
        sound.array("vocabulary", self.vocabulary, (None,), least=0)
        sound.number("strangest", self.strangest, least=0, most=1)
        sound.text("model", self.model)
        sound.text("calibrated_on", self.calibrated_on, blank=True)

    @contextlib.contextmanager
    def listening(self, lm: LM) -> Iterator[Ear]:
        """Listen while the model generates."""
        with listening(lm, self.places) as ear:
            yield ear

    def lengths(self, trace: Trace) -> dict[tuple[str, int], Array]:
        """Standardised length of the residual by window and block, each (answers,); NaN where there is none."""
        return _lengths(trace, self.places, self.known)

    def scores(self, trace: Trace) -> Array:
        """(answers,) s; NaN where an activation is not finite or no answer token was heard."""
        return _scores(trace, self.places, self.known)

    @property
    def windows(self) -> tuple[str, ...]:
        """Which of "prompt" and "answer" are judged."""
        return tuple(self.known)

    def strangeness(self, trace: Trace) -> Array:
        """(answers,) share of each answer's and its prompt's tokens that the regressions have never met."""
        return _strangeness(trace, self.vocabulary.astype(np.int64))

    def judge(self, trace: Trace) -> tuple[SteeringVerdict, ...]:
        """Judge each answer by itself."""
        refusal = self._refusal(trace)
        if refusal:
            return tuple(self._inconclusive(refusal) for _ in range(len(trace.tokens)))
        lengths, strange = self.lengths(trace), self.strangeness(trace)
        return tuple(self._judge_one(trace, row, lengths, float(strange[row])) for row in range(len(trace.tokens)))

    def judge_model(self, trace: Trace) -> SteeringVerdict:
        """Judge the model from all its answers: steered if more of them alarm than false alarms explain.

        An ALARM needs so many that by chance there would be as many in one model of a hundred; where and how strong
        are medians over the answers that alarmed. No CLEAR rests on less than half of the answers.
        """
        whole = self.judge(trace)
        each = [v for v in whole if v.state is not State.INCONCLUSIVE]
        if not each:
            reason = self._refusal(trace) or "none of the answers could be judged"
            return self._inconclusive(reason)
        alarms = [v for v in each if v.state is State.ALARM]
        chance = float(stats.binom.sf(len(alarms) - 1, len(each), self.false_alarm_rate)) if alarms else 1.0
        share = f"{len(alarms)} of {len(each)} answers alarmed (false alarms: {self.false_alarm_rate:.0%})"
        if not chance <= _ENOUGH:
            unjudged = len(whole) - len(each)
            if not unjudged <= _MOST_UNJUDGED * len(whole):
                return self._inconclusive(f"{share}, but {unjudged} of {len(whole)} answers could not be judged")
            return SteeringVerdict(
                State.CLEAR, len(alarms) / len(each), self.threshold, chance, None, None, _ENOUGH, share
            )
        # The median of two blocks would be no block.
        blocks = sorted(v.block for v in alarms if v.block is not None)
        strength = float(np.median([v.strength for v in alarms if v.strength is not None]))
        return SteeringVerdict(
            State.ALARM,
            len(alarms) / len(each),
            self.threshold,
            chance,
            blocks[len(blocks) // 2],
            strength,
            _ENOUGH,
            share,
        )

    def _judge_one(
        self, trace: Trace, row: int, lengths: Mapping[tuple[str, int], Array], strange: float
    ) -> SteeringVerdict:
        here = {place: float(values[row]) for place, values in lengths.items()}
        if not all(math.isfinite(value) for value in here.values()):
            what = "no token of the answer was heard" if not trace.tokens[row] else "an activation is not finite"
            return self._inconclusive(f"{what}, so nothing can be said")
        if not strange <= self.strangest:
            return self._inconclusive(
                f"{strange:.0%} of the tokens are none that calibration had (at most {self.strangest:.0%} there), so "
                "what the model makes of them is not known"
            )
        top = max(here.values())
        p_value = float((1 + (self.null_scores >= top).sum()) / (1 + len(self.null_scores)))
        tokens = int(trace.tokens[row])
        outside = not self.fewest <= tokens <= self.most
        state = compare(top, self.threshold, outside=outside)
        if state is State.INCONCLUSIVE:
            return self._inconclusive(
                f"the answer has {tokens} tokens and calibration answers had {self.fewest} to {self.most}"
            )
        if state is State.CLEAR:
            reason = f"the score {top:.2f} is below {self.threshold:.2f}"
            return SteeringVerdict(State.CLEAR, top, self.threshold, p_value, None, None, self.false_alarm_rate, reason)
        block, window = min((b, w) for (w, b), value in here.items() if value >= self.threshold)
        at = self.places.index(block)
        heard = getattr(trace, window)[row].astype(np.float64)
        place = self.known[window][block]
        length = float(np.linalg.norm(place.residual(heard[at - 1], heard[at])))
        # Python raises on a square that is too large, and a product becomes infinite.
        strength = math.sqrt(max((length - place.length) * (length + place.length), 0.0)) / place.norm
        reason = (
            f"after block {block} the {window} lies {strength:.2f} mean norms from what the block makes of its input "
            f"(score {top:.2f}, threshold {self.threshold:.2f})"
        )
        promised = None if outside else self.false_alarm_rate
        return SteeringVerdict(State.ALARM, top, self.threshold, p_value, block, strength, promised, reason)

    def _refusal(self, trace: Trace) -> str | None:
        if trace.problem:
            return trace.problem
        if trace.model != self.model:
            return "this guard was calibrated on another model (or on other weights), so nothing can be said"
        if trace.places != self.places:
            return f"the trace was heard at {trace.places} and the guard listens at {self.places}"
        width = len(next(iter(next(iter(self.known.values())).values())).bias)
        wanted = (len(trace.tokens), len(self.places), width)
        if trace.prompt.shape != wanted or trace.answer.shape != wanted or len(trace.said) != len(trace.tokens):
            return f"the trace holds {trace.prompt.shape} and {trace.answer.shape} numbers; it must hold {wanted} twice"
        return None

    def _inconclusive(self, reason: str) -> SteeringVerdict:
        return SteeringVerdict(State.INCONCLUSIVE, None, self.threshold, None, None, None, None, reason)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header.

        Raises:
            InputError: the model is not named by its digest.
            StorageError: the file cannot be written.
        """
        sound.digest("model", self.model)
        arrays: dict[str, Any] = {
            "null_scores": self.null_scores, "null_kinds": self.null_kinds, "vocabulary": self.vocabulary,
        }  # fmt: skip
        numbers: dict[str, Any] = {}
        for window, blocks in self.known.items():
            for block, place in blocks.items():
                key = f"{window}.{block}"
                numbers[key] = [place.median, place.spread, place.norm, place.length, place.metric.floor]
                metric = place.metric
                parts = (
                    place.weights, place.bias, place.centre_in, place.whitening, metric.center, metric.directions,
                    metric.spread,
                )  # fmt: skip
                arrays |= {f"{key}.{name}": part for name, part in zip(_PARTS, parts, strict=True)}
        plain = (
            "places", "threshold", "false_alarm_rate", "fewest", "most", "strangest", "model", "calibrated_on",
        )  # fmt: skip
        header = {name: getattr(self, name) for name in plain} | {"numbers": numbers}
        single = {name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()}
        return write_artifact(path, _KIND, _FORMAT, header, single)

    @classmethod
    def load(cls, path: str | Path) -> SteeringGuard:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, truncated, changed, foreign, of another format version, or what no guard can have.
        """
        remedy = "calibrate the guard again"
        header, found = read_artifact(path, _KIND, _FORMAT, remedy=remedy)

        def make() -> SteeringGuard:
            arrays = {key: value.astype(np.float64) for key, value in found.items()}
            sound.digest("model", header["model"])
            known: dict[str, dict[int, Place]] = {key.split(".")[0]: {} for key in header["numbers"]}
            for key, (median, spread, norm, length, floor) in header["numbers"].items():
                weights, bias, inputs, whitening, center, directions, spreads = (
                    arrays[f"{key}.{name}"] for name in _PARTS
                )
                window, block = key.split(".")
                metric = Metric(center, directions, spreads, floor)
                known[window][int(block)] = Place(
                    weights, bias, inputs, whitening, metric, median, spread, norm, length
                )
            return cls(
                places=tuple(header["places"]), known=known, threshold=header["threshold"],
                false_alarm_rate=header["false_alarm_rate"], null_scores=arrays["null_scores"],
                null_kinds=arrays["null_kinds"].astype(np.int64), fewest=header["fewest"],
                most=header["most"], vocabulary=arrays["vocabulary"], strangest=header["strangest"],
                model=header["model"], calibrated_on=header["calibrated_on"],
            )  # fmt: skip

        return made(path, "steering guard", remedy, make)


_PARTS = ("weights", "bias", "centre_in", "whitening", "center", "directions", "spread")


def _check_place(what: str, place: Place, width: int) -> None:
    sound.array(f"{what}: weights", place.weights, (width, width))
    sound.array(f"{what}: bias", place.bias, (width,))
    sound.array(f"{what}: centre_in", place.centre_in, (width,))
    sound.array(f"{what}: whitening", place.whitening, (None, width))
    sound.array(f"{what}: center", place.metric.center, (width,))
    sound.number(f"{what}: floor", place.metric.floor, above=0)
    sound.number(f"{what}: median", place.median)
    sound.number(f"{what}: spread", place.spread, above=0)
    sound.number(f"{what}: norm", place.norm, above=0)
    sound.number(f"{what}: length", place.length, least=0)


def _lengths(
    trace: Trace, places: Sequence[int], known: Mapping[str, Mapping[int, Place]]
) -> dict[tuple[str, int], Array]:
    found = {}
    for window, blocks in known.items():
        heard = getattr(trace, window).astype(np.float64)  # (answers, places, hidden)
        for at, block in enumerate(places[1:]):
            place = blocks[block]
            with np.errstate(all="ignore"):
                distance = place.distance(heard[:, at], heard[:, at + 1])
            found[window, block] = (distance - place.median) / place.spread
    return found


def _scores(trace: Trace, places: Sequence[int], known: Mapping[str, Mapping[int, Place]]) -> Array:
    return np.asarray(np.max(np.stack(list(_lengths(trace, places, known).values())), axis=0))


def _strangeness(trace: Trace, vocabulary: NDArray[np.int64]) -> Array:
    return np.array([1.0 - float(np.isin(ids, vocabulary).mean()) if len(ids) else 1.0 for ids in trace.said])


def _threshold(null: Array, kinds: NDArray[np.int64], rate: float) -> float:
    """Just above the largest of the kinds' (1 - a) quantiles, in the precision of the file."""
    quantiles = []
    for kind in np.unique(kinds):
        of_kind = null[kinds == kind]
        rank = math.ceil((1 - rate) * (len(of_kind) + 1) - 1e-9)
        if rank > len(of_kind):
            raise InputError(f"{len(of_kind)} calibration answers cannot promise a false-alarm rate of {rate:g}")
        quantiles.append(float(of_kind[rank - 1]))
    return float(np.nextafter(np.float32(max(quantiles)), np.float32(np.inf)))


# ---------------------------------------------------------------------- calibration


def fit_guard(
    lm: LM,
    conversations: Sequence[Sequence[Message]],
    *,
    false_alarm_rate: float = 0.01,
    kinds: Sequence[Sequence[str]] | None = None,
    windows: Sequence[str] = _WINDOWS,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 60,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    calibrated_on: str | None = None,
) -> SteeringGuard:
    """Calibrate a guard on the answers that a model gives to benign prompts, unsteered.

    Without kinds, two answers of three teach the regressions and their residuals; the rest, drawn at random, set the
    threshold. With kinds, each kind is judged by what was learnt on the others.

    Args:
        lm: the model, without adapter.
        conversations: as many kinds of prompts as the model will meet; several times the model's width, and at least
            3 / false_alarm_rate.
        false_alarm_rate: a, per answer.
        kinds: of each conversation, its kind (such as its subject), and whatever else may be new about a prompt (such
            as the system prompt's purpose; "" for nothing). One value of each further label is left out along with
            each kind. At least 3 kinds of 1 / false_alarm_rate answers.
        windows: what is judged: "answer", its mean over tokens; "prompt", the last token of the prompt, which alone
            sees a push that acts on the prompt only, and which prompts of new kinds easily make look pushed.
        layers: blocks to listen at; by default all.
        max_new_tokens, temperature, seed, batch_size: of generation.
        calibrated_on: the prompts in words.

    Raises:
        InputError: too few conversations or kinds, an unknown window, or an adapter is on.
        NumericalError: activations are not finite.
    """
    if kinds is not None and len(kinds) != len(conversations):
        raise InputError(f"got {len(kinds)} kinds for {len(conversations)} conversations; give one for each")
    if adapter_state(lm) == "active":
        raise InputError("an adapter acts on this model; calibrate the guard on the model that will serve, merged")
    places = (-1, *(range(lm.n_layers) if layers is None else sorted(set(layers))))
    with listening(lm, places) as ear:
        lm.generate(
            conversations, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
        )
    text = calibrated_on or f"{lm.name}: answers to {len(conversations)} prompts at temperature {temperature:g}"
    return fit_trace(
        ear.trace(), false_alarm_rate=false_alarm_rate, kinds=kinds, windows=windows, seed=seed, calibrated_on=text
    )


def fit_trace(
    trace: Trace,
    *,
    false_alarm_rate: float,
    kinds: Sequence[Sequence[str]] | None = None,
    windows: Sequence[str] = _WINDOWS,
    seed: int = 0,
    calibrated_on: str = "",
) -> SteeringGuard:
    """`fit_guard` on answers that have been heard."""
    if not windows or not set(windows) <= set(_WINDOWS):
        raise InputError(f"the guard judges windows of {_WINDOWS}, got {tuple(windows)}")
    if kinds is not None:
        heard = [kind for kind, tokens in zip(kinds, trace.tokens, strict=True) if tokens > 0]
        return _fit_kinds(trace.take(trace.tokens > 0), heard, tuple(windows), false_alarm_rate, calibrated_on)
    trace = trace.take(trace.tokens > 0)
    n = len(trace.tokens)
    calibration = np.zeros(n, dtype=bool)
    calibration[np.random.default_rng(seed).permutation(n)[: n // 3]] = True
    needed = math.ceil(1 / false_alarm_rate - 1e-9) - 1 if 0 < false_alarm_rate < 1 else 0
    if not needed or calibration.sum() < needed:
        raise InputError(
            f"a false-alarm rate of {false_alarm_rate:g} needs at least {needed} calibration answers and got "
            f"{calibration.sum()}, a third of {n} that were not empty; give more conversations, or a rate in (0, 1)"
        )
    _check_finite(trace)
    learn, rest = trace.take(~calibration), trace.take(calibration)
    norms = np.linalg.norm(learn.prompt.astype(np.float64), axis=2).mean(axis=0)  # (places,)
    known = {
        window: {
            block: _place(getattr(learn, window), at, float(norms[at + 1])) for at, block in enumerate(trace.places[1:])
        }
        for window in windows
    }
    tokens, met = trace.tokens, np.unique(np.concatenate(learn.said))
    null = np.sort(_scores(rest, trace.places, known))
    one_kind = np.zeros(len(null), dtype=np.int64)
    return SteeringGuard(
        trace.places, known, _threshold(null, one_kind, false_alarm_rate), false_alarm_rate, null, one_kind,
        int(tokens.min()), int(tokens.max()), met.astype(np.float64), float(_strangeness(rest, met).max()),
        trace.model, calibrated_on,
    )  # fmt: skip


def _check_finite(trace: Trace) -> None:
    if not (np.isfinite(trace.prompt).all() and np.isfinite(trace.answer).all()):
        raise NumericalError("activations of the calibration answers are not finite; the model has diverged")


class _Fold(NamedTuple):
    """A kind that is left out: the answers that teach, and those of the kind."""

    kind: str
    learn: NDArray[np.bool_]
    test: NDArray[np.bool_]


def _folds(kinds: Sequence[Sequence[str]], rate: float) -> list[_Fold]:
    """One fold per kind; a value of each further label, in turn, is not learnt from either."""
    first = np.array([kind[0] for kind in kinds])
    names = sorted(set(first.tolist()))
    needed = math.ceil(1 / rate - 1e-9) - 1 if 0 < rate < 1 else 0
    fewest = min((int((first == name).sum()) for name in names), default=0)
    if len(names) < 3 or not needed or fewest < needed:
        raise InputError(
            f"a false-alarm rate of {rate:g} by kinds needs at least 3 kinds of at least {needed} answers and got "
            f"{len(names)}, the smallest of {fewest}; give more conversations, fewer kinds, or a rate in (0, 1)"
        )
    width = max(len(kind) for kind in kinds)
    others = [np.array([kind[at] if len(kind) > at else "" for kind in kinds]) for at in range(1, width)]
    made = []
    for number, name in enumerate(names):
        test = first == name
        out = test.copy()
        for labels in others:
            values = sorted(set(labels.tolist()) - {""})
            if values:
                out |= labels == values[number % len(values)]
        made.append(_Fold(name, ~out, test))
    return made


def _fit_kinds(
    trace: Trace, kinds: Sequence[Sequence[str]], windows: tuple[str, ...], rate: float, calibrated_on: str
) -> SteeringGuard:
    """Regressions on all answers; residuals, metric and threshold from kinds that were left out."""
    _check_finite(trace)
    folds = _folds(kinds, rate)
    norms = np.linalg.norm(trace.prompt.astype(np.float64), axis=2).mean(axis=0)  # (places,)
    known: dict[str, dict[int, Place]] = {window: {} for window in windows}
    null = np.full(len(trace.tokens), -np.inf)
    for window in windows:
        for at, block in enumerate(trace.places[1:]):
            place, left_out = _place_by_kinds(getattr(trace, window), at, float(norms[at + 1]), folds)
            known[window][block] = place
            null = np.maximum(null, left_out)
    numbers = np.zeros(len(null), dtype=np.int64)
    for number, fold in enumerate(folds):
        numbers[fold.test] = number
    order = np.argsort(null, kind="stable")
    null, numbers = null[order], numbers[order]
    threshold = _threshold(null, numbers, rate)
    strangest = 0.0
    for fold in folds:
        met = np.unique(np.concatenate(trace.take(fold.learn).said))
        strangest = max(strangest, *(1.0 - float(np.isin(ids, met).mean()) for ids in trace.take(fold.test).said))
    tokens = trace.tokens
    return SteeringGuard(
        trace.places, known, threshold, rate, null, numbers, int(tokens.min()), int(tokens.max()),
        np.unique(np.concatenate(trace.said)).astype(np.float64), strangest, trace.model,
        calibrated_on + f", by {len(folds)} kinds" if calibrated_on else "",
    )  # fmt: skip


def _place_by_kinds(
    learn: NDArray[np.float32], at: int, norm: float, folds: Sequence[_Fold]
) -> tuple[Place, NDArray[np.float64]]:
    """The block after place `at` fitted on (answers, places, hidden), and each answer's score by what the other kinds
    teach: regression, metric and all."""
    before, after = learn[:, at].astype(np.float64), learn[:, at + 1].astype(np.float64)
    left_out = np.empty_like(after)
    for fold in folds:
        weights, bias = _ridge(before[fold.learn], after[fold.learn])
        left_out[fold.test] = after[fold.test] - before[fold.test] @ weights - bias
    distance = np.empty(len(after))
    for fold in folds:
        distance[fold.test] = _metric(left_out[~fold.test]).distance(left_out[fold.test])
    median, high = (float(x) for x in np.percentile(distance, [50, 99]))
    spread = high - median or 1e-6
    weights, bias = _ridge(before, after)
    length = float(np.median(np.linalg.norm(left_out, axis=1)))
    place = Place(
        weights, bias, before.mean(axis=0), np.zeros((1, before.shape[1])), _metric(left_out), median, spread, norm,
        length,
    )  # fmt: skip
    return place, (distance - median) / spread


def _ridge(before: Array, after: Array) -> tuple[Array, Array]:
    """Weights and bias."""
    mean_in, mean_out = before.mean(axis=0), after.mean(axis=0)
    left, singular, right = np.linalg.svd(before - mean_in, full_matrices=False)
    penalty = _RIDGE * float((singular**2).mean()) or 1.0
    weights = right.T @ ((singular / (singular**2 + penalty))[:, None] * (left.T @ (after - mean_out)))
    return weights, mean_out - mean_in @ weights


def _metric(residuals: Array) -> Metric:
    center = residuals.mean(axis=0)
    plain = residuals - center
    _, spread, directions = np.linalg.svd(plain / math.sqrt(len(plain)), full_matrices=False)
    return Metric(center, directions, spread, _FLOOR * float(np.sqrt((plain**2).mean())) or 1e-6)


def _place(learn: NDArray[np.float32], at: int, norm: float) -> Place:
    """Fit the block after place `at` on (answers, places, hidden): ridge regression, and what it leaves over of each
    answer when that answer is left out (closed form)."""
    before, after = learn[:, at].astype(np.float64), learn[:, at + 1].astype(np.float64)
    n, mean_in, mean_out = len(before), before.mean(axis=0), after.mean(axis=0)
    left, singular, right = np.linalg.svd(before - mean_in, full_matrices=False)
    # The last prompt token enters block 0 the same in every prompt: nothing to learn from, and no division by zero.
    penalty = _RIDGE * float((singular**2).mean()) or 1.0
    share = singular**2 / (singular**2 + penalty)
    taught = left.T @ (after - mean_out)
    weights = right.T @ ((singular / (singular**2 + penalty))[:, None] * taught)
    own = (left**2 * share).sum(axis=1) + 1 / n  # leverage of each answer on its own prediction
    left_out = (after - mean_out - left @ (share[:, None] * taught)) / np.maximum(1 - own, 0.05)[:, None]
    center = left_out.mean(axis=0)
    # Left-out residuals vary by sqrt(1 + leverage); the metric is of what they are without it.
    plain = (left_out - center) * np.sqrt(np.maximum(1 - own, 0.05))[:, None]
    _, spread, directions = np.linalg.svd(plain / math.sqrt(n), full_matrices=False)
    metric = Metric(center, directions, spread, _FLOOR * float(np.sqrt((plain**2).mean())) or 1e-6)
    whitening = right / np.sqrt(singular**2 + penalty)[:, None]
    distance = metric.distance(left_out) * np.sqrt(np.maximum(1 - own, 0.05))
    # The tail and not the quartiles: blocks differ in how heavy theirs is, and one threshold serves all.
    median, high = np.percentile(distance, [50, 99])
    length = float(np.median(np.linalg.norm(left_out, axis=1)))
    bias = mean_out - mean_in @ weights
    return Place(
        weights, bias, mean_in, whitening, metric, float(median), float(high - median) or 1e-6, norm, length
    )  # fmt: skip
