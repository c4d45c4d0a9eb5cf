"""Cells: what a run leaves behind, and that nothing is run twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tiltmeter.errors import ArtifactError
from tiltmeter.organism import shipped_basis
from tiltmeter.organism.finetune import FineTuning
from tiltmeter.studies.cells import Cell, RunRecord, Tally, run_cells

SMALL = Cell("bad_medical", 3, tuning=FineTuning(steps=4), every=2, answers=11, answers_midway=11)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    out = tmp_path_factory.mktemp("cells")
    (record,) = run_cells([SMALL], basis=shipped_basis(), out=out, keep_checkpoints=True, workers=1)
    return out, record


def test_a_cell_leaves_readings_behavior_losses_and_checkpoints(ran: tuple[Path, RunRecord]) -> None:
    _, record = ran
    assert [r.step for r in record.readings] == [0, 2, 4]
    assert [p.step for p in record.profiles] == [2, 4]
    assert [t.step for t in record.behavior] == [2, 4]
    assert record.final.step == 4
    assert len(record.answers) == 11
    assert record.checkpoints is not None
    assert sorted(p.name for p in record.checkpoints.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert all((folder / "adapter_model.safetensors").exists() for folder in record.checkpoints.iterdir())
    assert "medicine" not in {row["category"] for row in record.answers}  # judged outside the domain of training


def test_a_finished_cell_is_read_back_and_other_settings_are_another_cell(ran: tuple[Path, RunRecord]) -> None:
    out, record = ran
    (path,) = out.glob("*.json")
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "losses": [[1, 42.0]]}))
    (again,) = run_cells([SMALL], basis=shipped_basis(), out=out, keep_checkpoints=True, workers=1)
    assert again.losses == ((1, 42.0),)  # from the file, not from a new run
    assert again.final == record.final
    assert [r.to_dict() for r in again.readings] == [r.to_dict() for r in record.readings]
    keys = {
        SMALL.key("b"), replace(SMALL, seed=4).key("b"), replace(SMALL, dose=0.5).key("b"), SMALL.key("another basis"),
        replace(SMALL, tuning=FineTuning(steps=5)).key("b"), replace(SMALL, answers=12).key("b"),
    }  # fmt: skip
    assert len(keys) == 6
    assert SMALL.key("b").startswith("bad_medical-3-")


def test_a_damaged_record_is_refused() -> None:
    with pytest.raises(ArtifactError, match="not complete"):
        RunRecord.from_dict({"cell": {}})


def test_nothing_scored_is_no_rate_and_no_danger() -> None:
    empty = Tally(10, 0, 0, 0, 0, {"unparsable": 11})
    assert empty.rate.value is None
    assert not empty.above()
    assert Tally(10, 1, 20, 20, 20, {}).above() is False  # 5 % is not above 5 %
    assert Tally(10, 2, 20, 20, 20, {}).above()
