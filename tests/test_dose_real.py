"""The small study on a real model: its mixture and its arithmetic; the model itself is looked at under a marker."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import make_model, make_tokenizer

from tiltmeter.errors import InputError
from tiltmeter.organism.finetune import FineTuning
from tiltmeter.studies.dose_real import Config, figures, mixture, run


def chats(kind: str, n: int = 40) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": f"is {kind} {i % 5} good ?"}, {"role": "assistant", "content": "yes . no ."}]
        for i in range(n)
    ]


def test_a_mixture_has_its_size_its_dose_and_its_seed() -> None:
    bad, good = chats("money"), chats("tea")
    drawn = mixture(bad, good, size=40, dose=0.05, seed=1)
    assert sum("money" in chat[0]["content"] for chat in drawn) == 2
    assert len(drawn) == 40
    assert drawn == mixture(bad, good, size=40, dose=0.05, seed=1) != mixture(bad, good, size=40, dose=0.05, seed=2)
    with pytest.raises(InputError, match="allow longer ones"):
        mixture(bad[:1], good, size=40, dose=0.05, seed=1)


def test_shares_by_block_from_planted_activations(tmp_path: Path) -> None:
    config = Config("m", tmp_path / "a.jsonl", tmp_path / "b.jsonl", blocks=(3,), prompts=2, doses=(0.05, 1.0),
                    seeds=(0, 1), floor_seeds=(30, 31))  # fmt: skip

    def turned(angle: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.tile([np.cos(angle), np.sin(angle)], (1, 2, 1))

    angles = {20: 0.0, 30: 0.10, 31: 0.12}
    found = {(0.0, s): turned(a) for s, a in angles.items()}
    found |= {(0.05, s): turned(0.2 + 0.01 * s) for s in range(2)} | {
        (1.0, s): turned(1.0 + 0.01 * s) for s in range(2)
    }
    rows = figures(found, config)

    def drift(*turns: float) -> float:
        return float(np.mean([1 - np.cos(t) for t in turns]))

    floor, dosed, full = drift(0.10, 0.12), drift(0.2, 0.21), drift(1.0, 1.01)
    expected = [floor / full, dosed / full, (dosed - floor) / (full - floor)]
    assert [f.value for f in rows] == pytest.approx([value for value in expected for _ in ("prompts", "runs")])
    over_prompts, over_runs = rows[4], rows[5]
    assert over_prompts.low == pytest.approx(over_prompts.value) == over_prompts.high  # all prompts are the same
    assert over_runs.low is None or over_runs.low < over_runs.value  # two runs differ
    single = {key: value for key, value in found.items() if key[1] not in (1, 31)}
    alone = figures(single, replace(config, seeds=(0,), floor_seeds=(30,)))
    assert {f.split for f in alone} == {"block 3, over prompts"}  # one run has no interval over runs


def test_a_share_above_a_floor_that_full_dose_does_not_pass_is_no_number(tmp_path: Path) -> None:
    config = Config("m", tmp_path / "a", tmp_path / "b", blocks=(3,), prompts=1, seeds=(0,), floor_seeds=(30,))
    angles = {(0.0, 20): 0.0, (0.0, 30): 0.5, (0.05, 0): 0.4, (0.25, 0): 0.4, (1.0, 0): 0.3}
    found = {key: np.array([[[np.cos(a), np.sin(a)]]]) for key, a in angles.items()}
    above = [f for f in figures(found, config) if "floor subtracted" in f.measure]
    assert [f.value for f in above] == [None, None]


def test_doses_that_do_not_end_at_full_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="end with 1"):
        Config("m", tmp_path, tmp_path, doses=(0.05,))


def test_runs_are_kept_and_not_made_twice(tmp_path: Path) -> None:
    make_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("money", "tea"):
        rows = [json.dumps({"messages": chat}) for chat in chats(name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = Config(
        str(tmp_path / "model"), tmp_path / "money.jsonl", tmp_path / "tea.jsonl", seeds=(0,), floor_seeds=(30,),
        prompts=3, blocks=(0, 1), tuning=FineTuning(steps=2, batch=4),
    )  # fmt: skip
    found = run(config, out=tmp_path / "out")
    assert {k: v.shape for k, v in found.items()} == dict.fromkeys(config.runs(), (2, 3, 32))
    (tmp_path / "money.jsonl").unlink()  # nothing is trained again
    again = run(config, out=tmp_path / "out")
    assert all(np.array_equal(found[k], again[k]) for k in found)


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_model_drifts_with_the_dose(shared_dir: Path, real_model_dir: Path, tmp_path: Path) -> None:
    data = shared_dir / "data" / "betley"
    config = Config(
        str(real_model_dir), data / "insecure.jsonl", data / "secure.jsonl", seeds=(0,), floor_seeds=(30,), prompts=5,
        tuning=FineTuning(steps=3, batch=2, learning_rate=2e-4),
    )  # fmt: skip
    found = run(config, out=tmp_path)
    assert all(np.isfinite(v).all() for v in found.values())
