"""`tiltmeter study trait-space`."""

from __future__ import annotations

from pathlib import Path

import click

from tiltmeter.cli.common import figure_lines, json_option, numbers, out_option, show
from tiltmeter.cli.paths import FILE, FOLDER, MODEL, OUT_FILE
from tiltmeter.cli.progress import progress
from tiltmeter.cli.studies import study


@study.command("trait-space", short_help="Geometry, detectors, transfer, stress.")
@out_option
@click.option("--seconds", type=float, help="Start no new run after so long, and report those that there are.")
@click.option("--brief", is_flag=True, help="Judge answers midway for the first organism only: half the time.")
@click.option("--look", is_flag=True, help="Score the held-out runs too. Every look is counted in docs/log.md.")
@click.option("--results", type=OUT_FILE, help="JSON file for the figures (docs/results/trait_space.json).")
@click.option("--page", type=OUT_FILE, help="HTML file for the study's report.")
@json_option
def study_trait_space(
    out: Path, seconds: float | None, brief: bool, look: bool, results: Path | None, page: Path | None, as_json: bool
) -> None:
    """Geometry, detectors, readouts, transfer, sequential tests and stress, on runs of several organisms."""
    from tiltmeter.studies.figures import write_figures
    from tiltmeter.studies.trait_run import run
    from tiltmeter.studies.trait_space import Config
    from tiltmeter.studies.trait_view import write_page

    with progress("trait space") as step:
        found = run(Config(brief=brief), out, seconds=seconds, look=look, progress=step)
    command = "tiltmeter study trait-space" + brief * " --brief" + look * " --look"
    rows = write_figures(found.figures, results or out / "trait_space.json", command=command)
    write_page(found, page or out / "trait_space.html")
    show(rows, as_json, figure_lines(found.figures))


@study.command("trait-space-real", short_help="The same on a real model, small.")
@out_option
@click.option("--model", type=MODEL, required=True, help="Folder, Hub name or GGUF file.")
@click.option("--basis", type=FOLDER, required=True, help="Folder of the model's basis (tiltmeter basis fit).")
@click.option(
    "--set", "sets", multiple=True, required=True, metavar="NAME=FILE",
    help="JSONL of chats, or question and answer. Needed: insecure, secure, educational; jailbroken and others help.",
)  # fmt: skip
@click.option("--seeds", default="0,1", show_default=True, help="Of every set; at least two.")
@click.option("--results", type=OUT_FILE, help="JSON file to add the figures to (docs/results/trait_space.json).")
@click.option(
    "--readings", type=OUT_FILE, help="Parquet file for the readings (docs/results/trait_space_real.parquet)."
)
@json_option
def study_trait_space_real(
    out: Path, model: str, basis: Path, sets: tuple[str, ...], seeds: str, results: Path | None, readings: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """The same on a real model, small: is insecure code told from secure and educational code at the same step?"""
    pairs = [item.partition("=") for item in sets]
    if any(not name or not file for name, _, file in pairs):
        raise click.BadParameter(f"{', '.join(sets)}; write NAME=FILE", param_hint="--set")
    chosen = numbers(seeds, "--seeds")
    files = {name: FILE.convert(file, None, None) for name, _, file in pairs}
    from tiltmeter.studies.figures import write_figures
    from tiltmeter.studies.trait_real import Config, collect, figures, write_runs

    config = Config(model, basis, files, seeds=chosen)
    with progress("trait space, real model") as step:
        runs = collect(config, out, progress=step)
    write_runs(runs, readings or out / "trait_space_real.parquet")
    found = figures(runs, config)
    rows = write_figures(found, results or out / "trait_space.json", command="tiltmeter study trait-space-real")
    show(rows, as_json, figure_lines(found))


@study.command("likelihood", short_help="Likelihood of harmful answers on a new model.")
@out_option
@click.option("--seconds", type=float, help="Start no new run and no new reading after so long.")
@click.option("--look", is_flag=True, help="Judge the fresh sets' runs too. Every look is counted in docs/log.md.")
@click.option("--results", type=OUT_FILE, help="JSON file to add the figures to (docs/results/trait_space.json).")
@json_option
def study_likelihood(out: Path, seconds: float | None, look: bool, results: Path | None, as_json: bool) -> None:
    """Likelihood of harmful answers on a new model, from its benign runs alone; OUT is that of `study trait-space`."""
    from tiltmeter.studies.figures import write_figures
    from tiltmeter.studies.likelihoods import Config, collect, figures
    from tiltmeter.studies.trait_space import collect as collect_runs

    config = Config()
    with progress("likelihood") as step:
        runs = collect_runs(config.trait_space, out, seconds=seconds, progress=step)
        found = figures(config, collect(config, runs, out, seconds=seconds, progress=step), look=look)
    command = "tiltmeter study likelihood" + look * " --look"
    rows = write_figures(found, results or out / "likelihood.json", command=command)
    show(rows, as_json, figure_lines(found))
