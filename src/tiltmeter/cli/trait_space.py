"""`tiltmeter study trait-space`."""

from __future__ import annotations

from pathlib import Path

import click

from tiltmeter.cli.common import PATH, figure_text, json_option, out_option, progress_bar, show
from tiltmeter.cli.studies import study


@study.command("trait-space")
@out_option
@click.option("--seconds", type=float, help="Start no new run after so long, and report those that there are.")
@click.option("--brief", is_flag=True, help="Judge answers midway for the first organism only: half the time.")
@click.option("--look", is_flag=True, help="Score the held-out runs too. Every look is counted in docs/log.md.")
@click.option("--results", type=PATH, help="JSON file for the figures (docs/results/trait_space.json).")
@click.option("--page", type=PATH, help="HTML file for the study's report.")
@json_option
def study_trait_space(
    out: Path, seconds: float | None, brief: bool, look: bool, results: Path | None, page: Path | None, as_json: bool
) -> None:
    """Geometry, detectors, readouts, transfer, sequential tests and stress, on runs of several organisms."""
    from tiltmeter.studies.figures import write_figures
    from tiltmeter.studies.trait_run import run
    from tiltmeter.studies.trait_space import Config
    from tiltmeter.studies.trait_view import write_page

    with progress_bar("trait space") as progress:
        found = run(Config(brief=brief), out, seconds=seconds, look=look, progress=progress)
    command = "tiltmeter study trait-space" + brief * " --brief" + look * " --look"
    rows = write_figures(found.figures, results or out / "trait_space.json", command=command)
    write_page(found, page or out / "trait_space.html")
    show(
        rows,
        as_json,
        "\n".join(f"{f.measure:<34} {f.subject:<60} {f.split:<22} {figure_text(f)}" for f in found.figures),
    )
