"""Files that appear whole or not at all, and headers that say what a file is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiltmeter.artifacts import read_artifact, read_json_artifact, write_artifact, write_file, write_json_artifact
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


def test_every_byte_of_an_artifact_is_under_its_digest(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a.safetensors", "thing", 3, {"threshold": 0.1, "zeros": "0" * 64}, ARRAYS)
    content = path.read_bytes()
    said = set()
    for place in range(len(content)):
        for bit in (1, 32):
            changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            path.write_bytes(changed)
            with pytest.raises(ArtifactError, match=r"a\.safetensors") as caught:
                read_artifact(path, "thing", 3, remedy="make it again")
            said.add("was changed after it was written" in str(caught.value))
    assert said == {True, False}  # False: what is not even JSON any more, or no safetensors
    path.write_bytes(content)
    assert read_artifact(path, "thing", 3, remedy="")[0]["zeros"] == "0" * 64


def test_an_artifact_without_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    save_file({"x": np.zeros(2)}, path, metadata={"tiltmeter": '{"kind": "thing", "format": 3}'})
    with pytest.raises(ArtifactError, match="carries no digest"):
        read_artifact(path, "thing", 3, remedy="make it again")


def test_constants_that_are_no_json_are_refused_in_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for header in ('{"kind": "thing", "format": 3, "v": NaN}', "[" * 9999, "[]", '"thing"', ""):
        save_file({"x": np.zeros(2)}, path, metadata={"tiltmeter": header})
        with pytest.raises(ArtifactError, match="not written by tiltmeter"):
            read_artifact(path, "thing", 3, remedy="make it again")


def test_a_folder_and_a_pipe_are_no_artifacts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe"):
        with pytest.raises(ArtifactError, match="is no file"):
            read_artifact(tmp_path / name, "thing", 3, remedy="make it again")


def test_a_json_artifact_is_read_back_and_refused_once_a_value_has_changed(tmp_path: Path) -> None:
    path = write_json_artifact(tmp_path / "r.json", "reading", 1, {"values": [0.1, None], "names": ("ä",)})
    content = path.read_text()
    assert read_json_artifact(path, "reading", 1, remedy="x") == {"values": [0.1, None], "names": ["ä"]}
    path.write_text(json.dumps(json.loads(content), indent=3))  # another layout is the same content
    assert read_json_artifact(path, "reading", 1, remedy="x") == {"values": [0.1, None], "names": ["ä"]}
    for changed, said in (
        (content.replace("0.1", "0.2"), "was changed after it was written"),
        (content.replace('"sha256"', '"sha512"'), "carries no digest"),
        (content.replace("0.1", "Infinity"), "damaged"),
        (content[:-9], "damaged"),
        ("[]", "not written by tiltmeter"),
    ):
        path.write_text(changed)
        with pytest.raises(ArtifactError, match=said):
            read_json_artifact(path, "reading", 1, remedy="x")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="no JSON text"):
        read_json_artifact(path, "reading", 1, remedy="x")
