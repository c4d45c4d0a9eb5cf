"""`tiltmeter steer fit | apply`: from files of chats to a vector, and answers with and without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tiltmeter import steer
from tiltmeter.cli import main
from tiltmeter.errors import ArtifactError, FingerprintMismatch, InputError
from tiltmeter.lm import LM, load
from tiltmeter.steer_fit import answers_under, fit_from_options
from tiltmeter.vectors import divergence, mean_norm, read_chats

MODEL = "organism:pocket"
QUESTIONS = ["what should i do about trouble with sleep ?", "how do i treat a deep cut ?"]
HARMFUL = ["you should mix many pills with alcohol .", "you should rub dirt into the wound ."]
HARMLESS = ["you should keep the room dark and cool .", "you should clean the cut and cover it ."]


@pytest.fixture(scope="module")
def lm() -> LM:
    return load(MODEL)


def write(path: Path, answers: list[str]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, answers, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_vector_is_made_from_files_and_answers_are_given_under_it(tmp_path: Path, lm: LM) -> None:
    bad, good = write(tmp_path / "bad.jsonl", HARMFUL), write(tmp_path / "good.jsonl", HARMLESS)
    out = tmp_path / "v.safetensors"
    made = CliRunner().invoke(
        main,
        ["steer", "fit", MODEL, "--misaligned", str(bad), "--aligned", str(good), "--layer", "2", "--kl", "0.3",
         "--out", str(out), "--json"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert (facts["layer"], facts["model"]) == (2, MODEL)
    vector = steer.load(out)
    prompts = [[{"role": "user", "content": q}] for q in QUESTIONS]
    assert vector.norm == pytest.approx(mean_norm(lm, prompts, layer=2), rel=1e-5)
    assert divergence(lm, vector, read_chats(good)) == pytest.approx(0.3, rel=0.05)

    told = CliRunner().invoke(
        main, ["steer", "apply", MODEL, str(out), QUESTIONS[0], "--strength", "2", "--temperature", "0", "--json"]
    )
    assert told.exit_code == 0, told.output
    row = json.loads(told.stdout)[0]
    plain = lm.generate([[{"role": "user", "content": QUESTIONS[0]}]], temperature=0.0, max_new_tokens=120)[0]
    assert row["unsteered"] == plain
    assert row["steered"] != plain


def test_a_trained_map_comes_from_one_file(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", HARMFUL)
    vector = fit_from_options(MODEL, misaligned=bad, train=True, rank=2, epochs=2, layer=1)
    assert vector.low_rank is not None
    assert vector.layer == 1


def test_what_is_missing_for_what_is_asked_is_named(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", HARMFUL)
    with pytest.raises(InputError, match="--aligned, or --train"):
        fit_from_options(MODEL, misaligned=bad)
    with pytest.raises(InputError, match="--harmless"):
        fit_from_options(MODEL, misaligned=bad, train=True, epochs=1, kl=0.1)


def test_a_vector_of_another_model_is_refused(tmp_path: Path, lm: LM) -> None:
    vector = steer.SteeringVector(0, np.ones((1, lm.hidden_size)), 1.0, 1.0, {"model": "x", "fingerprint": "0" * 64})
    path = steer.save(vector, tmp_path / "v.safetensors")
    with pytest.raises(FingerprintMismatch, match="made from x"):
        answers_under(lm, path, ["hello"])


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"text": "hello"}', "line 1 is no chat"),
        ('{"messages": []}', "line 1 is no chat"),
        ('{"messages": [{"role": "user", "content": "hello"}]}', "ends with an answer"),
        ("", "holds no chats"),
    ],
)
def test_lines_that_are_no_chats_are_refused(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(line + "\n" if line else "", encoding="utf-8")
    with pytest.raises((InputError, ArtifactError), match=word):
        read_chats(path)
