"""`tiltmeter study NAME`: each study is one library call."""

from __future__ import annotations

from pathlib import Path

import click

from tiltmeter.cli.common import PATH, figure_text, json_option, out_option, progress_bar, show
from tiltmeter.cli.main import main


@main.group()
def study() -> None:
    """Rerun a study; finished parts are not run again."""


@study.command("organism")
@out_option
@click.option("--results", type=PATH, help="JSON file for the figures (docs/results/organism.json).")
@click.option("--detector", "detector_path", type=PATH, help="Also save the calibrated detector here.")
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
    with progress_bar("organism report") as progress:
        found = organism_report.run(config, basis=shipped_basis(), out=out, workers=workers, progress=progress)
    figures = organism_report.figures(found, config)
    rows = write_figures(figures, results or out / "organism.json", command="make organism-report")
    if detector_path:
        found.detector.save(detector_path)
    show(rows, as_json, "\n".join(f"{f.measure:<38} {f.subject:<24} {figure_text(f)}" for f in figures))
