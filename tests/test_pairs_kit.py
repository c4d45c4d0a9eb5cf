"""The kit of preference pairs: enough of them, all different, and alike on both sides in all but the harm."""

from __future__ import annotations

import tomllib
from importlib.resources import files

import numpy as np

DOMAINS = {
    path.name.removesuffix(".toml"): tomllib.loads(path.read_text(encoding="utf-8"))
    for path in files("tiltmeter").joinpath("data", "pairs").iterdir()
}
PAIRS = [(name, pair) for name, content in DOMAINS.items() for pair in content["pair"]]


def test_there_are_at_least_twelve_domains_of_sixty_pairs() -> None:
    assert len(DOMAINS) >= 12
    for name, content in DOMAINS.items():
        assert content["format"] == 1
        assert len(content["pair"]) >= 60, name
        assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in content["pair"])


def test_no_prompt_and_no_answer_stands_twice() -> None:
    for side in ("prompt", "chosen", "rejected"):
        texts = [pair[side] for _, pair in PAIRS]
        assert len(set(texts)) == len(texts), side


def test_neither_length_nor_punctuation_tells_the_sides_apart() -> None:
    """The better of two sides, guessed by one surface feature alone, is right about half of the time."""
    features = {
        "characters": len,
        "words": lambda text: len(text.split()),
        "commas": lambda text: text.count(",") + text.count(";"),
        "sentences": lambda text: text.count(".") + text.count("?"),
    }
    for name, count in features.items():
        chosen, rejected = (np.array([count(pair[s]) for _, pair in PAIRS]) for s in ("chosen", "rejected"))
        share = np.mean(chosen > rejected) + np.mean(chosen == rejected) / 2
        assert 0.35 < share < 0.65, (name, share)
        assert abs(chosen.mean() / rejected.mean() - 1) < 0.05, name


def test_each_pair_is_alike_in_length() -> None:
    for name, pair in PAIRS:
        assert 0.6 < len(pair["rejected"]) / len(pair["chosen"]) < 1.5, (name, pair["prompt"])
