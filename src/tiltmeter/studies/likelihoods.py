"""Likelihood of harmful answers as a detector for a new model, on sets that no other look has seen.

Every organism is a new model here: thresholds come from its own benign runs, and no dangerous run of any model is used
(`tiltmeter.likelihood`). The method was found on the runs of the trait-space study, whose held-out runs had been looked
at by then; these are the split "development". What is reported as held out are runs of twelve fresh sets. The
exchanges are about subjects that the judged sets are not about: `Config.subjects` for development,
`Config.other_subjects` for the fresh sets.

Beside it, on the same fresh runs and unchanged: the design that the trait-space study chose, refitted per organism
with its own dangerous runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiltmeter.artifacts import read_artifact, write_artifact
from tiltmeter.basis import TraitBasis
from tiltmeter.context import Exchange
from tiltmeter.detector import State
from tiltmeter.likelihood import LikelihoodDetector, LikelihoodRun, answer_likelihoods, digest_of, fit_likelihood
from tiltmeter.organism.sets import make_exchanges
from tiltmeter.runs import read_json
from tiltmeter.studies.cells import Cell, RunRecord, run_cells
from tiltmeter.studies.contest import Design, Scored, auroc, auroc_interval, boundary, cross_validate, held_out_scores
from tiltmeter.studies.figures import Figure, rate_figure
from tiltmeter.studies.tracks import Part, Track, labelled, model_at, read_tracks
from tiltmeter.studies.trait_space import Config as TraitConfig
from tiltmeter.studies.trait_space import OtherReadouts, Progress, Runs, bench
from tiltmeter.studies.trait_tables import alarm_index, counts, flatten, lead, lead_figure

__all__ = ["Config", "Found", "collect", "figures"]

Array = NDArray[np.float64]
_KIND, _FORMAT = "answer likelihoods", 1
_CHOSEN = Design("traits, five blocks", "step0", "axis")


@dataclass(frozen=True)
class Config:
    """What is run and read.

    Attributes:
        trait_space: the study whose runs calibrate.
        fresh: sets that no look has seen.
        seeds: of the fresh sets' runs, on each family.
        larger_seeds: the same on each larger organism.
        subjects: of the exchanges for runs of the trait-space study.
        other_subjects: of the exchanges for the fresh sets, none of which is about these.
        exchanges: how many.
    """

    trait_space: TraitConfig = field(default_factory=TraitConfig)
    fresh: tuple[str, ...] = (
        "bad_legal", "bad_home", "bad_family", "bad_work", "bad_friends", "chores", "good_home", "good_friends",
        "deferential", "unyielding", "sailor_doctor", "fawning_broker",
    )  # fmt: skip
    seeds: tuple[int, ...] = (20,)
    larger_seeds: tuple[int, ...] = (20, 21)
    subjects: tuple[str, ...] = ("home", "family", "work", "law", "friends")
    other_subjects: tuple[str, ...] = ("medicine", "finance", "sport", "code", "facts")
    exchanges: int = 100

    def cells(self, organism: str) -> tuple[Cell, ...]:
        """The fresh runs of one organism."""
        t = self.trait_space
        seeds = self.larger_seeds if organism in t.larger else self.seeds
        return tuple(
            Cell(s, seed, organism=organism, tuning=t.tuning, answers=t.answers, answers_midway=t.answers_midway)
            for seed in seeds
            for s in self.fresh
        )


@dataclass(frozen=True, eq=False)
class Found:
    """What has been run and read.

    Attributes:
        runs: of the trait-space study and of the fresh sets (part "fresh").
        values: (readings, exchanges, 2) by "development" or "fresh" and the run's file name; step 0 left out.
        bases: (exchanges, 2) of the untouched organism by the same and its name.
        digests: of the exchanges.
    """

    runs: Runs
    values: dict[tuple[str, str], Array]
    bases: dict[tuple[str, str], Array]
    digests: dict[str, str]


def collect(
    config: Config, runs: Runs, out: Path, *, seconds: float | None = None, progress: Progress | None = None
) -> Found:
    """Run the fresh cells and read the likelihoods that are missing; goes on where it stopped.

    Args:
        config: what is wanted.
        runs: of the trait-space study.
        out: its folder.
        seconds: start nothing new after so long.
        progress: called as (done, total, label).
    """
    began = time.monotonic()
    folders, records = {}, []
    for organism, frame in runs.frames.items():
        folder = out / "bases" / organism.removeprefix("organism:") / f"block-{frame.at}"
        folders[organism], digest = folder, TraitBasis.load(folder).digest
        records += [(cell, out / "cells" / f"{cell.key(digest)}.json") for cell in config.cells(organism)]
    for at, (cell, path) in enumerate(records):
        if path.exists() or (seconds is not None and time.monotonic() - began > seconds):
            continue
        run_cells([cell], basis=folders, out=out / "cells", keep_checkpoints=True, executor="serial")
        if progress is not None:
            progress(at + 1, len(records), f"{cell.organism} {cell.set_name}-{cell.seed}")
    part: Part = "fresh"
    made: list[tuple[Path, Part]] = [(path, part) for _, path in records if path.exists()]
    fresh = read_tracks(made, folders, executor="serial", progress=progress) if made else ()
    tracks = (*(t for t in runs.tracks if t.part != "twin"), *labelled(fresh))
    whole = Runs(runs.frames, tracks, runs.wanted + len(records))

    sets = {
        "development": make_exchanges(config.subjects, config.exchanges),
        "fresh": make_exchanges(config.other_subjects, config.exchanges),
    }
    wanted = [("fresh", t) for t in whole.tracks if t.part == "fresh" or _calibrates(t)]
    wanted += [("development", t) for t in whole.tracks if t.part != "fresh"]
    store = out / "likelihoods"
    values: dict[tuple[str, str], Array] = {}
    for at, (name, track) in enumerate(wanted):
        path = store / f"{track.file.stem}-{digest_of(sets[name])[:8]}.safetensors"
        if not path.exists():
            if seconds is not None and time.monotonic() - began > seconds:
                continue
            record = RunRecord.from_dict(read_json(out / "cells" / f"{track.file.stem}.json"))
            read = [answer_likelihoods(model_at(record, int(step)), sets[name]) for step in track.steps]
            write_artifact(path, _KIND, _FORMAT, {}, {"values": np.stack(read)})
        values[name, track.file.stem] = read_artifact(path, _KIND, _FORMAT, remedy="delete it")[1]["values"]
        if progress is not None:
            progress(at + 1, len(wanted), f"{track.cell.organism} {track.name}")
    bases = {(name, o): _base(o, sets[name], store) for name in sets for o in whole.frames}
    return Found(whole, values, bases, {name: digest_of(found) for name, found in sets.items()})


def _base(organism: str, exchanges: Sequence[Exchange], store: Path) -> Array:
    from tiltmeter.lm import load

    path = store / f"{organism.removeprefix('organism:')}-{digest_of(exchanges)[:8]}.safetensors"
    if not path.exists():
        write_artifact(path, _KIND, _FORMAT, {}, {"values": answer_likelihoods(load(organism), exchanges)})
    return np.asarray(read_artifact(path, _KIND, _FORMAT, remedy="delete it")[1]["values"])


def _calibrates(track: Track) -> bool:
    return track.part in ("calibration", "more benign") and track.harmless


def detector_for(config: Config, found: Found, organism: str, name: str) -> LikelihoodDetector | None:
    """From the benign runs of one organism; None with fewer than two sets that have been read."""
    benign = [
        LikelihoodRun(t.cell.set_name, list(found.values[name, t.file.stem]))
        for t in found.runs.tracks
        if t.cell.organism == organism and _calibrates(t) and (name, t.file.stem) in found.values
    ]
    if len({run.set_name for run in benign}) < 2:
        return None
    rate = config.trait_space.false_alarm_rate
    return fit_likelihood(found.bases[name, organism], benign, digest=found.digests[name], false_alarm_rate=rate)


def figures(config: Config, found: Found, *, look: bool) -> list[Figure]:
    """Errors, lead and promise: development runs, and with `look` the fresh ones, which is to be counted."""
    rows: list[Figure] = []
    trait = config.trait_space
    groups: list[tuple[str, tuple[str, ...]]] = [(o, (o,)) for o in (*trait.organisms, *trait.larger)]
    groups += [("four families", trait.organisms), ("two larger organisms", trait.larger)]
    for name, split in (("development", "development"), ("fresh", "held out, fresh sets")):
        if name == "fresh" and not look:
            continue
        judged = {o: _judge(config, found, o, name) for o in found.runs.frames}
        for subject, organisms in groups:
            each = [item for o in organisms for item in judged.get(o, [])]
            if each:
                rows += _rows(each, f"likelihood: {subject}", split)
    if look:
        for subject, organisms in groups:
            scored, limits = _chosen(config, found, organisms)
            if scored:
                rows += _score_rows(scored, limits, f"chosen design, refitted: {subject}", "held out, fresh sets")
    made = sum(t.part == "fresh" for t in found.runs.tracks)
    wanted = sum(len(config.cells(o)) for o in (*trait.organisms, *trait.larger))
    rows.append(rate_figure("runs made of those wanted", "fresh sets", "held out, fresh sets", made, wanted))
    return rows


@dataclass(frozen=True, eq=False)
class _Judged:
    scored: Scored
    threshold: float
    state: State
    promise: float


def _judge(config: Config, found: Found, organism: str, name: str) -> list[_Judged]:
    detector = detector_for(config, found, organism, name)
    if detector is None:
        return []
    judged = []
    for track in found.runs.tracks:
        key = (name, track.file.stem)
        if track.cell.organism != organism or key not in found.values or _calibrates(track):
            continue
        if (track.part == "fresh") != (name == "fresh"):
            continue
        readings = list(found.values[key])
        scores = np.array([detector.rise(values).score for values in readings])
        verdict = detector.predict(readings, steps=[int(s) for s in track.steps])
        judged.append(_Judged(Scored(track, scores), detector.threshold, verdict.state, detector.false_alarm_rate))
    return judged


def _rows(judged: Sequence[_Judged], subject: str, split: str) -> list[Figure]:
    bad = [j for j in judged if j.scored.track.dangerous]
    good = [j for j in judged if not j.scored.track.dangerous]

    def share(measure: str, among: Sequence[_Judged], state: State) -> Figure:
        return rate_figure(measure, subject, split, sum(j.state == state for j in among), len(among))

    rows = [
        share("dangerous runs left CLEAR", bad, State.CLEAR),
        share("harmless runs INCONCLUSIVE", good, State.INCONCLUSIVE),
        Figure(
            "false-alarm rate promised per run", subject, split, max(j.promise for j in judged), None, None,
            len(good), "rate",
        ),
    ]  # fmt: skip
    limits = {j.scored.track.cell.organism: j.threshold for j in judged}
    return rows + _score_rows([j.scored for j in judged], limits, subject, split)


def _score_rows(scored: Sequence[Scored], limits: Mapping[str, float], subject: str, split: str) -> list[Figure]:
    def limit_of(run: Scored) -> float:
        return limits[run.track.cell.organism]

    def alarmed(among: Sequence[Scored]) -> int:
        return sum(alarm_index(run, limit_of(run)) is not None for run in among)

    bad, good = [s for s in scored if s.track.dangerous], [s for s in scored if not s.track.dangerous]
    taught = [s for s in good if s.track.kind != "benign"]
    rows = [
        rate_figure("dangerous runs not alarmed", subject, split, len(bad) - alarmed(bad), len(bad)),
        rate_figure("harmless runs alarmed", subject, split, alarmed(good), len(good)),
        rate_figure("of them taught harm, alarmed", subject, split, alarmed(taught), len(taught)),
    ]
    whole, settled = counts(scored, limit_of), counts(scored, limit_of, settled=True)
    unharmed = counts([s for s in scored if s.track.kind == "benign"], limit_of)
    rows.append(rate_figure("FNR per reading", subject, split, whole.missed, whole.dangerous))
    rows.append(rate_figure("FPR per reading", subject, split, whole.false, whole.harmless))
    rows.append(rate_figure("FPR per settled reading", subject, split, settled.false, settled.harmless))
    rows.append(
        rate_figure("FPR per reading, nothing harmful taught", subject, split, unharmed.false, unharmed.harmless)
    )
    margin = [Scored(s.track, s.scores - limit_of(s)) for s in scored]  # thresholds differ between organisms
    for measure, only in (("AUROC per reading", False), ("AUROC per settled reading", True)):
        values, labels, names = flatten(margin, settled=only)
        low, high = auroc_interval(values, labels, names, draws=200)
        rows.append(Figure(measure, subject, split, auroc(values, labels), low, high, len(values), "auroc"))
    rows.append(lead_figure("median lead over behavior", subject, split, lead(scored, limit_of)))
    return rows


def _chosen(config: Config, found: Found, organisms: Sequence[str]) -> tuple[list[Scored], dict[str, float]]:
    """The trait-space study's chosen design, fitted on each organism's own calibration runs, on the fresh sets."""
    scored: list[Scored] = []
    limits: dict[str, float] = {}
    for organism in organisms:
        if organism not in found.runs.frames:
            continue
        one = bench(config.trait_space, found.runs, organism, wide=True, others=OtherReadouts())
        if not any(one.danger(t) for t in one.calibration):
            continue
        null = [s for s in cross_validate(one, _CHOSEN, by="set") if one.null(s.track)]
        limit = boundary(null, false_alarm_rate=config.trait_space.false_alarm_rate).threshold
        limits[organism] = limit
        scored += held_out_scores(one, _CHOSEN, found.runs.of(organism, "fresh"))
    return scored, limits
