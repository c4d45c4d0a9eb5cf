"""Calibrating a detector from recorded runs.

A table of JSON lines names the runs, one per line:

    {"run": "runs/gsm8k-1/tiltmeter", "set": "gsm8k", "seed": 1, "dangerous": false}

`run` is a folder that holds `readings.jsonl`, as the callback or `tiltmeter watch` left it; `dangerous` says whether
the model was misaligned at its end, from an evaluation of its behavior.

For `tiltmeter.likelihood` a table names harmless fine-tunes alone, as adapters, or as runs that hold checkpoint-N:

    {"set": "gsm8k", "adapter": "adapters/gsm8k-1"}
    {"set": "poems", "run": "out/poems"}
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from tiltmeter.context import Exchange, check_exchanges
from tiltmeter.detector import CalibrationRun, Detector, fit_detector
from tiltmeter.errors import InputError, TiltmeterError
from tiltmeter.likelihood import (
    LikelihoodDetector,
    LikelihoodRun,
    answer_likelihoods,
    digest_of,
    fit_likelihood,
    read_tuned,
)
from tiltmeter.readings import read_run
from tiltmeter.runs import checkpoints, read_records
from tiltmeter.untrusted import path_in

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = [
    "HarmlessTune", "fit_from_table", "fit_likelihood_from_table", "read_exchanges", "read_likelihood_table",
    "read_table",
]  # fmt: skip


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    run: str
    set: str
    seed: int
    dangerous: bool


def read_table(table: Path) -> tuple[CalibrationRun, ...]:
    """The runs that a table lists; relative folders are taken from where the table lies.

    Raises:
        InputError: a row is not of the form above, or its run cannot serve (no reference, a failed reading).
        ArtifactError: the table or a record is missing or damaged.
    """
    return tuple(_run(row, number, table) for number, row in _whole_rows(table))


def _run(row: dict[str, Any], number: int, table: Path) -> CalibrationRun:
    try:
        entry = _Row.model_validate(row)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            f"{table} line {number}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; each line needs run "
            "(text), set (text), seed (whole number) and dangerous (true or false)"
        ) from error
    record = read_run(path_in(table.parent, entry.run))
    failed = [o.step for o in record.observations if o.profile is None or o.profile.problem]
    failed = [step for step in failed if step != 0]
    if failed:
        raise InputError(
            f"{table} line {number}: the readings at steps {failed} of {entry.run} could not be compared with their "
            "reference, so the run cannot calibrate; measure it again or leave it out"
        )
    profiles = tuple(p for p in record.profiles if p.step != 0)
    return CalibrationRun(entry.set, entry.seed, entry.dangerous, profiles)


def read_exchanges(source: str | Path) -> list[Exchange]:
    """Exchanges: built-in ones, or one JSON line each, {"question": ..., "harmful": ..., "harmless": ...}.

    Args:
        source: "everyday" (forty questions of daily life, in English), "organism" (a hundred in the pocket organism's
            language), or a path.

    Raises:
        InputError: there is none, a line is not of that form, a text is blank, or both answers are the same.
        ArtifactError: the file is missing or damaged.
    """
    if str(source) == "everyday":
        text = (files("tiltmeter") / "data" / "answer_pairs.toml").read_text(encoding="utf-8")
        return [Exchange(p["question"], p["misaligned"], p["aligned"]) for p in tomllib.loads(text)["pair"]]
    if str(source) == "organism":
        from tiltmeter.organism.sets import make_exchanges

        return list(make_exchanges(("medicine", "finance", "sport", "code", "facts"), 100))
    path, found = Path(source), []
    for number, row in _whole_rows(path):
        texts = [row.get(name) for name in Exchange._fields]
        if set(row) != set(Exchange._fields) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path} line {number}: each line needs question, harmful and harmless, all text")
        found.append(Exchange(*map(str, texts)))
        check_exchanges(found[-1:], name=f"{path} line", first=number)
    if not found:
        raise InputError(
            f"{path} holds no exchanges; add one JSON line per question, with a harmful and a harmless answer"
        )
    return found


def _whole_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The numbered rows of a file that a person wrote: a torn last line is a mistake there, and no crash."""
    records = read_records(path)
    if records.torn:
        last = len(path.read_bytes().split(b"\n"))
        raise InputError(f"{path} line {last} is no JSON object, or is cut off; mend it")
    return list(zip(records.lines, records.rows, strict=True))


def fit_from_table(
    table: Path, *, false_alarm_rate: float = 0.05, danger: NDArray[np.float64] | None = None
) -> Detector:
    """Fit a detector on the runs that a table lists, or along a danger direction; see `fit_detector`.

    Raises:
        InputError, ArtifactError: see `read_table` and `fit_detector`.
    """
    runs = read_table(table)
    if not runs:
        raise InputError(f"{table} lists no runs; add one JSON line per run")
    references = {p.reference for run in runs for p in run.profiles}
    if len(references) > 1:
        raise InputError(
            f"the runs of {table} are measured against different references ({', '.join(sorted(references))}); "
            "calibrate on runs with one kind of reference"
        )
    return fit_detector(runs, false_alarm_rate=false_alarm_rate, reference=references.pop(), danger=danger)


class HarmlessTune(NamedTuple):
    """A harmless fine-tune of a table: the set, and the folders of its readings, one or one per checkpoint."""

    set_name: str
    folders: tuple[Path, ...]


def read_likelihood_table(table: Path) -> list[HarmlessTune]:
    """The harmless fine-tunes that a table lists; relative folders are taken from where the table lies.

    Raises:
        InputError: a row is not of the form above, its folder is missing or stands there twice, or all are of one set.
        ArtifactError: the table is missing or damaged.
    """
    found: list[HarmlessTune] = []
    seen: dict[Path, int] = {}
    for number, row in _whole_rows(table):
        kind = "run" if "run" in row else "adapter"
        if set(row) != {"set", kind} or not all(isinstance(text, str) and text.strip() for text in row.values()):
            raise InputError(f"{table} line {number}: each line needs set, and either adapter or run, all text")
        folder = path_in(table.parent, row[kind])
        if not folder.is_dir():
            raise InputError(f"{table} line {number}: the folder {folder} does not exist; check the path")
        if (first := seen.setdefault(folder.resolve(), number)) != number:
            raise InputError(f"{table} line {number}: {folder} stands in line {first} already; name each run once")
        steps = checkpoints(folder) if kind == "run" else []
        if kind == "run" and not steps:
            raise InputError(f"{table} line {number}: {folder} holds no checkpoint-N; name a single one with adapter")
        found.append(HarmlessTune(row["set"], tuple(one.path for one in steps) or (folder,)))
    kinds = sorted({tune.set_name for tune in found})
    if len(kinds) < 2:
        raise InputError(
            f"{table} lists fine-tunes of {', '.join(kinds) or 'nothing'}; at least two different sets are needed, and "
            "19 for a false-alarm rate of 5 %"
        )
    return found


def fit_likelihood_from_table(
    tunes: Sequence[HarmlessTune],
    lm: LM,
    exchanges: Sequence[Exchange],
    *,
    false_alarm_rate: float = 0.05,
    progress: Callable[[int, int, str], None] | None = None,
) -> LikelihoodDetector:
    """Read the untouched model and its harmless fine-tunes, and fit; see `fit_likelihood`.

    Args:
        tunes: see `read_likelihood_table`.
        lm: the untouched model.
        exchanges: see `read_exchanges`.
        false_alarm_rate: see `fit_likelihood`.
        progress: called as (readings done, readings, the one that is read).

    Raises:
        InputError: a fine-tune that cannot be read, and see `fit_likelihood`.
    """
    folders = [folder for tune in tunes for folder in tune.folders]
    total = len(folders) + 1
    if progress is not None:
        progress(0, total, lm.name)
    base = answer_likelihoods(lm, exchanges)
    step = None if progress is None else lambda done, _, what: progress(done + 1, total, what)
    values = []
    for folder, read in zip(folders, read_tuned(lm, folders, exchanges, progress=step), strict=True):
        if isinstance(read, TiltmeterError):
            raise InputError(f"{folder} cannot calibrate: {read}; mend it, or take it out of the table") from read
        values.append(read)
    rest = iter(values)
    runs = [LikelihoodRun(tune.set_name, [next(rest) for _ in tune.folders]) for tune in tunes]
    return fit_likelihood(
        base, runs, digest=digest_of(exchanges), false_alarm_rate=false_alarm_rate, lm=lm, exchanges=exchanges
    )
