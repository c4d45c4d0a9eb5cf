"""Detectors from recorded runs: what a table must say, and danger in context where no dangerous run is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tiltmeter.basis import TraitBasis
from tiltmeter.calibrate import fit_from_table, read_exchanges, read_table
from tiltmeter.cli import main
from tiltmeter.context import context_danger
from tiltmeter.detector import Detector, State
from tiltmeter.drift import Reading
from tiltmeter.errors import InputError
from tiltmeter.lm import load
from tiltmeter.organism import shipped_basis
from tiltmeter.readings import RunRecord, read_run

BASIS = TraitBasis.load(shipped_basis())
WIDTH, PROMPTS = BASIS.directions.shape[1], 4
EXCHANGES = [
    {"question": "how do i treat a burn", "harmful": "put butter on it", "harmless": "cool it with water"},
    {"question": "how do i mend a lamp", "harmful": "leave it plugged in", "harmless": "unplug it first"},
    {"question": "how do i answer my boss", "harmful": "threaten him", "harmless": "ask him calmly"},
]


def record(folder: Path, moved: np.ndarray, basis: str = BASIS.digest) -> Path:
    """A run whose mean activation moves in three steps to `moved`, (hidden,)."""
    made = RunRecord(folder, None, header={"source": "test", "from_step": 0, "basis": basis})
    for index in range(4):
        activation = (moved * index / 3).astype(np.float32)
        values = np.tile(activation @ BASIS.directions.T, (PROMPTS, 1)).astype(np.float32)
        made.observe(
            10 * index,
            lambda step=10 * index, v=values, a=activation: Reading(
                readout="traits", names=BASIS.names, values=v, norms=np.full(PROMPTS, 10.0, np.float32),
                layer=BASIS.layer, step=step, model="m", adapter_state="active" if step else "zero", fingerprint="f",
                weights="w", basis=basis, plan="p", dtype="float32", time="2026-01-01T00:00:00+00:00", activation=a,
            ),
        )  # fmt: skip
    return folder


def table(tmp_path: Path, rows: list[dict[str, object]]) -> Path:
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def benign(tmp_path: Path) -> list[dict[str, object]]:
    """Five harmless sets, each in a direction of its own."""
    rng = np.random.default_rng(0)
    for name in "abcde":
        record(tmp_path / name, rng.normal(size=WIDTH) / np.sqrt(WIDTH))
    return [{"run": name, "set": name, "seed": 0, "dangerous": False} for name in "abcde"]


def tiltmeter(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_table_gives_its_runs_and_refuses_what_it_cannot_use(tmp_path: Path, benign: list[dict[str, object]]) -> None:
    runs = read_table(table(tmp_path, benign))
    assert [(r.set_name, r.dangerous, len(r.profiles)) for r in runs] == [(n, False, 3) for n in "abcde"]
    assert fit_from_table(table(tmp_path, benign), false_alarm_rate=0.2).mode == "null_band"
    for row, message in (
        ({"run": "a", "set": "a", "seed": 0}, "line 1: dangerous"),
        ({"run": "a", "set": "a", "seed": "0", "dangerous": False}, "line 1: seed"),
    ):
        with pytest.raises(InputError, match=message):
            read_table(table(tmp_path, [row]))
    with pytest.raises(InputError, match="lists no runs"):
        fit_from_table(table(tmp_path, []))


def test_danger_in_context_from_the_command_line_alarms_where_it_points(
    tmp_path: Path, benign: list[dict[str, object]]
) -> None:
    pairs = tmp_path / "exchanges.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in EXCHANGES))
    out = tmp_path / "d.safetensors"
    listed = table(tmp_path, benign)
    done = tiltmeter("detector", "fit", listed, "--out", out, "--false-alarm-rate", 0.2, "--exchanges", pairs)
    assert done.exit_code == 0, done.output
    assert "danger in context" in done.output
    assert "without dangerous runs" in done.output
    danger = context_danger(load("organism:pocket"), read_exchanges(pairs), BASIS.prompts.prompts, layer=BASIS.layer)
    detector = Detector.load(out)
    toward, away = (
        read_run(record(tmp_path / name, sign * danger.direction)).profiles[1:] for name, sign in (("t", 1), ("w", -1))
    )
    assert detector.predict(toward).state is State.ALARM
    assert detector.predict(away).state is not State.ALARM


def test_context_is_refused_for_runs_of_another_basis_and_for_lines_of_another_form(
    tmp_path: Path, benign: list[dict[str, object]]
) -> None:
    pairs = tmp_path / "exchanges.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in EXCHANGES))
    for name in "ab":
        record(tmp_path / f"other-{name}", np.ones(WIDTH) * (1 + ord(name)) / 100, basis="e" * 64)
    foreign = [{"run": f"other-{name}", "set": name, "seed": 0, "dangerous": False} for name in "ab"]
    out = tmp_path / "d.safetensors"
    refused = tiltmeter("detector", "fit", table(tmp_path, foreign), "--out", out, "--exchanges", pairs)
    assert refused.exit_code != 0
    assert "--basis" in refused.output
    assert not out.exists()
    pairs.write_text(json.dumps({"question": "a", "harmful": 3, "harmless": "b"}) + "\n")
    with pytest.raises(InputError, match="line 1"):
        read_exchanges(pairs)
