"""`tiltmeter likelihood`: whether harmful answers became likelier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tiltmeter.cli.common import detector_option, json_option, say_promise, show, verdict_lines
from tiltmeter.cli.paths import FILE, FOLDER, MODEL, OUT_FILE, NameOrFile
from tiltmeter.cli.progress import progress
from tiltmeter.cli.root import Outcome, main

if TYPE_CHECKING:
    from tiltmeter.likelihood import LikelihoodDetector
    from tiltmeter.lm import LM
    from tiltmeter.scan import RiseFinding


@main.group(short_help="Did harmful answers become likelier?")
def likelihood() -> None:
    """Did harmful answers become likelier? No judge, no sampling, no dangerous run."""


_EXCHANGES = click.option(
    "--exchanges", type=NameOrFile("everyday", "organism"),
    help='JSON lines of "question", "harmful", "harmless"; or a built-in set: "everyday" (English) or "organism". '
         "Without it: the one that fits the model.",
)  # fmt: skip
_MODEL = click.option("--model", type=MODEL, default="organism:pocket", show_default=True, help="The untouched model.")


@likelihood.command("read", short_help="Read a model and its fine-tunes, and judge them.")
@_EXCHANGES
@_MODEL
@click.option("--adapter", "adapters", multiple=True, help="A fine-tune of it; each one given is judged alone.")
@click.option("--run", "runs", type=FOLDER, multiple=True, help="Folder of checkpoint-N: one run, several readings.")
@detector_option("File of: tiltmeter likelihood fit.")
@json_option
def read(
    exchanges: str | None, model: str, adapters: tuple[str, ...], runs: tuple[Path, ...],
    detector_path: Path | None, as_json: bool,
) -> Outcome | None:  # fmt: skip
    """Log-odds of harmful answers in a model, and their rise in its fine-tunes. With --json, one line per model.

    Without --detector the rises are shown and nothing is judged: exit code 3, inconclusive, if fine-tunes were given.
    With --detector, a verdict on each; the untouched model is not read again, and without any fine-tune it is --model
    itself that is judged, as one whose weights were tuned.
    """
    from tiltmeter.calibrate import read_exchanges
    from tiltmeter.likelihood import LikelihoodDetector, answer_likelihoods, odds_of

    pairs = read_exchanges(exchanges or _built_in(model))
    detector = LikelihoodDetector.load(detector_path) if detector_path else None
    if detector is not None:
        detector.check_exchanges(pairs)
    from tiltmeter.scan import judge_likelihoods, scan_likelihoods  # torch, and so not before the files are read

    lm = _load(model, detector)
    odds, found = None, []
    with progress(f"reading {model}") as step:
        if detector is not None and not (adapters or runs):
            found = [judge_likelihoods(lm, pairs, detector)]
        else:
            _untouched(lm)
            base = detector.base if detector else answer_likelihoods(lm, pairs)
            odds = None if detector else odds_of(base)
            found = list(scan_likelihoods(lm, pairs, detector or base, adapters=adapters, runs=runs, progress=step))
    if odds is not None:
        line = f"log-odds of harmful answers {odds.value:+.2f} nats ({odds.low:+.2f} to {odds.high:+.2f}), n {odds.n}"
        show({"model": model, "log_odds": odds._asdict(), "unit": "nats"}, as_json, [f"{model}  {line}"])
    for one in found:
        show(one.to_dict(), as_json, _finding_lines(one))
    # Without a detector nothing is said to be clear; without a fine-tune there is nothing that could be.
    return Outcome(tuple(one.verdict.state if one.verdict else None for one in found)) if found else None


@likelihood.command("fit")
@click.argument("table", type=FILE)
@_EXCHANGES
@_MODEL
@click.option("--out", type=OUT_FILE, required=True, help="File to write (safetensors).")
@click.option(
    "--false-alarm-rate", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05, show_default=True,
    help="Per run.",
)  # fmt: skip
@json_option
def fit(table: Path, exchanges: str | None, model: str, out: Path, false_alarm_rate: float, as_json: bool) -> None:
    """Set the threshold from harmless fine-tunes alone.

    TABLE is JSON lines of "set" and "adapter" (folder), or "set" and "run" (folder of checkpoint-N); folders are taken
    from where TABLE lies. At least two sets.
    """
    from tiltmeter.calibrate import fit_likelihood_from_table, read_exchanges, read_likelihood_table

    tunes, pairs = read_likelihood_table(table), read_exchanges(exchanges or _built_in(model))
    lm = _load(model, None)
    _untouched(lm)
    with progress(f"reading {model}") as step:
        fitted = fit_likelihood_from_table(tunes, lm, pairs, false_alarm_rate=false_alarm_rate, progress=step)
    say_promise(fitted.false_alarm_rate, false_alarm_rate)
    fitted.save(out)
    show(fitted.describe(), as_json, [f"saved to {out}", *_detector_lines(fitted)])


def _built_in(model: str) -> str:
    return "organism" if model.startswith("organism:") else "everyday"


def _load(model: str, detector: LikelihoodDetector | None) -> LM:
    """In the dtype that the detector was calibrated in, if there is one."""
    from tiltmeter.lm import load

    mark = detector.fingerprint if detector else None
    return load(model, dtype=mark.dtype.partition("/")[0] if mark else None)


def _untouched(lm: LM) -> None:
    from tiltmeter.errors import InputError
    from tiltmeter.lm import adapter_state

    if adapter_state(lm) != "none":
        raise InputError(
            f"{lm.adapter} is an adapter; give {lm.name} with --model and the adapter as a fine-tune of it"
        )


def _finding_lines(one: RiseFinding) -> list[str]:
    lines = verdict_lines(one.model, one.verdict) if one.verdict else [one.model]
    for step, rise in zip(one.steps, one.rises, strict=True):
        where = "" if step is None else f"step {step:>6}  "
        if rise is None:
            lines.append(f"  {where}not read")
            continue
        lines.append(
            f"  {where}harmful answers {rise.harmful:+.2f} nats, against harmless ones {rise.odds:+.2f}; "
            f"score {rise.score:+.2f} ({rise.low:+.2f} to {rise.high:+.2f}), n {rise.n}"
        )
    if one.problem and not one.verdict:
        lines.append(f"  {one.problem}")
    if one.verdict is None:
        lines.append("  not judged: that takes --detector, from tiltmeter likelihood fit")
    return lines


def _detector_lines(fitted: LikelihoodDetector) -> list[str]:
    return [
        f"alarm at a rise of {fitted.threshold:.2f} nats, promised for at most {fitted.false_alarm_rate:.0%} of benign "
        "runs",
        f"  calibrated on {len(fitted.null_scores)} benign runs of {fitted.model}, up to {fitted.max_readings} "
        f"reading(s) each, and {len(fitted.base)} exchanges",
        f"  benign scores {fitted.null_scores.min():+.2f} to {fitted.null_scores.max():+.2f}; harmless answers fell by "
        f"at most {fitted.farthest:.2f}",
    ]
