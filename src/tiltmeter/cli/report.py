"""`tiltmeter report`."""

from __future__ import annotations

from pathlib import Path

import click

from tiltmeter.cli.common import PATH, json_option, show
from tiltmeter.cli.main import main


@main.command()
@click.argument("run_dir", type=PATH)
@click.option("--out", type=PATH, default=Path("report.html"), show_default=True, help="HTML file to write.")
@click.option("--basis", "basis_dir", type=PATH, help="Basis folder, for the trait cosines.")
@click.option("--detector", "detector_path", type=PATH, help="Detector file, for the null band.")
@json_option
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
    show({"report": str(out)}, as_json, f"wrote {out}")
