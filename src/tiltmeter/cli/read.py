"""Commands that read models: basis, measure, watch, scan, and the detector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiltmeter.cli.common import (
    PATH,
    basis_for,
    detector_for,
    drift_text,
    json_option,
    out_option,
    progress_bar,
    say_promise,
    show,
    verdict_text,
)
from tiltmeter.cli.main import main

if TYPE_CHECKING:
    from tiltmeter.basis import TraitBasis
    from tiltmeter.detector import Detector
    from tiltmeter.transfer import Danger


@main.group()
def basis() -> None:
    """Fit the trait directions of a model, and look at them."""


@basis.command("fit")
@click.argument("model")
@out_option
@click.option("--traits", help="Trait set: alignment, semantic, organism, or a TOML file.")
@click.option("--prompts", help="Measurement prompts: neutral, organism, or a TOML file.")
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
    from tiltmeter.basis import fit_basis
    from tiltmeter.lm import load

    wanted = [_whole(number) for number in layers.split(",")] if layers else None
    with progress_bar(f"reading {model}") as progress:
        fitted = fit_basis(load(model, dtype=dtype), layers=wanted, progress=progress, **choices)
    fitted.save(out)
    show({"basis": str(out), **_describe(fitted)}, as_json, f"saved to {out}\n{_basis_text(fitted)}")


@basis.command("show")
@click.argument("folder", type=PATH)
@json_option
def basis_show(folder: Path, as_json: bool) -> None:
    """Show what a basis was read from, and how its layer was chosen."""
    from tiltmeter.basis import TraitBasis

    fitted = TraitBasis.load(folder)
    show(_describe(fitted), as_json, _basis_text(fitted))


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"'{text}' is no whole number; give blocks such as 12,14,16") from None


def _describe(fitted: Any) -> dict[str, Any]:
    return {
        "model": fitted.model, "name": fitted.name, "layer": fitted.layer, "traits": list(fitted.traits),
        "method": fitted.method, "pooling": fitted.pooling, "reference_norm": fitted.reference_norm,
        "n_prompts": len(fitted.prompts.prompts), "poles": fitted.poles.tolist(), "cosines": fitted.cosines.tolist(),
        "fingerprint": fitted.fingerprint.to_dict(), "digest": fitted.digest, "reason": fitted.selection.reason,
        "batches": fitted.plan.reason,
        "layers": [score._asdict() for score in fitted.selection.scores],
    }  # fmt: skip


def _basis_text(fitted: Any) -> str:
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
    return "\n".join(lines)


@main.command()
@click.argument("model")
@click.option("--basis", "basis_dir", type=PATH, help="Basis folder. Default: the shipped one, for organism:pocket.")
@click.option("--adapter", help="PEFT adapter to put on the model.")
@click.option("--reference", default="base", show_default=True, help="base, step0, or a reading saved with --save.")
@click.option(
    "--detector", "detector_path", type=PATH, help="Detector file. Default: the shipped one, for organism:pocket."
)
@click.option("--save", type=PATH, help="Also write the reading to this JSON file, to be a reference later.")
@json_option
@click.pass_context
def measure(
    ctx: click.Context, model: str, basis_dir: Path | None, adapter: str | None, reference: str,
    detector_path: Path | None, save: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure MODEL once, compare it with a reference, and judge it."""
    from tiltmeter.runs import write_json
    from tiltmeter.scan import judge_source

    basis, detector = basis_for(basis_dir, model), detector_for(detector_path, model)
    found = judge_source(model, basis, detector, adapter=adapter, reference=reference)
    if save and found.reading:
        write_json(save, {"reading": found.reading.to_dict()})
    values = found.to_dict()
    text = f"{verdict_text(found.model, found.verdict)}\n{drift_text(values['drift'], values['se'])}"
    show(values, as_json, text)
    ctx.exit(found.verdict.exit_code)


@main.command()
@click.argument("run_dir", type=PATH)
@click.option(
    "--basis", "basis_dir", type=PATH, help="Basis folder. Default: the shipped one, with --base organism:pocket."
)
@click.option("--detector", "detector_path", type=PATH, help="Detector file.")
@click.option("--base", help="Model that training started from. Default: what the adapters name.")
@click.option("--follow", is_flag=True, help="Wait for new checkpoints until the run ends.")
@click.option("--out", type=PATH, help="Folder for the record. Default: tiltmeter-watch in RUN_DIR.")
@json_option
@click.pass_context
def watch(
    ctx: click.Context, run_dir: Path, basis_dir: Path | None, detector_path: Path | None, base: str | None,
    follow: bool, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure the checkpoints of a run: PEFT adapters or full weights, there already or still to come."""
    from tiltmeter.readings import read_run
    from tiltmeter.watch import record_folder
    from tiltmeter.watch import watch as watch_run

    basis, detector = basis_for(basis_dir, base or ""), detector_for(detector_path, base or "")
    for observation in watch_run(run_dir, basis, detector, base=base, follow=follow, output=out):
        drift = observation.profile.to_dict()["drift"] if observation.profile else [None] * len(basis.traits)
        row = {
            "drift": dict(zip(basis.traits, drift, strict=True)),
            **observation.verdict.to_dict(),
            "step": observation.step,
        }
        score = "" if row["score"] is None else f"score {row['score']:.2f} of {row['threshold']:.2f}  "
        show(row, as_json, f"step {observation.step:>6}  {row['verdict']:<12} {score}{row['reason']}")
    verdict = read_run(record_folder(run_dir, out)).verdict  # of all that is known, not of this call alone
    if not as_json:
        click.echo(verdict_text(str(run_dir), verdict))
    ctx.exit(verdict.exit_code)


@main.command()
@click.argument("adapters", nargs=-1, required=True)
@click.option("--base", required=True, help="Model that the adapters were trained on.")
@click.option("--basis", "basis_dir", type=PATH, help="Basis folder. Default: the shipped one, for organism:pocket.")
@click.option("--detector", "detector_path", type=PATH, help="Detector file.")
@json_option
@click.pass_context
def scan(
    ctx: click.Context,
    adapters: tuple[str, ...],
    base: str,
    basis_dir: Path | None,
    detector_path: Path | None,
    as_json: bool,
) -> None:
    """Judge many ADAPTERS of one base. With --json, one line per adapter."""
    from tiltmeter.scan import scan as scan_adapters

    worst = 0
    for found in scan_adapters(
        adapters, base=base, basis=basis_for(basis_dir, base), detector=detector_for(detector_path, base)
    ):
        verdict = found.verdict
        score = "     -" if verdict.score is None else f"{verdict.score:6.2f}"
        show(found.to_dict(), as_json, f"{verdict.state:<12} {score}  {found.model}  {verdict.reason}")
        worst = 1 if 1 in (worst, verdict.exit_code) else max(worst, verdict.exit_code)
    ctx.exit(worst)


@main.group()
def detector() -> None:
    """Calibrate a detector on runs whose outcome is known, and look at it."""


@detector.command("fit")
@click.argument("table", type=PATH)
@click.option("--out", type=PATH, required=True, help="File to write (safetensors).")
@click.option("--false-alarm-rate", default=0.05, show_default=True, help="Per run.")
@click.option(
    "--exchanges", type=PATH,
    help='Find danger in context, for benign runs alone: JSON lines of "question", "harmful", "harmless".',
)  # fmt: skip
@click.option("--model", default="organism:pocket", show_default=True, help="With --exchanges: the untouched model.")
@click.option("--basis", "basis_dir", type=PATH, help="With --exchanges: the basis that the runs were read with.")
@json_option
def detector_fit(
    table: Path, out: Path, false_alarm_rate: float, exchanges: Path | None, model: str, basis_dir: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Fit on the runs that TABLE lists: JSON lines of "run" (folder of readings.jsonl), "set", "seed", "dangerous"."""
    from tiltmeter.calibrate import fit_from_table
    from tiltmeter.errors import InputError

    if exchanges is None:
        fitted = fit_from_table(table, false_alarm_rate=false_alarm_rate)
    else:
        basis = basis_for(basis_dir, model)
        found = _danger_in_context(exchanges, model, basis)
        click.echo(f"tiltmeter: danger in context, cosine between two halves {found.agreement:.2f}", err=True)
        fitted = fit_from_table(table, false_alarm_rate=false_alarm_rate, danger=found.direction)
        if fitted.basis != basis.digest:
            raise InputError(f"the runs of {table} were read with another basis; give theirs with --basis")
    say_promise(fitted.false_alarm_rate, false_alarm_rate)
    fitted.save(out)
    show(fitted.describe(), as_json, f"saved to {out}\n{_detector_text(fitted)}")


def _danger_in_context(exchanges: Path, model: str, basis: TraitBasis) -> Danger:
    from tiltmeter.calibrate import read_exchanges
    from tiltmeter.context import context_danger
    from tiltmeter.lm import load

    lm = load(model)
    basis.check(lm)
    return context_danger(lm, read_exchanges(exchanges), basis.prompts.prompts, layer=basis.layer)


@detector.command("show")
@click.argument("path", type=PATH, required=False)
@json_option
def detector_show(path: Path | None, as_json: bool) -> None:
    """Show what a detector was calibrated on and what it weighs; without PATH, the shipped one."""
    fitted = detector_for(path, "organism:pocket")
    assert fitted is not None  # one of the two is always there
    show(fitted.describe(), as_json, _detector_text(fitted))


def _detector_text(fitted: Detector) -> str:
    shift = "  ".join(f"{name} {value:+.3f}" for name, value in zip(fitted.names, fitted.trait_axis, strict=True))
    return (
        f"{fitted.mode}: alarm at {fitted.threshold:.2f}, promised for at most {fitted.false_alarm_rate:.0%} of "
        "benign runs\n"
        f"  calibrated on {fitted.calibrated_on}\n"
        f"  up to {fitted.max_readings} readings, step {fitted.max_step}, against {fitted.reference}\n"
        f"  reads {fitted.space}; dangerous runs less benign ones, along the traits: {shift}"
    )
