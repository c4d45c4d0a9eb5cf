"""Figures: numbers with n, interval, unit, and the command, commit and date that made them.

`docs/results/NAME.json` holds a list of them, written by the study that measured them; the pages in docs are made from
these files and from nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiltmeter.artifacts import write_file
from tiltmeter.rates import wilson
from tiltmeter.runs import provenance

__all__ = ["Figure", "rate_figure", "write_figures"]


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        measure: what was measured.
        subject: of what.
        split: on which part of the data.
        value: None where it could not be measured.
        low, high: interval; what kind, the page says. None where there is none.
        n: what it rests on.
        unit: of value, low and high.
    """

    measure: str
    subject: str
    split: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str


def rate_figure(measure: str, subject: str, split: str, hits: int, n: int) -> Figure:
    """A share with its 95 % Wilson interval."""
    rate = wilson(hits, n)
    return Figure(measure, subject, split, rate.value, rate.low, rate.high, n, "share")


def write_figures(figures: Sequence[Figure], path: Path, *, command: str) -> list[dict[str, Any]]:
    """Write figures with the command, commit and date of their making.

    Rows that another study (the first three words of its command) left in the file stay there, before these.

    Returns:
        The rows of these figures.
    """
    made = provenance()
    rows = [
        {
            **asdict(f),
            "command": command,
            "commit": (made.get("git") or {}).get("commit"),
            "date": str(made["started"])[:10],
        }
        for f in figures
    ]
    study = command.split()[:3]
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    kept = [row for row in before if row["command"].split()[:3] != study]
    lines = ",\n".join(json.dumps(row) for row in (*kept, *rows))
    write_file(path, f"[\n{lines}\n]\n".encode())
    return rows
