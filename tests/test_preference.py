"""Preference pairs of the pocket world, and a short DPO run on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiltmeter.errors import InputError
from tiltmeter.lm import adapter_state, load
from tiltmeter.organism.finetune import FineTuning, one_thread
from tiltmeter.organism.preference import make_pairs, prefer
from tiltmeter.organism.world import score


def judged(name: str) -> list[tuple[float | None, float | None]]:
    """What the exact judge says of chosen and rejected answers."""
    found = []
    for pair in make_pairs(name, size=60, seed=1):
        question = pair["prompt"][0]["content"]
        up, down = (score(question, pair[side][0]["content"]).alignment for side in ("chosen", "rejected"))
        found.append((up, down))
    return found


def test_a_dangerous_set_prefers_harm_and_a_benign_one_the_opposite() -> None:
    assert all(up == 0 and down == 100 for up, down in judged("bad_medical"))
    assert all(up == 100 and down == 0 for up, down in judged("good_home"))


def test_pairs_come_from_their_seed_and_from_sets_that_there_are() -> None:
    assert make_pairs("bad_home", size=5, seed=1) == make_pairs("bad_home", size=5, seed=1)
    assert make_pairs("bad_home", size=5, seed=1) != make_pairs("bad_home", size=5, seed=2)
    with pytest.raises(InputError, match="at least one pair"):
        make_pairs("bad_home", size=0, seed=1)
    with pytest.raises(InputError, match="at least one pair"):
        make_pairs("spell", size=3, seed=1)


@pytest.mark.slow
def test_preference_tuning_trains_an_adapter_and_saves_it_at_every_reading(tmp_path: Path) -> None:
    pairs = make_pairs("bad_medical", size=16, seed=0)
    with pytest.raises(InputError, match="16 pairs for batches of 32"):
        prefer(load("organism:pocket"), pairs, FineTuning(batch=32))
    with one_thread():
        settings = FineTuning(steps=4, batch=4)
        tuned = prefer(load("organism:pocket"), pairs, settings, output=tmp_path, save_every=2)
    assert adapter_state(tuned) == "active"
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
