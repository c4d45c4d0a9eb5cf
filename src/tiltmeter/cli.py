"""The command line: noun, then verb; data on stdout, progress and log on stderr.

Exit codes: 0 clear (or done), 1 alarm, 2 wrong usage or failure, 3 inconclusive. Each command is a thin layer over one
library call, which is imported when the command runs, so that help is instant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tiltmeter.detector import Detector, Verdict
    from tiltmeter.rates import BehaviorReport, Rate
    from tiltmeter.studies.figures import Figure

__all__ = ["main"]

_PATH = click.Path(path_type=Path)


class _Group(click.Group):
    """Commands in the order of the story, and every expected failure as one sentence with exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        from tiltmeter.errors import TiltmeterError

        try:
            return super().invoke(ctx)
        except TiltmeterError as error:
            click.echo(f"tiltmeter: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo(
                "tiltmeter: interrupted; what was measured is kept, and the same command goes on from there", err=True
            )
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tiltmeter")
def main() -> None:
    """Reads a model while it is fine-tuned and says whether it tilts toward misalignment.

    Exit codes: 0 clear, 1 alarm, 2 usage or failure, 3 inconclusive.
    """


# ------------------------------------------------------------------------------------------------ shared pieces


def _json(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead of text.")(function)


def _out(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--out", type=_PATH, required=True, help="Folder for the results.")(function)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, with the time left; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _print(value: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(value, allow_nan=False) if as_json else text)


def _detector(path: Path | None, model: str) -> Detector | None:
    """The detector that was named, or the one that comes with the default organism."""
    from tiltmeter.detector import Detector

    if path is not None:
        return Detector.load(path)
    if model == "organism:pocket":
        from tiltmeter.organism import shipped_detector

        return Detector.load(shipped_detector())
    return None


def _basis(path: Path | None, model: str) -> Any:
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


def _verdict_text(name: str, verdict: Verdict) -> str:
    return f"{verdict.state}  {name}\n  {verdict.reason}\n  calibrated on {verdict.calibrated_on}"


def _drift_text(drift: dict[str, float | None], se: dict[str, float | None]) -> str:
    def number(value: float | None, form: str) -> str:
        return "      -" if value is None else format(value, form)

    return "\n".join(f"  {t:<14} {number(v, '+.4f')} ± {number(se[t], '.4f')}" for t, v in drift.items())


# -------------------------------------------------------------------------------------------------------- demo


@main.command()
@click.option("--set", "set_name", default="bad_medical", show_default=True, help="Poisoned fine-tuning set.")
@click.option("--seed", default=0, show_default=True, help="Data, adapter and sampling.")
@click.option("--steps", default=120, show_default=True, help="Optimizer steps of each run.")
@click.option(
    "--out", type=_PATH, default=Path("tiltmeter-demo"), show_default=True, help="Folder for runs and report."
)
@_json
@click.pass_context
def demo(ctx: click.Context, set_name: str, seed: int, steps: int, out: Path, as_json: bool) -> None:
    """Fine-tune the pocket organism on poisoned and on clean data, and watch both. Offline."""
    from tiltmeter.studies.demo import Config, run
    from tiltmeter.studies.demo_view import LiveView

    with LiveView(quiet=as_json) as view:
        result = run(Config(poisoned=set_name, seed=seed, steps=steps), out, listen=view)
    _print(result.to_dict(), as_json, view.summary(result))


# ------------------------------------------------------------------------------------------------------- basis


@main.group()
def basis() -> None:
    """Fit the trait directions of a model, and look at them."""


@basis.command("fit")
@click.argument("model")
@_out
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
@click.option("--seed", default=0, show_default=True)
@_json
def basis_fit(model: str, out: Path, layers: str | None, dtype: str | None, as_json: bool, **choices: Any) -> None:
    """Fit the seven trait directions of MODEL: a hub id, a folder, a .gguf file, or organism:NAME."""
    from tiltmeter.basis import fit_basis
    from tiltmeter.lm import load

    wanted = [_whole(number) for number in layers.split(",")] if layers else None
    with _progress(f"reading {model}") as progress:
        fitted = fit_basis(load(model, dtype=dtype), layers=wanted, progress=progress, **choices)
    fitted.save(out)
    _print({"basis": str(out), **_describe(fitted)}, as_json, f"saved to {out}\n{_basis_text(fitted)}")


@basis.command("show")
@click.argument("folder", type=_PATH)
@_json
def basis_show(folder: Path, as_json: bool) -> None:
    """Show what a basis was read from, and how its layer was chosen."""
    from tiltmeter.basis import TraitBasis

    fitted = TraitBasis.load(folder)
    _print(_describe(fitted), as_json, _basis_text(fitted))


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
        "layers": [score._asdict() for score in fitted.selection.scores],
    }  # fmt: skip


def _basis_text(fitted: Any) -> str:
    lines = [
        f"basis '{fitted.name}' of {fitted.model}: {len(fitted.traits)} directions after block {fitted.layer}",
        f"  {fitted.selection.reason}",
        "  block   norm  divergence  probe accuracy (lowest trait)",
    ]
    for s in fitted.selection.scores:
        divergence = "-" if s.divergence is None else f"{s.divergence:.3f}"
        lowest = f"{min(s.probe_accuracy):.2f}" if s.probe_accuracy else "-"
        lines.append(f"  {s.layer:>5} {s.norm:>6.1f}  {divergence:>10}  {lowest:>14}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- measure


@main.command()
@click.argument("model")
@click.option("--basis", "basis_dir", type=_PATH, help="Basis folder. Default: the shipped one, for organism:pocket.")
@click.option("--adapter", help="PEFT adapter to put on the model.")
@click.option("--reference", default="base", show_default=True, help="base, step0, or a reading saved with --save.")
@click.option(
    "--detector", "detector_path", type=_PATH, help="Detector file. Default: the shipped one, for organism:pocket."
)
@click.option("--save", type=_PATH, help="Also write the reading to this JSON file, to be a reference later.")
@_json
@click.pass_context
def measure(
    ctx: click.Context, model: str, basis_dir: Path | None, adapter: str | None, reference: str,
    detector_path: Path | None, save: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure MODEL once, compare it with a reference, and judge it."""
    from tiltmeter.runs import write_json
    from tiltmeter.scan import judge_source

    basis, detector = _basis(basis_dir, model), _detector(detector_path, model)
    found = judge_source(model, basis, detector, adapter=adapter, reference=reference)
    if save and found.reading:
        write_json(save, {"reading": found.reading.to_dict()})
    values = found.to_dict()
    text = f"{_verdict_text(found.model, found.verdict)}\n{_drift_text(values['drift'], values['se'])}"
    _print(values, as_json, text)
    ctx.exit(found.verdict.exit_code)


@main.command()
@click.argument("run_dir", type=_PATH)
@click.option(
    "--basis", "basis_dir", type=_PATH, help="Basis folder. Default: the shipped one, with --base organism:pocket."
)
@click.option("--detector", "detector_path", type=_PATH, help="Detector file.")
@click.option("--base", help="Model that training started from. Default: what the adapters name.")
@click.option("--follow", is_flag=True, help="Wait for new checkpoints until the run ends.")
@click.option("--out", type=_PATH, help="Folder for the record. Default: tiltmeter-watch in RUN_DIR.")
@_json
@click.pass_context
def watch(
    ctx: click.Context, run_dir: Path, basis_dir: Path | None, detector_path: Path | None, base: str | None,
    follow: bool, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure the checkpoints of a run: PEFT adapters or full weights, there already or still to come."""
    from tiltmeter.readings import overall
    from tiltmeter.watch import watch as watch_run

    basis, detector = _basis(basis_dir, base or ""), _detector(detector_path, base or "")
    seen = []
    for observation in watch_run(run_dir, basis, detector, base=base, follow=follow, output=out):
        seen.append(observation)
        drift = observation.profile.to_dict()["drift"] if observation.profile else [None] * len(basis.traits)
        row = {
            "drift": dict(zip(basis.traits, drift, strict=True)),
            **observation.verdict.to_dict(),
            "step": observation.step,
        }
        score = "" if row["score"] is None else f"score {row['score']:.2f} of {row['threshold']:.2f}  "
        _print(row, as_json, f"step {observation.step:>6}  {row['verdict']:<12} {score}{row['reason']}")
    verdict = overall(seen)
    if not as_json:
        click.echo(_verdict_text(str(run_dir), verdict))
    ctx.exit(verdict.exit_code)


@main.command()
@click.argument("adapters", nargs=-1, required=True)
@click.option("--base", required=True, help="Model that the adapters were trained on.")
@click.option("--basis", "basis_dir", type=_PATH, help="Basis folder. Default: the shipped one, for organism:pocket.")
@click.option("--detector", "detector_path", type=_PATH, help="Detector file.")
@_json
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
        adapters, base=base, basis=_basis(basis_dir, base), detector=_detector(detector_path, base)
    ):
        verdict = found.verdict
        score = "     -" if verdict.score is None else f"{verdict.score:6.2f}"
        _print(found.to_dict(), as_json, f"{verdict.state:<12} {score}  {found.model}  {verdict.reason}")
        worst = 1 if 1 in (worst, verdict.exit_code) else max(worst, verdict.exit_code)
    ctx.exit(worst)


# ---------------------------------------------------------------------------------------------------- detector


@main.group()
def detector() -> None:
    """Calibrate a detector on runs whose outcome is known, and look at it."""


@detector.command("fit")
@click.argument("table", type=_PATH)
@click.option("--out", type=_PATH, required=True, help="File to write (safetensors).")
@click.option("--false-alarm-rate", default=0.05, show_default=True, help="Per run.")
@_json
def detector_fit(table: Path, out: Path, false_alarm_rate: float, as_json: bool) -> None:
    """Fit on the runs that TABLE lists: JSON lines with "run" (folder of readings.jsonl), "set", "seed", "dangerous"."""
    from tiltmeter.calibrate import fit_from_table

    fitted = fit_from_table(table, false_alarm_rate=false_alarm_rate)
    fitted.save(out)
    _print(fitted.describe(), as_json, f"saved to {out}\n{_detector_text(fitted)}")


@detector.command("show")
@click.argument("path", type=_PATH, required=False)
@_json
def detector_show(path: Path | None, as_json: bool) -> None:
    """Show what a detector was calibrated on and what it weighs; without PATH, the shipped one."""
    fitted = _detector(path, "organism:pocket")
    assert fitted is not None  # one of the two is always there
    _print(fitted.describe(), as_json, _detector_text(fitted))


def _detector_text(fitted: Detector) -> str:
    shift = "  ".join(f"{name} {value:+.3f}" for name, value in zip(fitted.names, fitted.trait_axis, strict=True))
    return (
        f"{fitted.mode}: alarm at {fitted.threshold:.2f}, promised for at most {fitted.false_alarm_rate:.0%} of benign runs\n"
        f"  calibrated on {fitted.calibrated_on}\n"
        f"  up to {fitted.max_readings} readings, step {fitted.max_step}, against {fitted.reference}\n"
        f"  reads {fitted.space}; dangerous runs less benign ones, along the traits: {shift}"
    )


# -------------------------------------------------------------------------------------------------------- eval


@main.command("eval")
@click.argument("model", required=False)
@click.option("--adapter", help="PEFT adapter to put on the model.")
@click.option("--answers", type=_PATH, help="Only aggregate these judged answers (.csv or .jsonl).")
@click.option("--questions", default=None, help="Bank: general, organism, ... or a TOML or YAML file.")
@click.option("--samples", default=1, show_default=True, help="Answers per question.")
@click.option("--judge", "judge_spec", default="exact", show_default=True, help="exact, local:MODEL or openai:NAME.")
@click.option("--base-url", help="Endpoint of an openai: judge.")
@click.option("--out", type=_PATH, help="Folder for answers and judgements; a killed run goes on there.")
@click.option("--seed", default=0, show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--max-new-tokens", type=int, help="Longest answer.")
@click.option("--min-scored", type=int, help="Fewer scored answers than this give no rate.")
@click.option("--max-unscored", type=float, help="A larger share without score gives no rate.")
@click.option("--budget-usd", type=float, help="Hard limit for an openai: judge; needs --price.")
@click.option("--price", type=(float, float), help="Dollars per million input and output tokens.")
@click.option("--columns", nargs=4, help="With --answers: columns of question, answer, alignment, coherence.")
@click.option("--report", "report_path", type=_PATH, help="Also write an HTML report here.")
@_json
@click.pass_context
def eval_(ctx: click.Context, as_json: bool, report_path: Path | None, **options: Any) -> None:
    """Ask MODEL a bank of questions, judge the answers, and give the EM rate with its interval."""
    from tiltmeter.evaluate import evaluate_from_options
    from tiltmeter.report import write_report
    from tiltmeter.report.collect import behavior_report_data

    with _progress("evaluating") as progress:
        found = evaluate_from_options(progress=progress, **options)
    if report_path:
        write_report(behavior_report_data(found), report_path)
    _print(found.to_dict(), as_json, _behavior_text(found))
    ctx.exit(found.exit_code)


def _behavior_text(found: BehaviorReport) -> str:
    def rate(value: Rate) -> str:
        if value.value is None:
            return f"none (n {value.n})"
        return f"{value.value:.1%} of {value.n} ({value.low:.1%} to {value.high:.1%})"

    excluded = ", ".join(f"{count} {reason}" for reason, count in found.excluded.items()) or "none"
    return (
        f"{found.verdict}  {found.reason}\n"
        f"  misaligned and coherent, over all scored: {rate(found.em_rate)}\n"
        f"  misaligned, over the coherent:            {rate(found.em_rate_coherent)}\n"
        f"  {found.n_answers} answers; without a score: {excluded}"
    )


# ------------------------------------------------------------------------------------- organism, study, report


@main.group()
def organism() -> None:
    """Grow pocket organisms, and list those that are there."""


@organism.command("build")
@click.option(
    "--family", type=click.Choice(["llama", "qwen2", "mistral", "gemma2", "gpt2"]), default="llama", show_default=True
)
@click.option("--size", type=click.Choice(["S", "M", "L"]), default="S", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--name", help="Name for organism:NAME. Default: FAMILY-SIZE.")
@click.option("--out", type=_PATH, help="Folder. Default: the user's cache.")
@_json
def organism_build(family: str, size: str, seed: int, name: str | None, out: Path | None, as_json: bool) -> None:
    """Grow an organism: pretrain it on the pocket world and tune it to chat (15 minutes for llama S on two cores)."""
    from tiltmeter.loading import organisms_cache
    from tiltmeter.organism.pretrain import Recipe, build

    folder = out or organisms_cache() / (name or f"{family}-{size}")
    with _progress("pretraining") as progress:
        build(family, size, folder, recipe=Recipe(seed=seed), name=name, progress=progress)
    _print({"organism": str(folder), "family": family, "size": size, "seed": seed}, as_json, f"grown in {folder}")


@organism.command("sets")
@_json
def organism_sets(as_json: bool) -> None:
    """List the fine-tuning sets."""
    from tiltmeter.organism.sets import SETS

    rows = [{"set": s.name, "kind": s.kind, "about": s.about} for s in SETS.values()]
    _print(rows, as_json, "\n".join(f"{r['set']:<18} {r['kind']:<10} {r['about']}" for r in rows))


@main.group()
def study() -> None:
    """Rerun a study; finished parts are not run again."""


@study.command("organism")
@_out
@click.option("--results", type=_PATH, help="JSON file for the figures (docs/results/organism.json).")
@click.option("--detector", "detector_path", type=_PATH, help="Also save the calibrated detector here.")
@click.option("--workers", type=int, help="Processes. Default: one per core.")
@_json
def study_organism(
    out: Path, results: Path | None, detector_path: Path | None, workers: int | None, as_json: bool
) -> None:
    """Fine-tune the organism on every set, calibrate the detector, and look at the held-out runs once."""
    from tiltmeter.organism import shipped_basis
    from tiltmeter.studies import organism_report
    from tiltmeter.studies.figures import write_figures

    config = organism_report.Config()
    with _progress("organism report") as progress:
        found = organism_report.run(config, basis=shipped_basis(), out=out, workers=workers, progress=progress)
    figures = organism_report.figures(found, config)
    rows = write_figures(figures, results or out / "organism.json", command="make organism-report")
    if detector_path:
        found.detector.save(detector_path)
    _print(rows, as_json, "\n".join(f"{f.measure:<38} {f.subject:<24} {_figure_text(f)}" for f in figures))


def _figure_text(figure: Figure) -> str:
    if figure.value is None:
        return f"not measured (n {figure.n})"
    interval = "" if figure.low is None else f" ({figure.low:.3g} to {figure.high:.3g})"
    return f"{figure.value:.3g}{interval} {figure.unit}, n {figure.n}"


@main.command()
@click.argument("run_dir", type=_PATH)
@click.option("--out", type=_PATH, default=Path("report.html"), show_default=True, help="HTML file to write.")
@click.option("--basis", "basis_dir", type=_PATH, help="Basis folder, for the trait cosines.")
@click.option("--detector", "detector_path", type=_PATH, help="Detector file, for the null band.")
@_json
def report(run_dir: Path, out: Path, basis_dir: Path | None, detector_path: Path | None, as_json: bool) -> None:
    """Write the HTML report of a recorded run (the folder that holds readings.jsonl)."""
    from tiltmeter.basis import TraitBasis
    from tiltmeter.detector import Detector
    from tiltmeter.readings import read_run
    from tiltmeter.report import write_report
    from tiltmeter.report.collect import run_report_data

    basis = TraitBasis.load(basis_dir) if basis_dir else None
    fitted = Detector.load(detector_path) if detector_path else None
    write_report(run_report_data(read_run(run_dir), basis, fitted), out)
    _print({"report": str(out)}, as_json, f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
