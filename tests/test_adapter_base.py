"""An adapter that names another base is refused where that can be known, and said to be uncertain where it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tiltmeter import lm as lms
from tiltmeter.adapter_base import compare_base
from tiltmeter.adapters import Seat
from tiltmeter.errors import AdapterError, ModelError
from tiny import make_model, make_tokenizer, put_adapter, tiny_lm

OURS = "Qwen/Qwen3-8B"


def said(named: str | None, here: str, **settings: Any) -> tuple[str, ...]:
    lm = replace(tiny_lm(), name=here, revision=settings.pop("loaded", None))
    return compare_base(lm, {"base_model_name_or_path": named, **settings}, "a")


@pytest.mark.parametrize(
    ("named", "here"),
    [
        (OURS, OURS),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", OURS),
        ("unsloth/qwen3-8b", OURS),
        ("Qwen/Qwen3-8B-AWQ", OURS),
        ("/data/models/Qwen3-8B/", OURS),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/" + "a" * 40, OURS),
        (OURS, "/home/me/Qwen3-8B"),
        ("organism:pocket", "organism:pocket"),
    ],
)
def test_other_names_of_the_same_base_are_no_reason_to_doubt(named: str, here: str) -> None:
    assert said(named, here) == ()


@pytest.mark.parametrize(
    ("named", "here"),
    [
        ("Qwen/Qwen3-8B-Base", OURS),
        ("Qwen/Qwen3-4B", OURS),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_an_adapter_of_another_model_on_the_hub_is_refused(named: str, here: str) -> None:
    with pytest.raises(AdapterError, match=f"trained on '{named}', which is another model than '{here}'"):
        said(named, here)


@pytest.mark.parametrize(
    "named",
    [
        None,
        "",
        "/data/checkpoints/run-7",
        "unsloth/Meta-Qwen-3-8B",
        "somebody/Qwen3-8B",
        "C:\\models\\other",
        "x" * 5000,
        "~nobody-of-this-name/model",
        "a\0b",
    ],
)
def test_a_base_that_cannot_be_compared_is_said(named: str | None) -> None:
    (caveat,) = said(named, OURS)
    assert "names no base model" in caveat if not named else named in caveat


def test_a_revision_is_compared_where_both_are_commits() -> None:
    assert said(OURS, OURS, revision="a" * 40, loaded="a" * 40) == ()
    assert said(OURS, OURS, revision="main", loaded=None) == ()
    assert "revision main" in said(OURS, OURS, revision="main", loaded="a" * 40)[0]
    with pytest.raises(AdapterError, match="load the base with that revision"):
        said(OURS, OURS, revision="b" * 40, loaded="a" * 40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of the same shapes, and an adapter that was trained on the first."""
    home = tmp_path_factory.mktemp("bases")
    for name, seed in (("one", 0), ("two", 1)):
        make_model("llama", seed=seed).save_pretrained(home / name)
        make_tokenizer().save_pretrained(home / name)
    model = put_adapter(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = str(home / "one")
    model.save_pretrained(home / "adapter")
    return {name: home / name for name in ("one", "two", "adapter")}


def test_a_named_folder_that_is_here_is_compared_by_its_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = lms.load(folders["one"], device="cpu"), lms.load(folders["two"], device="cpu")
    assert lms.attach(one, folders["adapter"]).caveats == ()
    moved = lms.wrap(make_model("llama"), make_tokenizer(), name="moved elsewhere")
    assert lms.attach(moved, folders["adapter"]).caveats == ()
    half = lms.load(folders["one"], dtype="bfloat16", device="cpu")
    assert lms.attach(half, folders["adapter"]).caveats == ()
    for put in (Seat(two).put, lambda adapter: lms.attach(two, adapter)):
        with pytest.raises(AdapterError, match="which is another model than"):
            put(folders["adapter"])


def test_a_seat_that_only_swaps_numbers_compares_the_base_too(folders: dict[str, Path], tmp_path: Path) -> None:
    seat = Seat(lms.load(folders["one"], device="cpu"))
    assert seat.put(folders["adapter"]).caveats == ()
    other = tmp_path / "other"
    other.mkdir()
    for file in folders["adapter"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = other / "adapter_config.json"
    for named, caveats in ((str(folders["two"]), None), ("/gone/base", 1)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        if caveats is None:
            with pytest.raises(AdapterError, match="another model"):
                seat.put(other)
        else:
            assert len(seat.put(other).caveats) == caveats


def test_a_path_whose_parent_is_here_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not lms.looks_like_hub_id("runs/checkpoint-5")
    assert lms.looks_like_hub_id("someone/checkpoint-5")
    with pytest.raises(ModelError, match="does not exist"):
        lms.load("runs/checkpoint-5")
    with pytest.raises(AdapterError, match="does not exist"):
        lms.attach(tiny_lm(), "runs/checkpoint-5")
