"""`tiltmeter report`."""

from __future__ import annotations

from pathlib import Path

import click

from tiltmeter.cli.common import basis_option, detector_option, json_option, show
from tiltmeter.cli.paths import FILE_OR_FOLDER, OUT_FILE
from tiltmeter.cli.progress import progress
from tiltmeter.cli.root import main


@main.command(short_help="Write the HTML report of a recorded run.")
@click.argument("run_dir", type=FILE_OR_FOLDER)
@click.option("--out", type=OUT_FILE, default=Path("report.html"), show_default=True, help="HTML file to write.")
@basis_option("Basis folder, for the trait cosines.")
@detector_option("Detector file, for the null band.")
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
    with progress("writing the report"):
        write_report(run_report_data(read_run(run_dir), basis, fitted), out)
    show({"report": str(out)}, as_json, [f"wrote {out}"])
