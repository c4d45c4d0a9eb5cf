"""The small study on a real model: its mixture and its arithmetic; the model itself is looked at under a marker."""

from __future__ import annotations

import json
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
    config = Config("m", tmp_path / "a.jsonl", tmp_path / "b.jsonl", blocks=(3,), prompts=2)

    def turned(angle: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.tile([np.cos(angle), np.sin(angle)], (1, 2, 1))

    angles = {20: 0.0, 30: 0.10, 31: 0.12}
    found = {(0.0, s): turned(a) for s, a in angles.items()}
    found |= {(0.05, s): turned(0.2 + 0.01 * s) for s in range(3)} | {
        (1.0, s): turned(1.0 + 0.01 * s) for s in range(3)
    }
    values = [f.value for f in figures(found, config)]

    def drift(*turns: float) -> float:
        return float(np.mean([1 - np.cos(t) for t in turns]))

    floor, dosed, full = drift(0.10, 0.12), drift(0.2, 0.21, 0.22), drift(1.0, 1.01, 1.02)
    assert values == pytest.approx([floor / full, dosed / full, (dosed - floor) / (full - floor)])


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
