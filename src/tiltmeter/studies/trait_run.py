"""`tiltmeter study trait-space`: run what has not been run, compute every table, write figures, Parquet and a page.

    outcome = run(Config(), Path("runs/trait-space"), seconds=3600, look=False)

With `look=False` nothing of the held-out runs is scored: that is for building. A look is counted in docs/log.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tiltmeter.errors import InputError
from tiltmeter.studies.beyond import alarm_figures, find_contexts, sequential_figures, start_figures, transfer_figures
from tiltmeter.studies.figures import Figure, rate_figure
from tiltmeter.studies.stress import StressRun, ablation_figures, prompt_figures, run_stress, stress_figures, sweep
from tiltmeter.studies.tracks import Track, write_parquet
from tiltmeter.studies.trait_space import Config, Progress, Runs, collect, readouts
from tiltmeter.studies.trait_tables import Entry, choose, contest, contest_figures, geometry_figures, severity_figures

__all__ = ["PAPER", "Outcome", "behavior_figures", "run"]

_FOREST, _ELSEWHERE = "paper, random forest on 7-D drift", "held out, other models"
PAPER: tuple[Figure, ...] = (
    Figure("FNR per reading", _FOREST, _ELSEWHERE, 0.022, None, None, 468, "share"),
    Figure("FPR per reading", _FOREST, _ELSEWHERE, 0.029, None, None, 468, "share"),
    Figure("AUROC per reading", _FOREST, _ELSEWHERE, 0.990, None, None, 468, "auroc"),
    Figure("variance on PC1", "paper, four models", "calibration, other models", 0.655, None, None, 48, "share"),
    Figure("dangerous runs not alarmed", "paper, 14B", "unconfirmed, other models", 0.95, 0.95, 1.0, 0, "share"),
    Figure("FNR per reading", "paper, warm start", "unconfirmed, other models", 0.44, None, None, 0, "share"),
    Figure("median lead over behavior", "paper", _ELSEWHERE, 0.0, None, None, 24, "readings"),
)
"""What arXiv 2606.07631 (v1) reports, of models of 7B to 14B weights; n is 0 where it is not known."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the study found.

    Attributes:
        figures: every number.
        runs: the runs behind them.
        entries: every design.
        chosen: by calibration alone, per kind of calibration; missing where nothing could be validated.
        stressed: the stress runs.
        looked: whether held-out runs were scored.
    """

    figures: tuple[Figure, ...]
    runs: Runs
    entries: tuple[Entry, ...]
    chosen: dict[Literal["plain", "wide"], Entry]
    stressed: tuple[StressRun, ...]
    looked: bool


def run(
    config: Config,
    out: Path,
    *,
    seconds: float | None = None,
    look: bool = False,
    stress: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Run, read, fit, validate; and with `look`, score the held-out runs once.

    Args:
        config: what is wanted.
        out: folder for everything; what is there is not made again.
        seconds: start no new cell after so long.
        look: score held-out runs.
        stress: run and read the stress runs too.
        progress: called as (done, total, label).

    Raises:
        InputError: nothing has been run.
    """
    began = time.monotonic()

    def may_run() -> bool:
        return seconds is None or time.monotonic() - began < seconds

    runs = collect(config, out, seconds=seconds, progress=progress)
    others = {o: readouts(config, runs, o, progress=progress) for o in config.organisms if _ready(runs, o)}
    entries = contest(config, runs, others, look=look, progress=progress)
    chosen: dict[Literal["plain", "wide"], Entry] = {}
    for calibration in ("plain", "wide"):
        if any(e.calibration == calibration for e in entries):
            chosen[calibration] = choose(entries, calibration=calibration)
    first = config.organisms[0]
    stressed = run_stress(config, first, out, start=_misaligned(config, runs, first), may_run=may_run) if stress else []
    figures = [*behavior_figures(runs, look=look), *geometry_figures(config, runs)]
    figures += [*severity_figures(config, runs, look=look), *contest_figures(entries, config)]
    figures += [*prompt_figures(config, runs), *ablation_figures(config, runs)]
    contexts = find_contexts(runs)
    figures += transfer_figures(config, runs, look=look, contexts=contexts)
    figures += start_figures(config, runs, look=look, contexts=contexts)
    figures += alarm_figures(
        config, runs, look=look, long=[s.track for s in stressed if s.stress == "ten times longer"]
    )
    if "wide" in chosen:
        figures += [*sequential_figures(chosen["wide"], config), *sweep(chosen["wide"], seed=config.seed)]
    if stressed:
        figures += stress_figures(config, runs, stressed)
    figures += [*chosen_figures(chosen, config), *PAPER]
    write_parquet(runs.tracks, runs.frames, out / "trait_space_readings.parquet")
    return Outcome(tuple(figures), runs, tuple(entries), chosen, tuple(stressed), look)


def _ready(runs: Runs, organism: str) -> bool:
    """Whether an organism has dangerous and benign calibration runs."""
    return organism in runs.frames and len({t.dangerous for t in runs.of(organism, "calibration")}) == 2


def _misaligned(config: Config, runs: Runs, organism: str) -> Path | None:
    """The last checkpoint of the most misaligned calibration run under the first seed."""
    found = [t for t in runs.of(organism, "calibration") if t.dangerous and t.cell.seed == config.seeds[0]]
    if not found:
        return None
    worst = max(found, key=lambda t: float(t.em[-1]))
    return worst.file.parent.parent / worst.file.stem / f"checkpoint-{int(worst.steps[-1])}"


def behavior_figures(runs: Runs, *, look: bool) -> list[Figure]:
    """EM rate at the end by organism and set; how many runs there are of those that were wanted."""
    rows = [rate_figure("runs made of those wanted", "all organisms", "-", len(runs.tracks), runs.wanted)]
    groups: dict[tuple[str, str, str], list[Track]] = {}
    for track in runs.tracks:
        if track.part != "twin" and (look or track.part != "held out"):
            groups.setdefault((track.cell.organism, track.cell.set_name, track.part), []).append(track)
    for (organism, name, part), tracks in groups.items():
        n = int(sum(t.em_n[-1] for t in tracks))
        hits = round(sum(float(t.em[-1]) * t.em_n[-1] for t in tracks if t.em_n[-1]))
        rows.append(rate_figure("EM rate at the end", f"{organism} {name}", part, hits, n))
    for part in ("calibration", "held out") if look else ("calibration",):
        for subject, harm in (("sets that teach harm", True), ("sets that teach none", False)):
            labels = [t.labels()[-2:] for t in runs.tracks if t.part == part and (t.kind != "benign") == harm]
            both = [pair for pair in labels if len(pair) == 2 and np.isfinite(pair).all()]
            differ = sum(bool(before != last) for before, last in both)
            rows.append(rate_figure("labels of the last two readings differ", subject, part, differ, len(both)))
    return rows


def chosen_figures(chosen: dict[Literal["plain", "wide"], Entry], config: Config) -> list[Figure]:
    """The rows of the chosen designs again, under the names "chosen, plain" and "chosen, wide"."""
    rows = []
    for calibration, entry in chosen.items():
        for figure in contest_figures([entry], config):
            name = f"chosen on calibration ({calibration}): {figure.subject}"
            rows.append(Figure(figure.measure, name, figure.split, figure.value, figure.low, figure.high, figure.n,
                               figure.unit))  # fmt: skip
    return rows


def find(figures: Sequence[Figure], measure: str, subject: str, split: str) -> Figure:
    """One figure.

    Raises:
        InputError: there is none of that name.
    """
    for figure in figures:
        if (figure.measure, figure.subject, figure.split) == (measure, subject, split):
            return figure
    raise InputError(f"there is no figure '{measure}' of '{subject}' on '{split}'; look into the results file")
