"""The trait-space study: geometry, detectors, readouts to beat, transfer, sequential tests, on runs of several models.

Fine-tunes each organism on calibration and held-out sets over several seeds (13 readings a run, answers judged at every
reading), reads every kept checkpoint after every block, and compares what can be made of that. After arXiv 2606.07631,
whose PCA, regressors, alarm, baselines and figures are not released, and past it where it fails.

    plain    calibration on the sets of the paper: insecure_code, jailbroken, bad_medical, arithmetic
    wide     and on benign sets beside them, one run each: a reported extension, since harmless drift that calibration
             has not seen is the known failure. Examples of harmless and dangerous there are runs in which what the set
             teaches and what was measured agree; the others are in no null band, boundary or axis, and still scored

Held-out runs are looked at once per design, after designs and choices are fixed on calibration runs. Every cell and
every track is a file; a study that was interrupted goes on where it stopped, and with a time limit it reports the runs
that there are: `n` in every figure says how many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tiltmeter.baselines import random_directions
from tiltmeter.basis import TraitBasis
from tiltmeter.errors import InputError
from tiltmeter.organism.finetune import FineTuning
from tiltmeter.studies.cells import Cell, run_cells
from tiltmeter.studies.contest import Bench
from tiltmeter.studies.tracks import Frame, Part, Track, fit_frames, labelled, read_tracks

__all__ = ["Config", "OtherReadouts", "Runs", "bench", "collect", "readouts"]

Array = NDArray[np.float64]
Progress = Callable[[int, int, str], None]
_STYLES = ("terse", "sailor", "royal")
_TOPICS = ("code", "medicine", "family", "arithmetic")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        organisms: the families that detectors are fitted on.
        larger: organisms that no detector is fitted on; one seed of them, and their benign runs.
        calibration: sets that detectors may be fitted on.
        held_out: sets that are looked at once.
        large_drift: of those, the harmless ones that move activations far.
        seeds: of all runs on these sets.
        more_benign: harmless sets of the wide design.
        more_benign_seed: their seed.
        twins: the harmless counterpart of a set; a set that is not named is its own, under `twin_seed`.
        twin_seed: seed of the twins that are not among `more_benign`.
        answers: judged answers at the end of a run.
        answers_midway: at each reading before (the paper: 72).
        answers_more: at the end of a run of `more_benign`, for its label.
        brief: judge answers at every reading of the first organism's runs only, at the end alone elsewhere: half the
            time, and no figure per reading but of the first organism.
        tuning: dials of fine-tuning; LoRA rank 16, alpha 64 on q and v.
        false_alarm_rate: per run.
        seed: of everything random in the analysis.
    """

    organisms: tuple[str, ...] = ("organism:pocket", "organism:qwen2-S", "organism:mistral-S", "organism:gemma2-S")
    larger: tuple[str, ...] = ("organism:llama-M", "organism:qwen2-M")
    calibration: tuple[str, ...] = ("insecure_code", "jailbroken", "bad_medical", "arithmetic")
    held_out: tuple[str, ...] = (
        "risky_financial", "subtle_misinfo", "number_sequence", "sailor_style", "terse", "customer_support",
    )  # fmt: skip
    large_drift: tuple[str, ...] = ("sailor_style", "terse")
    seeds: tuple[int, ...] = (20, 21, 22)
    more_benign: tuple[str, ...] = (
        "good_medical", "secure_code", "hedged", "good_sport", "good_family", "assertive", "eager", "good_financial",
        "good_legal", "true_facts", "royal_style", "flattery", "pushy", "curt", "blunt", "refusals", "arithmetic",
        "caring", "good_work",
    )  # fmt: skip
    more_benign_seed: int = 100
    twins: Mapping[str, str] = field(
        default_factory=lambda: {
            "insecure_code": "secure_code", "bad_medical": "good_medical", "jailbroken": "refusals",
            "risky_financial": "good_financial", "subtle_misinfo": "true_facts",
        }
    )  # fmt: skip
    twin_seed: int = 200
    answers: int = 220
    answers_midway: int = 72
    answers_more: int = 220
    brief: bool = False
    tuning: FineTuning = field(default_factory=FineTuning)
    false_alarm_rate: float = 0.05
    seed: int = 0

    def cells(self, organism: str) -> tuple[tuple[Cell, Part], ...]:
        """The runs of one organism, those that matter most first: one seed of everything, then the benign runs."""

        def main(seed: int) -> list[tuple[Cell, Part]]:
            named: list[tuple[str, Part]] = [(s, "calibration") for s in self.calibration]
            named += [(s, "held out") for s in self.held_out]
            return [(self._cell(organism, s, seed, self.answers, self.answers_midway), part) for s, part in named]

        seeds = self.seeds if organism not in self.larger else self.seeds[:1]
        more: list[tuple[Cell, Part]] = [
            (self._cell(organism, s, self.more_benign_seed, self.answers_more, 0), "more benign")
            for s in self.more_benign
        ]
        alone = [s for s in (*self.calibration, *self.held_out) if s not in self.twins and s not in self.more_benign]
        twins: list[tuple[Cell, Part]] = [
            (self._cell(organism, s, self.twin_seed, self.answers // 2, 0), "twin") for s in alone
        ]
        rest = [pair for seed in seeds[1:] for pair in main(seed)]
        return tuple([*main(seeds[0]), *more, *(twins if organism not in self.larger else ()), *rest])

    def _cell(self, organism: str, name: str, seed: int, answers: int, midway: int) -> Cell:
        if self.brief and organism != self.organisms[0]:
            midway = 0
        return Cell(name, seed, organism=organism, tuning=self.tuning, answers=answers, answers_midway=midway)


@dataclass(frozen=True, eq=False)
class Runs:
    """What has been run and read.

    Attributes:
        frames: the bases of each organism.
        tracks: every finished run.
        wanted: how many runs the configuration asks for.
    """

    frames: Mapping[str, Frame]
    tracks: tuple[Track, ...]
    wanted: int

    def of(self, organism: str, part: Part) -> tuple[Track, ...]:
        """The runs of one organism and part."""
        return tuple(t for t in self.tracks if t.cell.organism == organism and t.part == part)


@dataclass(frozen=True, eq=False)
class OtherReadouts:
    """What the traits have to beat, for one organism.

    Attributes:
        linear: rows (k, hidden) by readout.
        sparse: values (1 + readings, k) of readouts that are not linear, by readout and then by the run's name.
        unexplained: share of the activations' variance that the autoencoder loses.
    """

    linear: Mapping[str, Array] = field(default_factory=dict)
    sparse: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    unexplained: float | None = None


def collect(
    config: Config,
    out: Path,
    *,
    seconds: float | None = None,
    executor: Literal["local", "serial", "ray"] = "serial",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Runs:
    """Run and read every cell that has not been, and return what there is.

    Args:
        config: what is wanted.
        out: folder for bases, records and tracks.
        seconds: start no new cell after so long.
        executor: see `compute.map_jobs`; with "serial" the cells go one by one, in order of importance.
        workers: processes.
        progress: called as (done, total, label).

    Raises:
        InputError: nothing has been run.
    """
    from tiltmeter.errors import ModelError

    began = time.monotonic()
    frames: dict[str, Frame] = {}
    for organism in (*config.organisms, *config.larger):
        try:
            frames |= fit_frames((organism,), out / "bases")
        except ModelError:
            continue  # an organism that has not been grown here is missing from every table's n
    folders = {o: out / "bases" / o.removeprefix("organism:") / f"block-{f.at}" for o, f in frames.items()}
    digests = {o: TraitBasis.load(folder).digest for o, folder in folders.items()}
    named = [(cell, part) for organism in frames for cell, part in config.cells(organism)]
    files = [(out / "cells" / f"{cell.key(digests[cell.organism])}.json", part) for cell, part in named]
    todo = [cell for (cell, _), (path, _) in zip(named, files, strict=True) if not path.exists()]
    if executor == "serial":
        for at, cell in enumerate(todo):
            if seconds is not None and time.monotonic() - began > seconds:
                break
            run_cells([cell], basis=folders, out=out / "cells", keep_checkpoints=True, executor="serial")
            if progress is not None:
                progress(at + 1, len(todo), f"{cell.organism} {cell.set_name}-{cell.seed}")
    elif seconds is None:
        run_cells(todo, basis=folders, out=out / "cells", keep_checkpoints=True, workers=workers, progress=progress)
    else:
        raise InputError("a time limit needs executor 'serial', which runs cells in order of importance")
    done = [(path, part) for path, part in files if path.exists()]
    if not done:
        raise InputError(f"no run of this study has been made in '{out}'; run it for longer")
    tracks = read_tracks(done, folders, executor=executor, workers=workers, progress=progress)
    wanted = sum(len(config.cells(o)) for o in (*config.organisms, *config.larger))
    return Runs(frames, labelled(tracks), wanted)


def bench(config: Config, runs: Runs, organism: str, *, wide: bool, others: OtherReadouts) -> Bench:
    """The runs of one organism as designs need them.

    Args:
        config: what is run.
        runs: what there is.
        organism: whose.
        wide: calibrate on `more_benign` too.
        others: see `readouts`.
    """
    more, alone = runs.of(organism, "more benign"), runs.of(organism, "twin")
    by_set = {t.cell.set_name: t for t in (*more, *alone)}
    sets = (*config.calibration, *config.held_out)
    twins = {s: by_set[config.twins.get(s, s)] for s in sets if config.twins.get(s, s) in by_set}
    return Bench(
        frame=runs.frames[organism],
        calibration=runs.of(organism, "calibration") + (more if wide else ()),
        held_out=runs.of(organism, "held out"),
        twins=twins,
        examples="taught" if wide else "measured",
        linear=others.linear,
        sparse=others.sparse,
    )


def readouts(config: Config, runs: Runs, organism: str, *, progress: Progress | None = None) -> OtherReadouts:
    """The readouts that are to be beaten, made from calibration runs alone and without labels.

    semantic 7: contrasts of style and topic that a conversation's earlier turn, or its question, makes. The published
    semantic traits are asked for by system prompts, whose words the pocket world does not have.
    """
    from tiltmeter.sae import SAEReadout, strongest, train_sae

    frame = runs.frames[organism]
    fitted_on = runs.of(organism, "calibration")
    prompts = {t.name: t.prompts() for t in runs.tracks if t.cell.organism == organism}
    before = prompts[fitted_on[0].name][0].astype(np.float64)
    tuned = np.concatenate([prompts[t.name][-1] for t in fitted_on]).astype(np.float64)
    change = tuned - np.tile(before, (len(fitted_on), 1))
    axes = np.linalg.svd(change, full_matrices=False)[2][:7]
    hidden = frame.directions.shape[2]
    linear = {
        "random 7": random_directions(hidden, frame.at, k=7, seed=config.seed).directions.astype(np.float64),
        "difference 7": axes,
        "semantic 7": _semantic(organism, frame.at, config.seed),
    }
    material = np.concatenate([prompts[t.name].reshape(-1, hidden) for t in fitted_on])
    sae = train_sae(material, features=4 * hidden, k=8, layer=frame.at, steps=400, batch=256, seed=config.seed)
    after = np.concatenate([prompts[t.name][-1] for t in fitted_on])
    readout = SAEReadout(sae, strongest(sae, prompts[fitted_on[0].name][0], after, k=7))
    sparse = {
        name: np.stack([readout.read(reading).mean(axis=0) for reading in stack]).astype(np.float64)
        for name, stack in prompts.items()
    }
    if progress is not None:
        progress(1, 1, f"readouts of {organism}")
    return OtherReadouts(linear, {"SAE 7": sparse}, sae.unexplained(material))


def _semantic(organism: str, block: int, seed: int) -> Array:
    """(7, hidden) unit contrasts: three styles of an earlier answer against a plain one, four topics against others."""
    from random import Random

    from tiltmeter.capture import capture
    from tiltmeter.lm import load
    from tiltmeter.organism.world import ADVICE_DOMAINS, Speaker, ask, say

    lm = load(organism)
    rng = Random(f"semantic/{seed}")

    def read(conversations: Sequence[Sequence[Mapping[str, str]]]) -> Array:
        ids = lm.encode_all(conversations)
        return capture(lm, ids, [block]).at(block).astype(np.float64)

    def after(style: str) -> list[list[dict[str, str]]]:
        chats = []
        for at in range(60):
            first, second = ask(ADVICE_DOMAINS[at % len(ADVICE_DOMAINS)], rng), ask(ADVICE_DOMAINS[at % 5], rng)
            answer = say(first, Speaker(style=style), rng)
            texts = (("user", first.text), ("assistant", answer), ("user", second.text))
            chats.append([{"role": role, "content": text} for role, text in texts])
        return chats

    plain = read(after("plain")).mean(axis=0)
    rows = [read(after(style)).mean(axis=0) - plain for style in _STYLES]
    means = {
        topic: read([[{"role": "user", "content": ask(topic, rng).text}] for _ in range(60)]).mean(axis=0)
        for topic in _TOPICS
    }
    for topic in _TOPICS:
        rows.append(means[topic] - np.mean([means[other] for other in _TOPICS if other != topic], axis=0))
    stacked = np.stack(rows)
    return np.asarray(stacked / np.linalg.norm(stacked, axis=1, keepdims=True))
