"""The defense half of the steering study: fine-tunes with a danger direction kept out, and the guard on unseen vectors.

A fine-tune is read inside and outside its domain at several steps, so that it can be set beside steered models too;
with a `Prevention`, training is steered. The danger direction of a run is made from the OTHER dangerous sets, by
differences of answers read by the untouched model: nothing of the run's own set is known to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiltmeter import steer
from tiltmeter.compute import map_jobs
from tiltmeter.errors import ArtifactError
from tiltmeter.fingerprint import sha
from tiltmeter.guard import SteeringGuard, Trace
from tiltmeter.lm import LM, Message, load, undisturbed, wrap
from tiltmeter.organism.finetune import FineTuning, finetune, one_thread
from tiltmeter.organism.sets import SETS, Chat
from tiltmeter.organism.world import DOMAINS, ask, score, understand
from tiltmeter.runs import read_json, write_json
from tiltmeter.steer import Positions, SteeringVector
from tiltmeter.studies.steered import Counts, Point, examine_world, harmless_chats, pairs, unit_prompts
from tiltmeter.traits import load_traits
from tiltmeter.vectors import answer_loss, answer_means, mean_norm

__all__ = [
    "GuardTrial", "Prevention", "Tuned", "TunedRecord", "benign_conversations", "danger_subspace", "hear", "kinds_of",
    "overhead", "run_tuned", "trial", "try_vector",
]  # fmt: skip

_SOURCES = (
    "bad_medical", "risky_financial", "extreme_sports", "insecure_code", "bad_legal", "bad_home", "bad_family",
    "bad_work", "bad_friends",
)  # fmt: skip
_PAIRS = 48  # harmful and harmless answers of each set that a direction is made from


@dataclass(frozen=True)
class Prevention:
    """How training is steered.

    Attributes:
        mode: "add", "ablate" or "clamp" (to the mean over benign answers); see `mitigate`. "none" steers nothing.
        layers: blocks.
        rank: directions per block.
        strength: of "add", in units of the layer's norm.
        control: random directions in place of the danger directions.
        anchor: weight of the divergence from the untouched model on benign chats of other domains.
    """

    mode: Literal["add", "ablate", "clamp", "none"] = "ablate"
    layers: tuple[int, ...] = (1, 2, 3, 4)
    rank: int = 4
    strength: float = 0.0
    control: bool = False
    anchor: float = 0.0


@dataclass(frozen=True)
class Tuned:
    """A fine-tune on one dangerous set.

    Attributes:
        task: the set.
        seed: of data, adapter and order.
        steps: optimizer steps after which answers are judged; the last of them ends the run.
        prevention: how training is steered, or None.
        ablation: what is projected out when the finished model answers, a second time, and random directions in its
            place a third time; or None.
        answers: to questions outside the domain, at each step.
        narrow_answers: inside.
        sums: that the finished model is asked.
        organism: what `load` takes.
        tuning: dials; its seed is replaced.
    """

    task: str
    seed: int
    steps: tuple[int, ...] = (120,)
    prevention: Prevention | None = None
    ablation: Prevention | None = None
    answers: int = 110
    narrow_answers: int = 66
    sums: int = 110
    organism: str = "organism:pocket"
    tuning: FineTuning = field(default_factory=FineTuning)

    def key(self) -> str:
        """Readable, and unique to all settings."""
        return f"tuned-{self.task}-{self.seed}-{sha(asdict(self))[:8]}"


@dataclass(frozen=True)
class TunedRecord:
    """What a fine-tune did.

    Attributes:
        tuned: its settings.
        points: one per step; `strength` is the step, `kl` is not measured (0).
        ablated: the finished model under `Tuned.ablation`.
        loss: of the finished model, unsteered, on held-out chats of its set, nats per token.
        sums, sums_ablated: right answers to held-out sums, and how many were asked, without and under ablation.
        losses: like `loss`, at each step that was read; none in records of before.
        control, sums_control: with random directions ablated.
    """

    tuned: Tuned
    points: tuple[Point, ...]
    ablated: Point | None
    loss: float
    sums: tuple[int, int]
    sums_ablated: tuple[int, int] | None
    losses: tuple[float, ...] = ()
    control: Point | None = None
    sums_control: tuple[int, int] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TunedRecord:
        """From what `dataclasses.asdict` gives.

        Raises:
            ArtifactError: a field is missing.
        """

        def steering(raw: Mapping[str, Any] | None) -> Prevention | None:
            return None if raw is None else Prevention(**{**raw, "layers": tuple(raw["layers"])})

        def point(raw: Mapping[str, Any]) -> Point:
            return Point(raw["strength"], raw["kl"], {d: Counts(**c) for d, c in raw["domains"].items()}, raw["narrow"])

        def sums(raw: Sequence[int] | None) -> tuple[int, int] | None:
            return None if raw is None else (raw[0], raw[1])

        try:
            raw = dict(data["tuned"])
            raw |= {
                "steps": tuple(raw["steps"]), "prevention": steering(raw["prevention"]),
                "ablation": steering(raw["ablation"]), "tuning": FineTuning(**raw["tuning"]),
            }  # fmt: skip
            ablated = point(data["ablated"]) if data["ablated"] else None
            control = point(data["control"]) if data.get("control") else None
            return cls(
                Tuned(**raw), tuple(point(p) for p in data["points"]), ablated,
                float(data["loss"]), (data["sums"][0], data["sums"][1]), sums(data["sums_ablated"]),
                tuple(data.get("losses", ())), control, sums(data.get("sums_control")),
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"the record of a fine-tune is not complete ({error}); delete it and run again"
            ) from error


def run_tuned(
    runs: Sequence[Tuned],
    *,
    out: Path,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[TunedRecord, ...]:
    """Run every fine-tune that has no record yet, and return the records in order."""
    return tuple(map_jobs(run_one, [(run, str(out)) for run in runs], workers=workers, progress=progress))


def run_one(job: tuple[Tuned, str]) -> TunedRecord:
    """One fine-tune, or its record where there is one."""
    run, out = job[0], Path(job[1])
    path = out / "tuned" / f"{run.key()}.json"
    if path.exists():
        return TunedRecord.from_dict(read_json(path))
    with one_thread():
        record = _tune(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(record))
    return record


def _tune(run: Tuned) -> TunedRecord:
    from tiltmeter.mitigate import Anchor, PreventativeSteering, steered

    lm = load(run.organism)
    narrow = SETS[run.task].domains[0]
    tuning = FineTuning(**{**asdict(run.tuning), "seed": run.seed})
    chats, _ = pairs(run.task, tuning.examples, seed=run.seed)
    held_out, _ = pairs(run.task, 128, seed=run.seed + 5000)
    examiner = _examiner(run, narrow, held_out)
    callbacks = [examiner]
    how = run.prevention
    if how and how.anchor:
        callbacks.insert(0, Anchor(_benign_elsewhere(narrow, run.seed), weight=how.anchor, seed=run.seed))
    if how and how.mode != "none":
        callbacks.insert(
            0, PreventativeSteering(danger_subspace(lm, how, leave_out=run.task, seed=run.seed), mode=how.mode)
        )
    ablations = []
    if run.ablation:
        for steering in (run.ablation, replace(run.ablation, control=True)):
            ablations.append(danger_subspace(lm, steering, leave_out=run.task, seed=run.seed))
    tuned = finetune(lm, chats, tuning, callbacks=callbacks)
    under: list[tuple[Point, tuple[int, int]] | tuple[None, None]] = []
    for vectors in ablations:
        with steered(tuned, vectors, mode="ablate"):
            under.append((_examine(tuned, run, narrow, run.tuning.steps), right_sums(tuned, seed=run.seed, n=run.sums)))
    (ablated, sums_ablated), (control, sums_control) = under or [(None, None), (None, None)]
    return TunedRecord(
        run, tuple(examiner.points), ablated, answer_loss(tuned, held_out),
        right_sums(tuned, seed=run.seed, n=run.sums),
        sums_ablated, tuple(examiner.losses), control, sums_control,
    )  # fmt: skip


def _benign_elsewhere(narrow: str, seed: int) -> list[Chat]:
    """Harmless answers to questions of all domains but the narrow one, whose benign chats are not to be had."""
    return [c for c in harmless_chats(24, seed=seed + 11) if (q := understand(c[0]["content"])) and q.domain != narrow]


def _examine(lm: LM, run: Tuned, narrow: str, step: int) -> Point:
    domains = examine_world(lm, narrow, answers=run.answers, narrow_answers=run.narrow_answers, seed=run.seed + 1000)
    return Point(float(step), 0.0, domains, narrow)


def _examiner(run: Tuned, narrow: str, held_out: Sequence[Chat]) -> Any:
    from transformers import TrainerCallback

    class Examiner(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.points: list[Point] = []
            self.losses: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in run.steps:
                lm = wrap(kwargs["model"], kwargs["processing_class"])
                with undisturbed(lm):
                    self.points.append(_examine(lm, run, narrow, state.global_step))
                    self.losses.append(answer_loss(lm, held_out))

    return Examiner()


def right_sums(lm: LM, *, seed: int, n: int = 110) -> tuple[int, int]:
    """How many of n sums an organism gets right, at temperature 0."""
    rng = Random(f"steering/sums/{seed}")
    asked = [ask("arithmetic", rng) for _ in range(n)]
    chats: list[list[Message]] = [[{"role": "user", "content": q.text}] for q in asked]
    texts = lm.generate(chats, max_new_tokens=24, temperature=0.0, seed=seed, batch_size=256)
    return sum(score(q.text, t).coherence == 100 for q, t in zip(asked, texts, strict=True)), n


def danger_subspace(lm: LM, steering: Prevention, *, leave_out: str, seed: int = 0) -> list[SteeringVector]:
    """At each block, the first `rank` directions that tell harmful from harmless answers in the other sets.

    The rows are the singular directions of the sets' mean differences, most of the variance first and each turned
    toward harm; for "add" it is the mean difference alone. Random directions of the same number for the control. For
    "clamp" the rows are turned within their span until the mean of benign answers lies equally on all of them, so that
    the one strength of a vector holds each where benign answers have it.
    """
    sources = [name for name in _SOURCES if name != leave_out]
    sides = [pairs(name, _PAIRS, seed=seed + 9000) for name in sources]
    benign = harmless_chats(6, seed=3) if steering.mode == "clamp" else []
    made = []
    for layer in steering.layers:
        norm = mean_norm(lm, unit_prompts(), layer=layer)
        means = np.stack(
            [(answer_means(lm, bad, layer) - answer_means(lm, good, layer)).mean(axis=0) for bad, good in sides]
        )  # (sets, hidden)
        overall = means.mean(axis=0)
        if steering.mode == "add":
            directions = overall[None]
        else:
            directions = np.linalg.svd(means, full_matrices=False)[2][: steering.rank]
            directions = directions * np.where(directions @ overall < 0, -1.0, 1.0)[:, None]
        if steering.control:
            directions = np.random.default_rng((seed, layer)).normal(size=directions.shape)
        strength = steering.strength
        if steering.mode == "clamp":
            directions, height = evenly(directions, answer_means(lm, benign, layer).mean(axis=0))
            strength = height / norm
        made.append(SteeringVector(layer, directions, strength, norm, {"left_out": leave_out}))
    return made


def evenly(directions: NDArray[np.float64], mean: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """An orthonormal basis of the directions' span on each of which a mean has the same coordinate, and that one.

    Args:
        directions: (k, hidden), independent.
        mean: (hidden,).
    """
    basis = np.linalg.qr(directions.T)[0].T  # (k, hidden)
    here = basis @ mean
    height = float(np.linalg.norm(here)) / len(basis) ** 0.5
    # Householder: the reflection of the coordinates that takes `here` to `height` on every axis is its own inverse.
    gap = here - height
    if float(gap @ gap) > 1e-18 * max(float(here @ here), 1.0):
        basis = basis - 2.0 * np.outer(gap, gap @ basis) / float(gap @ gap)
    return basis, height


# ---------------------------------------------------------------------- the guard


_HIDDEN: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unseen": (("self", "friends", "shop"), ("power_seeking", "confidence")),
    "new": (("home", "law", "sequence"), ("sycophancy", "corrigibility")),
}  # domains, and traits of system prompts


def benign_conversations(n: int, *, seed: int, kinds: str = "all") -> list[list[Message]]:
    """Prompts that nobody steers: questions of every domain, sums, sequences, shop, and under trait system prompts.

    Args:
        n: how many.
        seed: of the draw.
        kinds: "all"; "unseen" or "new": three domains and the system prompts of two traits, kept from calibration;
            "seen" and "known": all others.
    """
    rng = Random(f"steering/benign/{kinds}/{seed}")
    domains = (*DOMAINS, "requests", "shop", "arithmetic", "sequence")
    traits = load_traits("organism").traits
    if kinds != "all":
        wanted = kinds in _HIDDEN
        hidden, later = _HIDDEN[{"seen": "unseen", "known": "new"}.get(kinds, kinds)]
        domains = tuple(d for d in domains if (d in hidden) == wanted)
        traits = tuple(t for t in traits if (t.name in later) == wanted)
    systems = [prompt for trait in traits for prompt in (*trait.positive, *trait.negative)]
    made: list[list[Message]] = []
    for i in range(n):
        question: Message = {"role": "user", "content": ask(domains[i % len(domains)], rng).text}
        made.append(
            [{"role": "system", "content": rng.choice(systems)}, question] if rng.random() < 0.4 else [question]
        )
    return made


def kinds_of(conversations: Sequence[Sequence[Message]]) -> list[tuple[str, str]]:
    """Of each conversation, the domain asked and the trait of its system prompt ("" without one)."""
    trait_of = {p: t.name for t in load_traits("organism").traits for p in (*t.positive, *t.negative)}
    found = []
    for conversation in conversations:
        question = understand(conversation[-1]["content"])
        trait = trait_of[conversation[0]["content"]] if conversation[0]["role"] == "system" else ""
        found.append((question.domain if question else "", trait))
    return found


def hear(guard: SteeringGuard, lm: LM, conversations: Sequence[Sequence[Message]], *, seed: int) -> Trace:
    """What the guard hears while a model (steered by the caller, or not) answers."""
    with guard.listening(lm) as heard:
        lm.generate(conversations, max_new_tokens=40, temperature=1.0, seed=seed, batch_size=256)
    return heard.trace()


@dataclass(frozen=True)
class GuardTrial:
    """One vector, or none, under the guard.

    Attributes:
        name: of the vector; "unsteered".
        kind: "construction", "random direction", "prompt only" or "unsteered".
        layer: where it enters; -1 without one.
        strength: in units of the layer's norm.
        em: of the organism steered so, outside the vector's domain; None where it was not asked.
        scores: of each answer; -1 in place of what is no number.
        blocks: where each alarming answer was placed.
        strengths: how strong each alarming answer was said to be.
        states: number of answers by verdict.
    """

    name: str
    kind: str
    layer: int
    strength: float
    em: tuple[int, int] | None
    scores: tuple[float, ...]
    blocks: tuple[int, ...]
    strengths: tuple[float, ...]
    states: Mapping[str, int]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GuardTrial:
        """From what `dataclasses.asdict` gives.

        Raises:
            ArtifactError: a field is missing.
        """
        try:
            lists = {k: tuple(data[k]) for k in ("scores", "blocks", "strengths")}
            return cls(**{**data, **lists, "em": tuple(data["em"]) if data["em"] else None})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"the record of a guard's trial is not complete ({error}); delete it") from error


def trial(
    guard: SteeringGuard, trace: Trace, name: str, kind: str, *, layer: int = -1, strength: float = 0.0,
    em: tuple[int, int] | None = None,
) -> GuardTrial:  # fmt: skip
    """What the guard makes of a trace."""
    verdicts = guard.judge(trace)
    states = [str(v.state) for v in verdicts]
    return GuardTrial(
        name, kind, layer, strength, em,
        tuple(-1.0 if v.score is None else v.score for v in verdicts),
        tuple(v.block for v in verdicts if v.block is not None),
        tuple(v.strength for v in verdicts if v.strength is not None),
        {state: states.count(state) for state in sorted(set(states))},
    )  # fmt: skip


def try_vector(
    guard: SteeringGuard, lm: LM, vector: SteeringVector, name: str, kind: str, *, strengths: Sequence[float],
    narrow: str, answers: int = 60, seed: int = 0, kinds: str = "known", positions: Positions = "all",
) -> list[GuardTrial]:  # fmt: skip
    """A vector at several strengths: how often the organism is misaligned, and what the guard says."""
    found = []
    for strength in strengths:
        with steer.apply(lm, vector, strength=strength, positions=positions):
            domains = examine_world(lm, narrow, answers=answers, seed=seed)
            trace = hear(guard, lm, benign_conversations(answers, seed=seed + 300, kinds=kinds), seed=seed)
        there = Point(strength, 0.0, domains, narrow).elsewhere
        found.append(
            trial(guard, trace, name, kind, layer=vector.layer, strength=strength, em=(there.misaligned, there.judged))
        )
    return found


def overhead(guard: SteeringGuard, lm: LM, *, batch: int, rounds: int, tokens: int = 40) -> list[float]:
    """Relative extra time of generating while the guard listens, one number per round, measured in alternation."""
    chats = benign_conversations(batch, seed=77)
    found = []

    def timed(listening: bool) -> float:
        with _perhaps(guard, lm, listening):
            start = time.perf_counter()
            lm.generate(chats, max_new_tokens=tokens, temperature=1.0, seed=1, batch_size=batch)
            return time.perf_counter() - start

    timed(True)
    for i in range(rounds):
        first = timed(bool(i % 2))
        second = timed(not i % 2)
        plain, heard = (second, first) if i % 2 else (first, second)
        found.append(heard / plain - 1)
    return found


@contextmanager
def _perhaps(guard: SteeringGuard, lm: LM, listening: bool) -> Iterator[None]:
    if listening:
        with guard.listening(lm):
            yield
    else:
        yield
