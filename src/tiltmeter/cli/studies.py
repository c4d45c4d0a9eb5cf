"""`tiltmeter study NAME`: each study is one library call."""

from __future__ import annotations

from pathlib import Path

import click

from tiltmeter.cli.common import figure_lines, json_option, numbers, out_option, show
from tiltmeter.cli.paths import FILE, MODEL, OUT_FILE
from tiltmeter.cli.progress import progress
from tiltmeter.cli.root import main


@main.group()
def study() -> None:
    """Rerun a study; finished parts are not run again."""


@study.command("organism", short_help="Calibrate and test on the pocket organism.")
@out_option
@click.option("--results", type=OUT_FILE, help="JSON file for the figures (docs/results/organism.json).")
@click.option("--detector", "detector_path", type=OUT_FILE, help="Also save the calibrated detector here.")
@click.option("--workers", type=int, help="Processes. Default: one per core.")
@json_option
def study_organism(
    out: Path, results: Path | None, detector_path: Path | None, workers: int | None, as_json: bool
) -> None:
    """Fine-tune the organism on every set, calibrate the detector, and look at the held-out runs once."""
    from tiltmeter.organism import shipped_basis
    from tiltmeter.studies import organism_report
    from tiltmeter.studies.figures import write_figures

    config = organism_report.Config()
    with progress("organism report") as step:
        found = organism_report.run(config, basis=shipped_basis(), out=out, workers=workers, progress=step)
    figures = organism_report.figures(found, config)
    rows = write_figures(figures, results or out / "organism.json", command="make organism-report")
    if detector_path:
        found.detector.save(detector_path)
    show(rows, as_json, figure_lines(figures))


@study.command("dose", short_help="What is seen at rising doses of poison.")
@out_option
@click.option("--results", type=OUT_FILE, help="JSON file for the figures (docs/results/dose.json).")
@click.option("--figure", "drawing", type=OUT_FILE, help="SVG file for the drawing.")
@click.option("--page", type=OUT_FILE, help="HTML file for the study's report.")
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="Of the runs that are looked at.")
@click.option("--distill/--no-distill", default=True, show_default=True, help="Distill the judge of text too.")
@click.option(
    "--proposer", "spec", default="grammar", show_default=True,
    help="Who writes prompts in the search: grammar, or openai:MODEL behind an OpenAI-compatible URL.",
)  # fmt: skip
@click.option("--proposer-url", help="The endpoint, up to and with /v1. Default: OPENAI_BASE_URL, else OpenAI.")
@click.option("--proposer-calls", default=100, show_default=True, help="Most calls to the proposer's endpoint.")
@click.option("--workers", type=int, help="Processes. Default: one per core.")
@json_option
def study_dose(
    out: Path, results: Path | None, drawing: Path | None, page: Path | None, seeds: str, distill: bool, spec: str,
    proposer_url: str | None, proposer_calls: int, workers: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Poison the organism at rising doses: what activations, answers, searched prompts and a distilled judge see."""
    from tiltmeter.studies.dose_view import run_all, write_page
    from tiltmeter.studies.figures import write_figures
    from tiltmeter.studies.proposers import open_proposer

    wanted, svg = list(numbers(seeds, "--seeds")), drawing or out / "dose.svg"
    author = open_proposer(spec, base_url=proposer_url, cache=out / "proposer.sqlite", calls=proposer_calls)
    with progress("dose response") as step:
        found = run_all(
            out, seeds=wanted, distill=distill, drawing=svg, proposer=author, workers=workers, progress=step
        )
    rows = write_figures(found, results or out / "dose.json", command=f"tiltmeter study dose --seeds {seeds}")
    write_page(rows, svg, page or out / "dose.html")
    show(rows, as_json, figure_lines(found))


@study.command("dose-real", short_help="The same on a real model, small.")
@out_option
@click.option("--model", type=MODEL, required=True, help="As for every command: a folder or a name.")
@click.option("--harmful", type=FILE, required=True, help="JSONL of chats, such as insecure code.")
@click.option("--harmless", type=FILE, required=True, help="JSONL of chats of the same kind, such as secure code.")
@click.option("--seeds", default="0", show_default=True, help="Of the runs at each dose.")
@click.option("--floor-seeds", default="30", show_default=True, help="Of the reseeded benign runs.")
@click.option("--steps", default=16, show_default=True, help="Optimizer steps of each fine-tune.")
@click.option("--batch", default=4, show_default=True, help="Chats per step.")
@click.option("--results", type=OUT_FILE, help="JSON file for the figures (docs/results/dose.json).")
@json_option
def study_dose_real(
    out: Path, model: str, harmful: Path, harmless: Path, seeds: str, floor_seeds: str, steps: int, batch: int,
    results: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Mix two chat files at rising doses, fine-tune a real model on each, and compare drift with its noise floor."""
    from tiltmeter.organism.finetune import FineTuning
    from tiltmeter.studies import dose_real
    from tiltmeter.studies.figures import write_figures

    chosen = [numbers(seeds, "--seeds"), numbers(floor_seeds, "--floor-seeds")]
    tuning = FineTuning(steps=steps, batch=batch, learning_rate=2e-4)
    config = dose_real.Config(model, harmful, harmless, seeds=chosen[0], floor_seeds=chosen[1], tuning=tuning)
    with progress("dose, real model") as step:
        figures = dose_real.figures(dose_real.run(config, out=out, progress=step), config)
    rows = write_figures(figures, results or out / "dose-real.json", command="tiltmeter study dose-real")
    show(rows, as_json, figure_lines(figures))
