"""Calibrating a detector from recorded runs.

A table of JSON lines names the runs, one per line:

    {"run": "runs/gsm8k-1/tiltmeter", "set": "gsm8k", "seed": 1, "dangerous": false}

`run` is a folder that holds `readings.jsonl`, as the callback or `tiltmeter watch` left it; `dangerous` says whether
the model was misaligned at its end, from an evaluation of its behavior.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from tiltmeter.context import Exchange
from tiltmeter.detector import CalibrationRun, Detector, fit_detector
from tiltmeter.errors import InputError
from tiltmeter.readings import read_run
from tiltmeter.runs import read_records

__all__ = ["fit_from_table", "read_exchanges", "read_table"]


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
    return tuple(_run(row, number, table) for number, row in enumerate(read_records(table).rows, start=1))


def _run(row: dict[str, Any], number: int, table: Path) -> CalibrationRun:
    try:
        entry = _Row.model_validate(row)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            f"{table} line {number}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; each line needs run "
            "(text), set (text), seed (whole number) and dangerous (true or false)"
        ) from error
    record = read_run(table.parent / entry.run)
    failed = [o.step for o in record.observations if o.profile is None or o.profile.problem]
    failed = [step for step in failed if step != 0]
    if failed:
        raise InputError(
            f"{table} line {number}: the readings at steps {failed} of {entry.run} could not be compared with their "
            "reference, so the run cannot calibrate; measure it again or leave it out"
        )
    profiles = tuple(p for p in record.profiles if p.step != 0)
    return CalibrationRun(entry.set, entry.seed, entry.dangerous, profiles)


def read_exchanges(path: Path) -> list[Exchange]:
    """Exchanges for `context_danger`, one JSON line each: {"question": ..., "harmful": ..., "harmless": ...}.

    Raises:
        InputError: a line is not of that form.
        ArtifactError: the file is missing or damaged.
    """
    found = []
    for number, row in enumerate(read_records(path).rows, start=1):
        texts = [row.get(name) for name in Exchange._fields]
        if set(row) != set(Exchange._fields) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path} line {number}: each line needs question, harmful and harmless, all text")
        found.append(Exchange(*map(str, texts)))
    return found


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
