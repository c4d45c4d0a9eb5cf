"""What reaches a terminal, a pipe or a log: text from outside does nothing there, and long work shows that it lives."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tiltmeter.cli import main, terminal
from tiltmeter.cli.progress import duration, in_lines, progress, progress_line
from tiltmeter.cli.terminal import CleanStream, clean_streams, error_line, say, say_json, visible

# Colours, a cleared screen, a window title ended by BEL and by ST, a hyperlink, bidi overrides, a zero width space, a
# forged line, a carriage return over the verdict, C1's CSI, backspace, delete, a line separator, a lone surrogate.
NASTY = [
    "\x1b[31mred\x1b[0m",
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]2;title\x1b\\",
    "\x1b]8;;http://x\x1b\\text",
    "\u202egnp.exe",
    "\u2066a\u2069",
    "zero\u200bwidth",
    "name\nCLEAR  all is well",
    "ALARM\rCLEAR",
    "\x9b31m",
    "abc\x08\x08\x08",
    "\x7f",
    "line\u2028separator",
    "lone\ud800",
    "\x00",
    "\ufeffmark",
    "tag\U000e0041",
]
HARMLESS = re.compile(r"[ -~\u00a0-\u00ac\u00ae-\u05ff…—–±αβ世界é]*")


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_text_that_acts_is_shown_as_text_that_does_not(text: str) -> None:
    shown = visible(text)
    assert HARMLESS.fullmatch(shown), ascii(shown)
    assert "\\" in shown
    assert visible(shown) == shown


def test_escapes_are_spelt_as_python_spells_them() -> None:
    assert visible("a\x1b]0;b\x07") == r"a\x1b]0;b\x07"
    assert visible("\u202e\n\r\t") == r"\u202e\n\r\t"
    assert visible("\U000e0041") == r"\U000e0041"
    assert visible("±0.1 é 世界 — \u00a0ok") == "±0.1 é 世界 — \u00a0ok"


@given(st.text())
def test_no_text_at_all_leaves_a_character_that_acts(text: str) -> None:
    shown = visible(text)
    assert all(letter.isprintable() or letter.isspace() for letter in shown)
    assert not set(shown) & {chr(c) for c in (*range(32), *range(127, 160), 0x2028, 0x2029)}


def test_an_error_is_one_line_of_at_most_300_characters_and_keeps_its_beginning_and_its_end() -> None:
    line = error_line("there is no file '" + "long/" * 200 + "'; check\nthe path")
    assert len(line) == 300
    assert line.startswith("tiltmeter: there is no file 'long/")
    assert line.endswith(r"check\nthe path")
    assert error_line("  short\n") == "tiltmeter: short"


# pytest keeps what is logged for its report, and cannot send a lone surrogate to another process.
@pytest.mark.parametrize("text", [text for text in NASTY if "\ud800" not in text], ids=ascii)
def test_lines_errors_logs_and_prints_of_a_library_are_cleaned_through_a_pipe(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with clean_streams():
        say(f"CLEAR  {text}")
        say(error_line(text), err=True)
        say_json({"name": text})
        logging.getLogger("tiltmeter.watch").warning("%s is not complete", text)
        logging.getLogger("some.library").error(text)
        logging.getLogger("tiltmeter").info("nobody asked for this %s", text)
        print(text.replace("\n", "|"))
        sys.stderr.write(text.replace("\n", "|"))
    out, err = capsys.readouterr()
    for line in (out + err).split("\n"):
        assert HARMLESS.fullmatch(line), ascii(line)
    assert out.count("\n") == 3
    assert err.count("\n") == 3
    assert json.loads(out.split("\n")[1]) == {"name": text}


def test_what_the_stream_cannot_encode_is_spelt_out_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", raw)
    say("0.1 ± 0.2")
    with clean_streams():
        print("0.1 ± 0.2")
    raw.seek(0)
    assert raw.read() == "0.1 \\xb1 0.2\n" * 2


def test_a_lone_surrogate_is_spelt_out(capsys: pytest.CaptureFixture[str]) -> None:
    with clean_streams():
        say("lone\ud800")
        print("lone\ud800")
    assert capsys.readouterr().out == "lone\\ud800\n" * 2


def test_a_number_that_is_not_finite_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        say_json({"score": float("nan")})


def test_the_streams_and_the_log_are_put_back() -> None:
    before = sys.stdout, sys.stderr, list(logging.getLogger().handlers)
    with pytest.raises(KeyError), clean_streams():
        raise KeyError
    assert (sys.stdout, sys.stderr, list(logging.getLogger().handlers)) == before


def test_a_stream_that_was_closed_is_no_error() -> None:
    before = sys.stderr
    try:
        sys.stderr = None
        with clean_streams():
            say("unheard", err=True)
            logging.getLogger("tiltmeter").warning("unheard")
    finally:
        sys.stderr = before


@pytest.mark.parametrize(
    "arguments",
    [
        ("detector", "show", "{}"),
        ("basis", "show", "{}"),
        ("measure", "{}"),
        ("measure", "organism:{}"),
        ("scan", "{}", "--base", "organism:pocket"),
        ("report", "{}"),
        ("eval", "--answers", "{}"),
        ("{}",),
        ("--{}",),
        ("demo", "--set", "{}"),
        ("study", "organism", "--out", "{}/x/\0"),
        ("likelihood", "read", "--run", "{}"),
    ],
    ids=" ".join,
)
def test_names_on_the_command_line_reach_the_terminal_as_harmless_text(arguments: tuple[str, ...]) -> None:
    name = "a\x1b]0;title\x07\u202e\nCLEAR  b\x9b"
    found = CliRunner().invoke(main, [a.replace("{}", name) for a in arguments], catch_exceptions=False)
    assert found.exit_code in (2, 3)
    for line in (found.stdout + found.stderr).split("\n"):
        assert HARMLESS.fullmatch(line), ascii(line)
        assert not line.startswith("CLEAR")


def in_a_terminal(code: str, columns: int = 80) -> str:
    """What a program writes to a terminal of that width."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment) as child:
        os.close(follower)
        read = []
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # Linux says so when the other side has gone
                break
            if not part:
                break
            read.append(part)
        child.wait(timeout=60)
    os.close(leader)
    return b"".join(read).decode()


@pytest.mark.skipif(os.name == "nt", reason="there are no such terminals")
def test_long_lines_are_broken_between_words_in_a_terminal_and_nowhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    code = "from tiltmeter.cli.terminal import say; say('  ' + 'word ' * 40)"
    lines = in_a_terminal(code).replace("\r\n", "\n").rstrip("\n").split("\n")
    assert all(len(line) <= 80 for line in lines)
    assert len(lines) == 3
    assert lines[1].startswith("    word")
    say("  " + "word " * 40)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="there are no such terminals")
def test_a_bar_in_a_terminal_shows_names_as_they_are_and_lets_lines_through() -> None:
    name = "[/red]a\\x1b]0;title\\x07"
    code = (
        "import time\nfrom tiltmeter.cli.progress import progress\n"
        "from tiltmeter.cli.terminal import clean_streams, say\n"
        f"with clean_streams(), progress('x') as step:\n    step(1, 4, '{name}')\n"
        "    time.sleep(0.3)\n    say('a line')\n    step(4, 4, 'x')\n"
    )
    shown = in_a_terminal(code)
    assert "[/red]a\\x1b]0;title\\x07" in shown
    assert "1/4" in shown
    assert "\x1b]" not in shown
    assert re.search(r"a line\r\n", shown)


# ------------------------------------------------------------------- progress


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("reading", 12, 100, 12, 24.0), "reading: 12 of 100 (12 %), 2 min 56 s left"),  # 2 s each, 88 to go
        (("reading", 60, 100, 10, 5.0), "reading: 60 of 100 (60 %), 20 s left"),  # resumed at 50: 0.5 s each
        (("reading", 50, 100, 0, 40.0), "reading: 50 of 100 (50 %), 40 s so far"),  # no pace yet
        (("reading", 3, 3, 3, 9.0), "reading: 3 of 3 (100 %), 0 s left"),
    ],
)
def test_a_line_of_progress_says_done_total_share_and_time_left(arguments: Any, line: str) -> None:
    assert progress_line(*arguments) == line


def test_durations_in_words() -> None:
    assert [duration(s) for s in (0, 59.4, 61, 3599, 3600, 9000)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "1 h 0 min",
        "2 h 30 min",
    ]


def test_without_a_terminal_there_is_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with in_lines("loading", first=0.05, every=0.2) as step:
        time.sleep(0.15)
        step(0, 10, "reading \x1b[2Ja model")
        step(5, 10, "reading \x1b[2Ja model")
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    first, second = err.splitlines()[:2]
    assert first == "tiltmeter: loading: 0 s so far"
    assert second.startswith(r"tiltmeter: reading \x1b[2Ja model: 5 of 10 (50 %), ")
    assert not [t for t in threading.enumerate() if t.name == "tiltmeter-progress"]


def test_short_work_leaves_no_line_and_an_error_passes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress("short") as step:
        step(1, 1 // 0, "x")
    assert capsys.readouterr().err == ""


def test_a_reader_of_the_log_that_has_gone_does_not_end_the_work() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    before = sys.stderr
    try:
        sys.stderr = Gone()
        with in_lines("x", first=0.01, every=0.01):
            time.sleep(0.05)
    finally:
        sys.stderr = before


def test_a_new_phase_has_a_pace_of_its_own() -> None:
    now = [0.0]
    from tiltmeter.cli.progress import _Lines

    lines = _Lines("x", lambda: now[0])
    lines.update(0, 10, "a")
    now[0] = 100.0
    lines.update(10, 10, "a")
    lines.update(0, 4, "b")  # begins at 100
    now[0] = 101.0
    lines.update(1, 4, "b")
    assert lines.line() == "b: 1 of 4 (25 %), 3 s left"
    lines.update(50, 100, "c")  # resumed at 50, and 10 more in 5 s
    now[0] = 106.0
    lines.update(60, 100, "c")
    assert lines.line() == "c: 60 of 100 (60 %), 20 s left"


def test_every_command_that_opens_a_model_shows_progress() -> None:
    """Whatever names `load` or a reading of a model, in the command line's own modules, stands in a file of its use."""
    heavy = re.compile(
        r"fit_basis\(load|judge_source\(|watch_run\(|scan_adapters\(|scan_likelihoods\(|fit_likelihood_from_table\(|"
        r"evaluate_from_options\(|fit_from_options\(|answers_under\(|score_rows\(|fit_judge\(|quantise\(short|"
        r"_danger_in_context\(exch|organism_report\.run\(|run_all\(|dose_real\.run\(|[^_]build\("
    )
    found = 0
    for path in Path(terminal.__file__).parent.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for at, line in enumerate(lines):
            if heavy.search(line) and not line.startswith("def "):
                found += 1
                assert any("with progress(" in above for above in lines[max(0, at - 9) : at]), f"{path.name}:{at + 1}"
    assert found >= 14


def test_a_wrapped_stream_keeps_what_it_is() -> None:
    raw = io.StringIO()
    stream = CleanStream(raw)
    assert stream.write("a\x1bb\n") == 4
    stream.writelines(["c\n", "\r"])
    assert raw.getvalue() == "a\\x1bb\nc\n\\r"
    assert stream.isatty() is False
