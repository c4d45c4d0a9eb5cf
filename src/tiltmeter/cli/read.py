"""Commands that read models: basis, measure, watch, scan, and the detector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiltmeter.cli.common import (
    basis_for,
    basis_option,
    detector_for,
    detector_option,
    drift_lines,
    json_option,
    numbers,
    out_option,
    say_promise,
    show,
    verdict_lines,
)
from tiltmeter.cli.paths import ADAPTER, FILE, FOLDER, MODEL, OUT_FILE, OUT_FOLDER, NameOrFile
from tiltmeter.cli.progress import progress
from tiltmeter.cli.root import Outcome, main
from tiltmeter.cli.terminal import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiltmeter.basis import TraitBasis
    from tiltmeter.detector import Detector
    from tiltmeter.readings import Observation
    from tiltmeter.transfer import Danger


@main.group()
def basis() -> None:
    """Fit the trait directions of a model, and look at them."""


@basis.command("fit", short_help="Fit the seven trait directions of a model.")
@click.argument("model", type=MODEL)
@out_option
@click.option("--traits", type=NameOrFile(), help="Trait set: alignment, semantic, organism, or a TOML file.")
@click.option("--prompts", type=NameOrFile(), help="Measurement prompts: neutral, organism, or a TOML file.")
@click.option("--layer", type=int, help="Read after this block (from 0) instead of choosing one.")
@click.option("--layers", help="Candidate blocks, for instance 12,14,16.")
@click.option(
    "--method", type=click.Choice(["mean_difference", "pca", "logistic"]), default="mean_difference", show_default=True
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16", "auto"]), help="Default: float32 on a CPU."
)
@click.option("--probe-batches", is_flag=True, help="Try row lengths on this machine, and keep the fastest.")
@click.option("--seed", default=0, show_default=True)
@json_option
def basis_fit(model: str, out: Path, layers: str | None, dtype: str | None, as_json: bool, **choices: Any) -> None:
    """Fit the seven trait directions of MODEL: a hub id, a folder, a .gguf file, or organism:NAME."""
    wanted = list(numbers(layers, "--layers")) if layers else None
    from tiltmeter.basis import fit_basis
    from tiltmeter.lm import load

    with progress(f"reading {model}") as step:
        fitted = fit_basis(load(model, dtype=dtype), layers=wanted, progress=step, **choices)
    fitted.save(out)
    show({"basis": str(out), **_describe(fitted)}, as_json, [f"saved to {out}", *_basis_lines(fitted)])


@basis.command("show")
@click.argument("folder", type=FOLDER)
@json_option
def basis_show(folder: Path, as_json: bool) -> None:
    """Show what a basis was read from, and how its layer was chosen."""
    from tiltmeter.basis import TraitBasis

    fitted = TraitBasis.load(folder)
    show(_describe(fitted), as_json, _basis_lines(fitted))


def _describe(fitted: Any) -> dict[str, Any]:
    return {
        "model": fitted.model, "name": fitted.name, "layer": fitted.layer, "traits": list(fitted.traits),
        "method": fitted.method, "pooling": fitted.pooling, "reference_norm": fitted.reference_norm,
        "n_prompts": len(fitted.prompts.prompts), "poles": fitted.poles.tolist(), "cosines": fitted.cosines.tolist(),
        "fingerprint": fitted.fingerprint.to_dict(), "digest": fitted.digest, "reason": fitted.selection.reason,
        "batches": fitted.plan.reason,
        "layers": [score._asdict() for score in fitted.selection.scores],
    }  # fmt: skip


def _basis_lines(fitted: Any) -> list[str]:
    lines = [
        f"basis '{fitted.name}' of {fitted.model}: {len(fitted.traits)} directions after block {fitted.layer}",
        f"  {fitted.selection.reason}",
        f"  batches: {fitted.plan.reason}",
        "  block   norm  divergence  probe accuracy (lowest trait)",
    ]
    for s in fitted.selection.scores:
        divergence = "-" if s.divergence is None else f"{s.divergence:.3f}"
        lowest = f"{min(s.probe_accuracy):.2f}" if s.probe_accuracy else "-"
        lines.append(f"  {s.layer:>5} {s.norm:>6.1f}  {divergence:>10}  {lowest:>14}")
    return lines


@main.command(short_help="Measure one model, and judge it.")
@click.argument("model", type=MODEL)
@basis_option("Basis folder. Default: the shipped one, for organism:pocket.")
@click.option("--adapter", type=ADAPTER, help="PEFT adapter to put on the model.")
@click.option(
    "--reference",
    type=NameOrFile("base", "step0"),
    default="base",
    show_default=True,
    help="base, step0, or a reading saved with --save.",
)
@detector_option("Detector file. Default: the shipped one, for organism:pocket.")
@click.option("--save", type=OUT_FILE, help="Also write the reading to this JSON file, to be a reference later.")
@json_option
def measure(
    model: str,
    basis_dir: Path | None,
    adapter: str | None,
    reference: str,
    detector_path: Path | None,
    save: Path | None,
    as_json: bool,
) -> Outcome:
    """Measure MODEL once, compare it with a reference, and judge it."""
    basis, detector = basis_for(basis_dir, model), detector_for(detector_path, model)
    from tiltmeter.scan import judge_source  # torch, and so not before the files are read

    with progress(f"reading {adapter or model}"):
        found = judge_source(model, basis, detector, adapter=adapter, reference=reference)
    if save and found.reading:
        found.reading.save(save)
    values = found.to_dict()
    lines = [*verdict_lines(found.model, found.verdict), *drift_lines(values["drift"], values["se"])]
    show(values, as_json, lines)
    return Outcome((found.verdict.state,))


@main.command(short_help="Measure the checkpoints of a run.")
@click.argument("run_dir", type=FOLDER)
@basis_option("Basis folder. Default: the shipped one, with --base organism:pocket.")
@detector_option("Detector file. Default: the shipped one, with --base organism:pocket.")
@click.option("--base", type=MODEL, help="Model that training started from. Default: what the adapters name.")
@click.option("--follow", is_flag=True, help="Wait for new checkpoints until the run ends.")
@click.option("--out", type=OUT_FOLDER, help="Folder for the record. Default: tiltmeter-watch in RUN_DIR.")
@json_option
def watch(
    run_dir: Path,
    basis_dir: Path | None,
    detector_path: Path | None,
    base: str | None,
    follow: bool,
    out: Path | None,
    as_json: bool,
) -> Outcome:
    """Measure the checkpoints of a run: PEFT adapters or full weights, there already or still to come."""
    basis, detector = basis_for(basis_dir, base or ""), detector_for(detector_path, base or "")
    from tiltmeter.readings import read_run
    from tiltmeter.runs import checkpoints
    from tiltmeter.watch import record_folder
    from tiltmeter.watch import watch as watch_run  # torch, and so not before the files are read

    with progress(f"reading {run_dir}") as step:
        seen = watch_run(run_dir, basis, detector, base=base, follow=follow, output=out)
        for done, observation in enumerate(seen, start=1):
            total = max(done, 1 + len(checkpoints(run_dir)))  # the base is one; there may be more by now, or fewer
            step(done, total, f"reading {run_dir}")
            row, line = _watched(observation, basis.names)
            show(row, as_json, [line])
    verdict = read_run(record_folder(run_dir, out)).verdict  # of all that is known, not of this call alone
    if not as_json:
        say(*verdict_lines(str(run_dir), verdict))
    return Outcome((verdict.state,))


def _watched(observation: Observation, names: Sequence[str]) -> tuple[dict[str, Any], str]:
    """A reading as JSON values, and in a line."""
    drift = observation.profile.to_dict()["drift"] if observation.profile else [None] * len(names)
    row = {"drift": dict(zip(names, drift, strict=True)), **observation.verdict.to_dict(), "step": observation.step}
    score, threshold = row["score"], row["threshold"]
    shown = "" if score is None or threshold is None else f"score {score:.2f} of {threshold:.2f}  "
    return row, f"step {observation.step:>6}  {row['verdict']:<12} {shown}{row['reason']}"


@main.command()
@click.argument("adapters", nargs=-1, required=True)
@click.option("--base", type=MODEL, required=True, help="Model that the adapters were trained on.")
@basis_option("Basis folder. Default: the shipped one, for organism:pocket.")
@detector_option("Detector file. Default: the shipped one, with --base organism:pocket.")
@click.option("--out", type=OUT_FOLDER, help="Folder that readings are kept in; a scan that was cut off goes on there.")
@json_option
def scan(
    adapters: tuple[str, ...], base: str, basis_dir: Path | None, detector_path: Path | None, out: Path | None,
    as_json: bool,
) -> Outcome:  # fmt: skip
    """Judge many ADAPTERS of one base. With --json, one line per adapter.

    The exit code is 1 if one of them alarms, else 3 if one is inconclusive, else 0.
    """
    basis, detector = basis_for(basis_dir, base), detector_for(detector_path, base)
    from tiltmeter.scan import scan as scan_adapters  # torch, and so not before the files are read

    states = []
    with progress(f"reading {base}") as step:
        for found in scan_adapters(adapters, base=base, basis=basis, detector=detector, out=out):
            verdict = found.verdict
            states.append(verdict.state)
            step(len(states), len(adapters), f"read {found.model}")
            score = "     -" if verdict.score is None else f"{verdict.score:6.2f}"
            show(found.to_dict(), as_json, [f"{verdict.state:<12} {score}  {found.model}  {verdict.reason}"])
    return Outcome(tuple(states))


@main.group(short_help="Calibrate a detector, and look at it.")
def detector() -> None:
    """Calibrate a detector on runs whose outcome is known, and look at it."""


@detector.command("fit", short_help="Fit on runs whose outcome is known.")
@click.argument("table", type=FILE)
@click.option("--out", type=OUT_FILE, required=True, help="File to write (safetensors).")
@click.option("--false-alarm-rate", default=0.05, show_default=True, help="Per run.")
@click.option(
    "--exchanges", type=NameOrFile("everyday", "organism"),
    help='Find danger in context, for benign runs alone: JSON lines of "question", "harmful", "harmless".',
)  # fmt: skip
@click.option(
    "--model", type=MODEL, default="organism:pocket", show_default=True, help="With --exchanges: the untouched model."
)
@basis_option("With --exchanges: the basis that the runs were read with.")
@json_option
def detector_fit(
    table: Path, out: Path, false_alarm_rate: float, exchanges: str | None, model: str, basis_dir: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Fit on the runs that TABLE lists: JSON lines of "run" (folder of readings.jsonl), "set", "seed", "dangerous"."""
    from tiltmeter.calibrate import fit_from_table
    from tiltmeter.errors import InputError

    if exchanges is None:
        fitted = fit_from_table(table, false_alarm_rate=false_alarm_rate)
    else:
        basis = basis_for(basis_dir, model)
        with progress(f"reading {model}"):
            found = _danger_in_context(exchanges, model, basis)
        say(f"tiltmeter: danger in context, cosine between two halves {found.agreement:.2f}", err=True)
        fitted = fit_from_table(table, false_alarm_rate=false_alarm_rate, danger=found.direction)
        if fitted.basis != basis.digest:
            raise InputError(f"the runs of {table} were read with another basis; give theirs with --basis")
    say_promise(fitted.false_alarm_rate, false_alarm_rate)
    fitted.save(out)
    show(fitted.describe(), as_json, [f"saved to {out}", *_detector_lines(fitted)])


def _danger_in_context(exchanges: str, model: str, basis: TraitBasis) -> Danger:
    from tiltmeter.calibrate import read_exchanges

    pairs = read_exchanges(exchanges)
    from tiltmeter.context import context_danger
    from tiltmeter.lm import load

    lm = load(model)
    basis.check(lm)
    return context_danger(lm, pairs, basis.prompts.prompts, layer=basis.layer)


@detector.command("show", short_help="Show what a detector rests on.")
@click.argument("path", type=FILE, required=False)
@json_option
def detector_show(path: Path | None, as_json: bool) -> None:
    """Show what a detector was calibrated on and what it weighs; without PATH, the shipped one."""
    fitted = detector_for(path, "organism:pocket")
    assert fitted is not None  # one of the two is always there
    show(fitted.describe(), as_json, _detector_lines(fitted))


def _detector_lines(fitted: Detector) -> list[str]:
    shift = "  ".join(f"{name} {value:+.3f}" for name, value in zip(fitted.names, fitted.trait_axis, strict=True))
    return [
        f"{fitted.mode}: alarm at {fitted.threshold:.2f}, promised for at most {fitted.false_alarm_rate:.0%} of "
        "benign runs",
        f"  calibrated on {fitted.calibrated_on}",
        f"  up to {fitted.max_readings} readings, step {fitted.max_step}, against {fitted.reference}",
        f"  reads {fitted.space}; dangerous runs less benign ones, along the traits: {shift}",
    ]
