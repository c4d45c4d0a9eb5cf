"""Files that appear whole or not at all, and headers that say what a file is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiltmeter.artifacts import read_artifact, write_artifact, write_file
from tiltmeter.errors import ArtifactError, InputError, StorageError

ARRAYS = {"x": np.arange(6.0).reshape(2, 3)[:, ::2], "names": np.array([3, 1], np.int32)}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "new" / "a.safetensors", "thing", 3, {"threshold": 0.1, "words": ["ä"]}, ARRAYS)
    header, arrays = read_artifact(path, "thing", 3, remedy="make it again")
    assert header == {"threshold": 0.1, "words": ["ä"]}
    assert {k: v.tolist() for k, v in arrays.items()} == {"x": [[0.0, 2.0], [3.0, 5.0]], "names": [3, 1]}
    assert arrays["names"].dtype == np.int32
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_anything_else_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a.safetensors", "thing", 3, {}, ARRAYS)
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:40])
    save_file({"x": np.zeros(2)}, tmp_path / "foreign.safetensors")
    for name, kind, format, said in (
        ("absent", "thing", 3, "there is no thing"),
        ("short", "thing", 3, "truncated"),
        ("foreign", "thing", 3, "not written by tiltmeter"),
        ("a", "other", 3, "holds a thing of format 3; needed is a other of format 3"),
        ("a", "thing", 4, "format 4"),
    ):
        with pytest.raises(ArtifactError, match=said) as caught:
            read_artifact(tmp_path / f"{name}.safetensors", kind, format, remedy="make it again")
        assert "make it again" in str(caught.value)


def test_a_header_that_is_no_json_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for value in (float("nan"), object()):
        with pytest.raises(InputError, match="header"):
            write_artifact(tmp_path / "a.safetensors", "thing", 1, {"v": value}, ARRAYS)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path / "a", b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(StorageError):
        write_file(path / "below-a-file", b"x")
