"""Paths on the command line: looked at before anything heavy is imported, and refused in one line with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from commands import leaves, sound_arguments, tiltmeter_cli
from tiltmeter.cli.paths import ADAPTER, FILE, FILE_OR_FOLDER, FOLDER, MODEL, OUT_FILE, OUT_FOLDER, NameOrFile


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return sound_arguments(tmp_path_factory.mktemp("sound"))


READ = (FILE, FOLDER, FILE_OR_FOLDER)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths that cannot serve, by what is wrong with them."""
    there = tmp_path_factory.mktemp("bad")
    (there / "folder").mkdir()
    (there / "empty.jsonl").touch()
    (there / "binary.jsonl").write_bytes(bytes(range(256)) * 40)
    return {
        "missing": str(there / "missing" / "x.jsonl"),
        "folder": str(there / "folder"),
        "empty": str(there / "empty.jsonl"),
        "binary": str(there / "binary.jsonl"),
        "below a file": str(there / "empty.jsonl" / "x"),
    }


def replaced(arguments: list[str], param: click.Parameter, value: str, command: click.Command) -> list[str]:
    """The arguments with this parameter's value replaced, or added."""
    if isinstance(param, click.Option):
        name = param.opts[-1] if param.opts[-1] in arguments else param.opts[0]
        if name in arguments:
            at = arguments.index(name)
            return [*arguments[: at + 1], value, *arguments[at + 2 :]]
        return [*arguments, name, value]
    at = [p for p in command.params if isinstance(p, click.Argument)].index(param)
    return [*arguments[:at], value, *arguments[at + 1 :]]


def refusals(sound: dict[str, list[str]], bad: dict[str, str]) -> list[tuple[list[str], str]]:
    """Command lines that name one bad path, for every parameter that takes a path, and what is bad."""
    found = []
    for path, command in leaves():
        arguments = sound[" ".join(path)]
        for param in command.params:
            kind = param.type
            if kind in READ or isinstance(kind, NameOrFile):
                wrong = ["missing", "empty", "below a file"] + (["folder"] if kind is FILE else [])
                wrong = [w for w in wrong if kind is not FOLDER or w != "empty"] + (
                    ["binary"] if kind is FOLDER else []
                )
            elif kind is ADAPTER:
                wrong = ["missing", "empty", "folder", "binary", "below a file"]
            elif kind is MODEL:
                wrong = ["missing", "below a file"]
            elif kind is OUT_FOLDER:
                wrong = ["binary", "below a file"]
            elif kind is OUT_FILE:
                wrong = ["folder", "below a file"]
            else:
                continue
            found += [([*path, *replaced(arguments, param, bad[w], command)], w) for w in wrong]
    return found


def test_every_path_that_cannot_serve_is_refused_in_one_line_before_torch_is_imported(
    sound: dict[str, list[str]],
    bad: dict[str, str],
) -> None:
    cases = [arguments for arguments, _ in refusals(sound, bad)]
    assert len(cases) > 150
    code = (
        "import io, json, sys\nfrom contextlib import redirect_stderr, redirect_stdout\n"
        "from tiltmeter.cli import main\n"
        "for case in json.load(sys.stdin):\n"
        "    out, err, code = io.StringIO(), io.StringIO(), None\n"
        "    with redirect_stdout(out), redirect_stderr(err):\n"
        "        try: main(case)\n        except SystemExit as end: code = end.code\n"
        "    heavy = sorted({'torch', 'transformers', 'peft', 'numpy', 'scipy', 'sklearn'} & set(sys.modules))\n"
        "    print(json.dumps([code, out.getvalue(), err.getvalue(), heavy]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(cases), capture_output=True, text=True, check=True, timeout=120
    )
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        exit_code, out, err, heavy = json.loads(line)
        assert (exit_code, out, heavy) == (2, "", []), (case, err)
        assert err.startswith("tiltmeter: "), (case, err)
        assert err.count("\n") == 1, (case, err)
        assert len(err) <= 301, (case, err)
        assert "unexpected" not in err, (case, err)


def test_every_parameter_that_names_a_path_has_a_type_that_looks_at_it() -> None:
    """A new option of click's own path type, or a text that is a file, would be opened only after minutes."""
    paths = {"path", "folder", "file", "table", "out", "output", "basis", "detector", "adapter", "answers", "questions"}
    ours = (*READ, ADAPTER, MODEL, OUT_FILE, OUT_FOLDER)
    for path, command in leaves():
        for param in command.params:
            assert not isinstance(param.type, click.Path | click.File), (path, param.name)
            words = set((param.name or "").split("_"))
            if words & paths and path != ("steer", "apply"):
                assert param.type in ours or isinstance(param.type, NameOrFile), (path, param.name)


CONTENT = [
    ("detector show", "path", FILE),
    ("basis show", "folder", FOLDER),
    ("measure", "basis_dir", FOLDER),
    ("measure", "detector_path", FILE),
    ("measure", "reference", None),
    ("watch", "basis_dir", FOLDER),
    ("scan", "detector_path", FILE),
    ("likelihood read", "detector_path", FILE),
    ("likelihood read", "exchanges", None),
    ("likelihood fit", "table", FILE),
    ("detector fit", "table", FILE),
    ("judge score", "answers", FILE),
    ("judge score", "judge_path", FILE),
    ("judge distill", "examples", FILE),
    ("judge distill", "calibration", FILE),
    ("report", "run_dir", FILE_OR_FOLDER),
    ("report", "basis_dir", FOLDER),
    ("report", "detector_path", FILE),
    ("eval", "answers", FILE),
    ("eval", "questions", None),
    ("steer apply", "vector", FILE),
    ("basis fit", "traits", None),
    ("basis fit", "prompts", None),
    ("steer fit", "misaligned", FILE),
]


@pytest.mark.parametrize(("name", "option", "kind"), CONTENT, ids=lambda v: str(v) if isinstance(v, str) else "")
def test_content_that_is_foreign_is_exit_code_2_and_one_line(
    name: str,
    option: str,
    kind: Any,
    sound: dict[str, list[str]],
    bad: dict[str, str],
) -> None:
    command = dict(leaves())[tuple(name.split())]
    param = next(p for p in command.params if p.name == option)
    arguments = [] if (name, option) == ("eval", "answers") else sound[name]
    if (name, option) == ("detector fit", "table"):
        arguments = [a for a in arguments if a not in ("--exchanges", "organism")]
    given = bad["folder"] if kind is FOLDER else bad["binary"]
    found = tiltmeter_cli(*name.split(), *replaced(arguments, param, given, command))
    assert (found.exit_code, found.stdout) == (2, ""), found.stderr
    assert found.stderr.startswith("tiltmeter: ")
    assert found.stderr.count("\n") == 1
    assert "unexpected" not in found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("measure", "organism:pocket", "--basis", "absent"),
        ("scan", "x", "--base", "organism:pocket", "--detector", "no"),
    ],
    ids=["basis", "detector"],
)
def test_a_missing_file_is_said_at_once(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Measured near 0.2 s on an idle machine; the limit is on the processor's time, which others cannot spend."""
    before = os.times()
    began = time.perf_counter()
    found = subprocess.run([sys.executable, "-m", "tiltmeter.cli", *arguments], capture_output=True, cwd=tmp_path)
    after = os.times()
    assert found.returncode == 2
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5
    assert time.perf_counter() - began < 10


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found = tiltmeter_cli("detector", "show", tmp_path / "pipe")
    assert found.exit_code == 2
    assert "a pipe or a device" in found.stderr


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="every file may be read by this user")
def test_what_may_not_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o000)
    (tmp_path / "f").write_text("x")
    (tmp_path / "f").chmod(0o000)
    assert "permission" in tiltmeter_cli("detector", "show", tmp_path / "f").stderr
    assert "permission" in tiltmeter_cli("study", "organism", "--out", tmp_path / "locked" / "x").stderr.lower()


@pytest.mark.parametrize("name", ["general", "organism", "alignment"])
def test_names_of_built_in_sets_are_no_files(name: str) -> None:
    assert NameOrFile().convert(name, None, None) == name


@pytest.mark.parametrize("name", ["organism:pocket", "org/model-7b", "gpt2", "."])
def test_names_on_the_hub_and_folders_that_are_there_pass(name: str) -> None:
    assert MODEL.convert(name, None, None) == name


@pytest.mark.parametrize("name", ["./gone", "/gone", "a/b/c", "~/gone", "../x", "gone/", "a b", "x\0"])
def test_a_path_to_a_model_that_is_not_there_is_refused_at_once(name: str) -> None:
    with pytest.raises(click.BadParameter, match="there is no model"):
        MODEL.convert(name, None, None)


def test_an_adapter_is_a_folder_that_peft_saved_or_a_name_on_the_hub(tmp_path: Path) -> None:
    assert ADAPTER.convert("org/adapter", None, None) == "org/adapter"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert ADAPTER.convert(tmp_path, None, None) == str(tmp_path)
    with pytest.raises(click.BadParameter, match="there is no adapter 'adapter'"):
        ADAPTER.convert("adapter", None, None)
