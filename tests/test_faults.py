"""The program that kills and starves what it tests, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "bench" / "trust" / "faults.py"


@pytest.mark.skipif(sys.platform == "win32", reason="it forks, and kills with SIGKILL")
def test_a_watch_that_is_killed_again_and_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    results = tmp_path / "trust.json"
    command = [
        sys.executable,
        str(PROGRAM),
        "--only",
        "kill -9",
        "--work",
        "watch",
        "--kills",
        "3",
        "--results",
        results,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads(results.read_text())
    assert [row["measure"] for row in rows] == [
        "lost after kill -9", "doubled after kill -9", "resumed runs that differ from undisturbed ones",
    ]  # fmt: skip
    assert all(row["subject"] == "watch" and row["value"] == 0 and row["n"] >= 3 for row in rows)
