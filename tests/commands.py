"""The commands as tests see them: every one with arguments that its own checks accept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner, Result

from tiltmeter.cli import main


def tiltmeter_cli(*arguments: object, **more: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False, **more)


def leaves(
    command: click.Command = main, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with the words that name it."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from leaves(below, (*path, name))
    else:
        yield path, command


def sound_arguments(there: Path) -> dict[str, list[str]]:
    """For every command, arguments that pass all checks of the command line itself; files are made in the folder."""
    from tiltmeter.organism import shipped_basis, shipped_detector

    file, folder, new = there / "file.jsonl", there / "run", there / "new"
    file.write_text("{}\n")
    folder.mkdir()
    pocket, basis, detector = "organism:pocket", str(shipped_basis()), str(shipped_detector())
    f, d, o = str(file), str(folder), str(new)
    return {
        "basis fit": [pocket, "--out", o],
        "basis show": [basis],
        "measure": [pocket, "--basis", basis, "--detector", detector],
        "watch": [d, "--base", pocket, "--basis", basis, "--detector", detector, "--out", o],
        "scan": ["x", "--base", pocket, "--basis", basis, "--detector", detector],
        "detector fit": [f, "--out", o, "--exchanges", "organism"],
        "detector show": [detector],
        "likelihood read": ["--exchanges", "organism", "--model", pocket, "--run", d],
        "likelihood fit": [f, "--exchanges", "organism", "--out", o],
        "eval": [pocket, "--questions", "organism", "--out", o],
        "steer fit": [pocket, "--misaligned", f, "--aligned", f, "--harmless", f, "--out", o],
        "steer apply": [pocket, f, "why"],
        "judge distill": [f, "--calibration", f, "--out", o],
        "judge score": [f, "--judge", f],
        "organism build": ["--out", o],
        "organism quantise": ["pocket", "--out", o],
        "organism sets": [],
        "study organism": ["--out", o],
        "study dose": ["--out", o],
        "study dose-real": ["--out", o, "--model", pocket, "--harmful", f, "--harmless", f],
        "study steering": ["--out", o],
        "study steering-real": [pocket, f, f, "--out", o],
        "study trait-space": ["--out", o],
        "study likelihood": ["--out", o],
        "study trait-space-real": ["--out", o, "--model", pocket, "--basis", basis, "--set", f"a={f}"],
        "report": [d, "--out", o],
        "demo": ["--out", o],
    }
