"""A checkpoint is complete by its content: a half of it, with whatever times, is not."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from monitoring import fresh_model
from tiltmeter.completeness import checkpoint_stamp, missing_part

LATER = 60.0


def adapter(folder: Path) -> Path:
    """A checkpoint of an adapter, as the Trainer leaves it."""
    fresh_model().save_pretrained(folder)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    return folder


def sharded(folder: Path) -> Path:
    """A checkpoint of full weights in several files, with an index."""
    fresh_model(lora=False).save_pretrained(folder, max_shard_size="20KB")
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


KINDS = {"adapter": adapter, "sharded": sharded}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name) / "checkpoint-2") for name, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trainer_saved_is_complete(whole: dict[str, Path], kind: str) -> None:
    assert missing_part(whole[kind]) is None


def needed(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json") and "generation" not in f.name)


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_that_is_needed_is_missed_when_it_is_away_or_cut_short(
    whole: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    for file in needed(whole[kind]):
        for share in (None, 0.0, 0.5, 0.999):
            copy = tmp_path / f"{file.name}-{share}"
            shutil.copytree(whole[kind], copy)
            target = copy / file.name
            if share is None:
                target.unlink()
            else:
                content = target.read_bytes()
                target.write_bytes(content[: int(share * len(content))])
            for entry in copy.iterdir():
                os.utime(entry, (1e9, 1e9))  # old times say nothing
            if file.name == "trainer_state.json" and share is None:
                assert "has no trainer_state.json" in str(missing_part(copy))
            elif file.name.endswith("index.json") and share is None:
                assert missing_part(copy) is None  # the shards' own names say how many there are
            elif file.name == "config.json" and share is not None:
                pass  # the model's own reader refuses it
            else:
                assert missing_part(copy) is not None, (file.name, share)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_safetensors_file_is_whole_at_its_full_length_and_at_no_other(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        shapes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
        (path / "adapter_config.json").write_text("{}")
        (path / "trainer_state.json").write_text("{}")
        file = path / "adapter_model.safetensors"
        save_file({f"t{i}": torch.zeros(n) for i, n in enumerate(shapes)}, file)
        assert missing_part(path) is None
        content = file.read_bytes()
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        assert "truncated" in str(missing_part(path))


def test_without_a_trainers_state_files_must_have_come_to_rest_whatever_their_own_time_says(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole["adapter"], tmp_path / "copy")
    (tmp_path / "copy" / "trainer_state.json").unlink()
    for entry in (tmp_path / "copy").iterdir():
        os.utime(entry, (1e9, 1e9))
    assert "changed" in str(missing_part(tmp_path / "copy"))
    assert missing_part(tmp_path / "copy", now=time.time() + LATER) is None


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "half an index": (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {'), "half written"),
    "an index of nothing": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "half written"),
    "no config": (lambda p: (p / "config.json").unlink(), "no adapter_config.json and no config.json"),
    "a half adapter beside": (
        lambda p: ((p / "two").mkdir(), (p / "two" / "adapter_config.json").write_text("{")), "two/adapter_config.json",
    ),
    "a deep state": (lambda p: (p / "trainer_state.json").write_text("[" * 100_000), "half written"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAK)
def test_what_is_broken_is_named(whole: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(whole["sharded"], tmp_path / "copy")
    action, words = BREAK[name]
    action(tmp_path / "copy")
    assert words in str(missing_part(tmp_path / "copy"))


def test_a_folder_that_is_gone_is_not_complete(tmp_path: Path) -> None:
    assert "while it is looked at" in str(missing_part(tmp_path / "checkpoint-9"))


def test_a_stamp_follows_the_weights_and_nothing_else(whole: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole["adapter"], tmp_path / "copy")
    before = checkpoint_stamp(whole["adapter"])
    (tmp_path / "copy" / "trainer_state.json").write_text(json.dumps({"global_step": 9}))
    os.utime(tmp_path / "copy" / "adapter_model.safetensors", (1e9, 1e9))
    assert checkpoint_stamp(tmp_path / "copy") == before
    file = tmp_path / "copy" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert checkpoint_stamp(tmp_path / "copy") != before
