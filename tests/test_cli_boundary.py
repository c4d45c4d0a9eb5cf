"""Exit codes: 1 comes from a verdict and from nowhere else, whatever is raised, given or broken."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

import tiltmeter.cli
from commands import leaves, sound_arguments, tiltmeter_cli
from tiltmeter.cli.root import Outcome
from tiltmeter.errors import InputError

CLI = Path(tiltmeter.cli.__file__).parent


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return sound_arguments(tmp_path_factory.mktemp("sound"))


class Odd(BaseException):
    """No Exception, and it cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


RAISED = [
    ValueError("got 3\nand a second line"),
    TypeError("'NoneType' object is not subscriptable"),
    KeyError("weights"),
    AssertionError(),
    ZeroDivisionError("division by zero"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    OSError(28, "No space left on device", "x"),
    PermissionError(13, "Permission denied", "x"),
    BrokenPipeError(32, "Broken pipe"),
    EOFError(),
    KeyboardInterrupt(),
    GeneratorExit(),
    StopIteration(),
    SystemExit(1),
    SystemExit(0),
    SystemExit(None),
    SystemExit("a library gave up"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore"),
    np.linalg.LinAlgError("singular"),
    UserWarning("a warning that is an error"),
    ImportError("no module"),
    InputError("an error of ours"),
    Odd(),
    click.Abort(),
    click.exceptions.Exit(0),
    click.exceptions.Exit(1),
    click.exceptions.Exit(3),
    click.ClickException("a click error"),
    click.FileError("x", "gone"),
    ExceptionGroup("several", [ValueError("a")]),
    Exception("x" * 5000),
]


def test_the_table_of_sound_arguments_covers_every_command(sound: dict[str, list[str]]) -> None:
    assert set(sound) == {" ".join(path) for path, _ in leaves()}


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_whatever_a_command_raises_is_exit_code_2_and_one_line(
    error: BaseException, sound: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    for path, command in leaves():
        monkeypatch.setattr(command, "callback", fail)
        found = tiltmeter_cli(*path, *sound[" ".join(path)])
        assert (found.exit_code, found.stdout) == (2, ""), path
        assert found.stderr.startswith("tiltmeter: "), path
        assert found.stderr.count("\n") == 1
        assert len(found.stderr) <= 301


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_whatever_a_callback_of_an_option_raises_is_exit_code_2(
    error: BaseException, sound: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    command = dict(leaves())["measure",]
    monkeypatch.setattr(next(p for p in command.params if p.name == "reference"), "callback", fail)
    code = tiltmeter_cli("measure", *sound["measure"]).exit_code
    assert code == (0 if isinstance(error, click.exceptions.Exit) and error.exit_code == 0 else 2)  # as after --help


def test_an_error_inside_the_library_is_exit_code_2_and_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise LookupError("a fault nobody foresaw")

    monkeypatch.setattr("tiltmeter.scan.judge_source", fail)
    plain = tiltmeter_cli("measure", "organism:pocket")
    assert (plain.exit_code, plain.stdout) == (2, "")
    assert "unexpected LookupError: a fault nobody foresaw; nothing was judged" in plain.stderr
    assert "Traceback" not in plain.stderr
    for shown in (
        tiltmeter_cli("--debug", "measure", "organism:pocket"),
        tiltmeter_cli("measure", "--debug", "organism:pocket"),
        tiltmeter_cli("measure", "organism:pocket", "--debug"),
        tiltmeter_cli("measure", "organism:pocket", env={"TILTMETER_DEBUG": "1"}),
    ):
        assert shown.exit_code == 2
        assert "Traceback (most recent call last)" in shown.stderr
        assert "a fault nobody foresaw" in shown.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (("CLEAR",), 0),
        (("CLEAR", "CLEAR"), 0),
        (("ALARM",), 1),
        (("INCONCLUSIVE",), 3),
        ((None,), 3),
        ((), 3),
        (("CLEAR", "INCONCLUSIVE"), 3),
        (("INCONCLUSIVE", "CLEAR"), 3),
        (("CLEAR", None), 3),
        (("INCONCLUSIVE", "ALARM", "CLEAR"), 1),
        ((None, "ALARM"), 1),
        (("clear",), 3),
        (("something else",), 3),
    ],
)
def test_of_several_models_an_alarm_counts_then_what_is_inconclusive(states: tuple[str | None, ...], code: int) -> None:
    assert Outcome(states).exit_code == code


@pytest.mark.parametrize("states", [["CLEAR", "INCONCLUSIVE"], ["CLEAR", "ALARM", "INCONCLUSIVE"], ["CLEAR"]])
def test_scan_ends_with_the_worst_of_its_models(states: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tiltmeter.detector import State, Verdict
    from tiltmeter.scan import Finding

    def several(adapters: tuple[str, ...], **options: Any) -> Iterator[Finding]:
        for name, state in zip(adapters, states, strict=True):
            score = {"CLEAR": 0.1, "ALARM": 2.0, "INCONCLUSIVE": None}[state]
            verdict = Verdict(State(state), score, 1.0, None, None, "runs", 20, None, None, "because.")
            yield Finding(name, None, None, verdict, 1, "base", ())

    monkeypatch.setattr("tiltmeter.scan.scan", several)
    found = tiltmeter_cli("scan", *"abc"[: len(states)], "--base", "organism:pocket")
    assert found.exit_code == {1: 0, 2: 3, 3: 1}[len(states)]
    assert [line.split()[0] for line in found.stdout.splitlines()] == states


def test_wrong_usage_is_one_line_and_exit_code_2_for_every_command() -> None:
    for path, command in leaves():
        found = tiltmeter_cli(*path, "--no-such-option")
        assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (2, "", 1), path
        assert found.stderr.startswith("tiltmeter: no such option '--no-such-option'"), path
        assert tiltmeter_cli(*path, "--help").exit_code == 0
        if any(p.required for p in command.params):
            found = tiltmeter_cli(*path)
            assert (found.exit_code, found.stderr.count("\n")) == (2, 1), path
    assert tiltmeter_cli("nonsense").exit_code == 2
    assert tiltmeter_cli().exit_code == 2
    assert tiltmeter_cli("--version").exit_code == 0


def test_nothing_in_the_command_line_exits_or_prints_on_its_own() -> None:
    """All text goes through `terminal`, all exit codes through `root` (and `__main__` around it)."""
    for path in sorted(CLI.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("print", "click.echo", "click.secho", "echo", "sys.stdout.write", "sys.stderr.write"):
                assert (path.name, called) == ("__main__.py", "sys.stderr.write"), (path.name, called)
            if called in ("exit", "quit", "sys.exit", "os._exit", "ctx.exit", "ctx.abort"):
                assert path.name in ("root.py", "__main__.py"), (path.name, called)


# ------------------------------------------------------------------- as processes

ENTRY = tomllib.loads((CLI.parents[2] / "pyproject.toml").read_text())["project"]["scripts"]["tiltmeter"]


def process(*arguments: str, before: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, after some other code has run in the process."""
    module, function = ENTRY.split(":")
    code = f"import sys\n{before}\nfrom {module} import {function}\nsys.exit({function}())"
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=60, **more)


def test_the_process_of_the_installed_command_ends_with_2_for_an_exception() -> None:
    before = "import tiltmeter.organism as o\ndef bad(): raise RuntimeError('inside')\no.shipped_detector = bad"
    found = process("detector", "show", before=before)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("tiltmeter: unexpected RuntimeError: inside")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "before",
    [
        "sys.modules['click'] = None",  # not installed
        "sys.modules['tiltmeter.cli.read'] = None",
        "import builtins\nold = builtins.__import__\n"
        "def bad(name, *a, **k):\n    if name == 'tiltmeter.cli.commands': raise MemoryError\n"
        "    return old(name, *a, **k)\n"
        "builtins.__import__ = bad",
    ],
    ids=["click is missing", "a module of commands is missing", "out of memory"],
)
def test_an_exception_while_commands_are_imported_is_exit_code_2(before: str) -> None:
    found = process("organism", "sets", before=before)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("tiltmeter: the command line cannot be loaded")


def test_the_module_is_run_like_the_installed_command() -> None:
    for arguments, code in ((["detector", "show", "absent"], 2), (["organism", "sets"], 0)):
        command = [sys.executable, "-m", "tiltmeter.cli", *arguments]
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == code


LATE = (
    "import sys, tiltmeter.cli.root as root\nfrom tiltmeter.cli.__main__ import run\n"
    "def late(): print('text', end='', file=sys.stdout)\n"
    "from tiltmeter.cli import main\n"
    "main.add_command(root.Command('late', callback=late))\nsys.argv[1:] = ['late']\nsys.exit(run())"
)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_output_that_cannot_be_written_is_exit_code_2() -> None:
    with open("/dev/full", "w") as full:
        module = [sys.executable, "-m", "tiltmeter.cli", "organism", "sets"]
        found = subprocess.run(module, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert found.returncode == 2
        assert found.stderr.count("\n") == 1
        assert "No space left" in found.stderr
        # A library's text that still waits in the buffer would be found unwritten only as Python ends.
        late = [sys.executable, "-c", LATE]
        assert subprocess.run(late, stdout=full, stderr=subprocess.PIPE, timeout=60).returncode == 2
        both = subprocess.run(module, stdout=full, stderr=full, timeout=60)
        assert both.returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="pipes differ there")
def test_a_reader_that_has_gone_is_exit_code_2_without_a_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run(
        [sys.executable, "-m", "tiltmeter.cli", "organism", "sets"], stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)
    assert found.returncode == 2
    assert found.stderr.decode().startswith("tiltmeter: whatever read the output has ended")
    assert found.stderr.count(b"\n") == 1


def test_threads_exit_handlers_and_a_broken_hook_do_not_change_the_exit_code() -> None:
    before = (
        "import atexit, threading\n"
        "def bad(*a): raise ValueError('late')\n"
        "atexit.register(bad)\nsys.excepthook = bad\nthreading.excepthook = bad\nsys.unraisablehook = bad\n"
        "threading.Thread(target=bad).start()\n"
    )
    assert process("organism", "sets", before=before).returncode == 0
    assert process("detector", "show", "absent", before=before).returncode == 2


def test_warnings_that_are_errors_do_not_look_like_an_alarm() -> None:
    with warnings.catch_warnings():
        before = (
            "import warnings, tiltmeter.organism as o\nwarnings.simplefilter('error')\n"
            "def bad(): warnings.warn('old')\no.shipped_detector = bad"
        )
        assert process("detector", "show", before=before).returncode == 2
