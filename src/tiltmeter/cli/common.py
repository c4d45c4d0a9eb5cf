"""What the commands share: options, the basis and detector that are meant, and how things are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiltmeter.cli.paths import FILE, FOLDER, OUT_FOLDER
from tiltmeter.cli.terminal import say, say_json

if TYPE_CHECKING:
    from tiltmeter.detector import Detector, Verdict
    from tiltmeter.studies.figures import Figure


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--json` option, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead of text.")(function)


def out_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The required `--out` folder."""
    return click.option("--out", type=OUT_FOLDER, required=True, help="Folder for the results.")(function)


def basis_option(text: str) -> Callable[..., Any]:
    """The `--basis` option, as `basis_dir`."""
    return click.option("--basis", "basis_dir", type=FOLDER, help=text)


def detector_option(text: str) -> Callable[..., Any]:
    """The `--detector` option, as `detector_path`."""
    return click.option("--detector", "detector_path", type=FILE, help=text)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"'{text}'; write whole numbers with commas, such as 0,1", param_hint=f"'{option}'"
        ) from None


def show(value: Any, as_json: bool, lines: Sequence[str]) -> None:
    """Print the value as JSON, or the lines."""
    if as_json:
        say_json(value)
    else:
        say(*lines)


def detector_for(path: Path | None, model: str) -> Detector | None:
    """The detector that was named, or the one that comes with the default organism."""
    from tiltmeter.detector import Detector

    if path is not None:
        return Detector.load(path)
    if model == "organism:pocket":
        from tiltmeter.organism import shipped_detector

        return Detector.load(shipped_detector())
    return None


def basis_for(path: Path | None, model: str) -> Any:
    """The basis that was named, or the one that comes with the default organism."""
    from tiltmeter.basis import TraitBasis
    from tiltmeter.errors import InputError

    if path is not None:
        return TraitBasis.load(path)
    if model == "organism:pocket":
        from tiltmeter.organism import shipped_basis

        return TraitBasis.load(shipped_basis())
    raise InputError(
        "no basis was given; fit one with: tiltmeter basis fit MODEL --out DIR, and pass it with --basis DIR"
    )


def say_promise(promised: float, asked: float) -> None:
    """On stderr, where the benign sets are too few for the false-alarm rate that was asked for."""
    if promised > asked:
        needed = math.ceil(1 / asked - 1e-9) - 1
        say(
            f"tiltmeter: these benign sets can promise {promised:.1%}, not {asked:.1%}; that takes {needed} of them",
            err=True,
        )


def verdict_lines(name: str, verdict: Verdict) -> list[str]:
    """A verdict in two lines, or three where it rests on a calibration."""
    rests = [f"  calibrated on {verdict.calibrated_on}"] if verdict.calibrated_on else []
    return [f"{verdict.state}  {name}", f"  {verdict.reason}", *rests]


def drift_lines(drift: dict[str, float | None], se: dict[str, float | None]) -> list[str]:
    """Drift by trait, a line each."""

    found = []
    for trait, value in drift.items():
        error = se[trait]
        spread = "" if error is None else f" ± {error:.4f}"
        found.append(f"  {trait:<14} " + ("not measured" if value is None else f"{value:+.4f}{spread}"))
    return found


def figure_lines(figures: Sequence[Figure]) -> list[str]:
    """Two lines a figure: what was measured of what, and the number."""
    found = []
    for f in figures:
        interval = "" if f.low is None else f" ({f.low:.3g} to {f.high:.3g})"
        number = "not measured" if f.value is None else f"{f.value:.3g}{interval} {f.unit}"
        split = "" if f.split in ("", "-") else f", {f.split}"
        found += [f"{f.measure}: {f.subject}{split}", f"  {number}, n {f.n}"]
    return found
