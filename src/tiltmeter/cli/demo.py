"""`tiltmeter demo`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from tiltmeter.cli.common import json_option, show
from tiltmeter.cli.paths import OUT_FOLDER
from tiltmeter.cli.progress import in_lines
from tiltmeter.cli.root import main
from tiltmeter.cli.terminal import raw_stderr


@main.command(short_help="Fine-tune the pocket organism twice, and watch.")
@click.option("--set", "set_name", default="bad_medical", show_default=True, help="Poisoned fine-tuning set.")
@click.option("--seed", default=0, show_default=True, help="Data, adapter and sampling.")
@click.option("--steps", default=120, show_default=True, help="Optimizer steps of each run.")
@click.option(
    "--out", type=OUT_FOLDER, default=Path("tiltmeter-demo"), show_default=True, help="Folder for runs and report."
)
@json_option
def demo(set_name: str, seed: int, steps: int, out: Path, as_json: bool) -> None:
    """Fine-tune the pocket organism on poisoned and on clean data, and watch both. Offline."""
    from tiltmeter.studies.demo import Config, run
    from tiltmeter.studies.demo_view import LiveView

    with ExitStack() as stack:
        stderr = raw_stderr()
        step = None if stderr.isatty() else stack.enter_context(in_lines("demo"))  # there the view has a bar
        view = stack.enter_context(LiveView(quiet=as_json, stream=stderr, progress=step))
        result = run(Config(poisoned=set_name, seed=seed, steps=steps), out, listen=view)
    show(result.to_dict(), as_json, view.summary(result))
