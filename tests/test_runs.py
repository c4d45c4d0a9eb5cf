"""The run directory: provenance, records that survive a crash, and writes that fail cleanly."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiltmeter import runs
from tiltmeter.errors import ArtifactError, InputError, StorageError
from tiltmeter.runs import RunDir, append_record, provenance, read_json, read_records, write_json

needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


def test_a_manifest_says_where_the_run_came_from(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "a" / "run", config={"every": 10}, seed=7, command=["tiltmeter", "demo"])
    stored = json.loads((tmp_path / "a" / "run" / "manifest.json").read_text())
    assert stored["format"] == 1
    assert stored["config"] == {"every": 10}
    facts = stored["provenance"]
    assert facts["seed"] == 7
    assert facts["command"] == ["tiltmeter", "demo"]
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["numpy"] == np.__version__
    assert set(facts["packages"]) >= {"torch", "transformers", "peft"}
    assert facts["started"].endswith("+00:00")


def test_the_working_folders_commit_is_recorded_with_its_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, check=True)
        return done.stdout.decode().strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance()["git"] is None
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    assert provenance()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("two")
    assert provenance()["git"]["dirty"] is True


def test_versions_are_read_without_importing_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from tiltmeter.runs import provenance\n"
        "print(provenance()['packages']['torch'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip()[0].isdigit()


def test_a_reopened_run_has_the_manifest_and_the_records_that_were_written(tmp_path: Path) -> None:
    created = RunDir.create(tmp_path / "run", config={"a": 1})
    created.append("readings.jsonl", {"step": 0, "text": "naïve\nlines"})
    created.append("readings.jsonl", {"step": 10})
    opened = RunDir.open(tmp_path / "run")
    assert opened.manifest == created.manifest
    assert opened.records("readings.jsonl").rows == ({"step": 0, "text": "naïve\nlines"}, {"step": 10})
    assert opened.records("readings.jsonl").torn == 0
    assert opened.records("absent.jsonl").rows == ()


def test_a_run_is_not_started_over_another(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run", config={"every": 10})
    with pytest.raises(InputError, match="already holds a run"):
        RunDir.create(tmp_path / "run", config={"every": 10})


def test_a_run_resumes_with_its_own_config_only(tmp_path: Path) -> None:
    first = RunDir.create(tmp_path / "run", config={"every": 10, "name": "x"})
    again = RunDir.create(tmp_path / "run", config={"every": 10, "name": "x"}, existing="resume")
    assert again.manifest == first.manifest
    with pytest.raises(InputError, match="every: 10 there, 20 now"):
        RunDir.create(tmp_path / "run", config={"every": 20, "name": "x"}, existing="resume")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"{}"], ids=repr)
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        RunDir.open(tmp_path)


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ArtifactError, match="format 99; this version of tiltmeter reads format 1"):
        RunDir.open(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        RunDir.open(tmp_path)


def test_not_a_number_becomes_null_at_any_depth(tmp_path: Path) -> None:
    record = {
        "plain": float("nan"),
        "array": np.array([[1.5, np.nan], [np.inf, -np.inf]], dtype=np.float32),
        "scalar": np.float32("nan"),
        "count": np.int64(3),
        "deep": [{"x": (float("-inf"), 2.0)}],
        "path": Path("a") / "b",
    }
    append_record(tmp_path / "r.jsonl", record)
    write_json(tmp_path / "r.json", record)
    wanted = {
        "plain": None,
        "array": [[1.5, None], [None, None]],
        "scalar": None,
        "count": 3,
        "deep": [{"x": [None, 2.0]}],
        "path": str(Path("a/b")),
    }
    assert json.loads((tmp_path / "r.jsonl").read_text()) == wanted
    assert json.loads((tmp_path / "r.json").read_text()) == wanted
    assert "NaN" not in (tmp_path / "r.jsonl").read_text() + (tmp_path / "r.json").read_text()


@pytest.mark.parametrize("value", [{"a": {1, 2}}, {"a": {3: "x"}}, {"a": b"x"}], ids=repr)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, value: dict[str, object]) -> None:
    with pytest.raises(InputError, match="JSON cannot"):
        append_record(tmp_path / "r.jsonl", value)
    with pytest.raises(InputError, match="JSON cannot"):
        write_json(tmp_path / "r.json", value)
    assert list(tmp_path.iterdir()) == []


def test_one_torn_last_line_is_counted_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n{"a":')
    assert read_records(path)[:2] == (({"a": 1}, {"a": 2}), 1)


def test_a_last_line_that_only_lacks_its_newline_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}')
    assert read_records(path)[:2] == (({"a": 1}, {"a": 2}), 0)
    append_record(path, {"a": 3})
    assert read_records(path)[:2] == (({"a": 1}, {"a": 2}, {"a": 3}), 0)


@pytest.mark.parametrize(
    "content",
    [b'{"a":\n{"a":2}\n', b'{"a":1}\n[2]\n', b'{"a":1}\n{"a"\n{"b'],
    ids=["torn first", "not an object", "two torn lines"],
)
def test_damage_that_is_not_a_torn_last_line_is_refused_with_its_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"r\.jsonl is damaged at line [12]"):
        read_records(path)


@pytest.mark.parametrize("blank", [b"\n", b"  \t\n", b"\r\n"], ids=["empty", "spaces", "carriage return"])
def test_blank_lines_are_no_damage_and_rows_keep_the_numbers_of_their_lines(tmp_path: Path, blank: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(blank + b'{"a":1}\n' + blank * 2 + b'{"a":2}\n' + blank + b" ")
    assert read_records(path) == (({"a": 1}, {"a": 2}), 0, (2, 5))


@pytest.mark.parametrize("torn", [b'{"a":', b'{"a": "' + b"x" * 200_000], ids=["short", "longer than a block"])
def test_appending_after_a_crash_cuts_off_the_torn_line_and_nothing_else(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a":1}\n' + torn)
    append_record(path, {"a": 2})
    assert path.read_bytes() == b'{"a":1}\n{"a": 2}\n'


def test_a_file_that_holds_only_a_torn_line_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a":')
    append_record(path, {"a": 2})
    assert read_records(path)[:2] == (({"a": 2},), 0)


def test_a_record_is_on_the_disk_when_append_returns(tmp_path: Path) -> None:
    program = (
        "import os, sys; from tiltmeter.runs import append_record\n"
        "append_record(sys.argv[1], {'a': 1}); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "r.jsonl"
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_records(path).rows == ({"a": 1},)


def test_each_record_is_flushed_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    path = tmp_path / "r.jsonl"
    append_record(path, {"a": 1})
    first = path.stat().st_size
    append_record(path, {"a": 2})
    # The first append also makes the new name durable, by syncing the folder.
    assert synced[0] == first
    assert synced[-1] == path.stat().st_size
    assert len(synced) == 3


def test_a_full_disk_is_one_clear_sentence_and_earlier_records_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append_record(path, {"a": 1})
    before = path.read_bytes()
    size = len(before)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # ten more bytes fit: a part of the line
    try:
        with pytest.raises(StorageError, match=r"cannot write .*r\.jsonl: .*free space"):
            append_record(path, {"a": "x" * 100})
        assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    append_record(path, {"a": 2})
    assert read_records(path)[:2] == (({"a": 1}, {"a": 2}), 0)


@needs_full_device
def test_no_space_left_on_the_device_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)):
        append_record(tmp_path / "r.jsonl", {"a": 1})


def test_a_failed_json_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*r\.json"):
            write_json(path, {"a": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_a_run_cannot_be_made_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        RunDir.create(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        append_record(tmp_path / "file" / "r.jsonl", {})


def test_json_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    seen: list[dict[str, object]] = []
    real = os.replace

    def look_then_replace(source: str, target: str) -> None:
        seen.append(json.loads(Path(source).read_text()))  # the new content is complete before it is in place
        seen.append(json.loads(path.read_text()))
        real(source, target)

    monkeypatch.setattr(os, "replace", look_then_replace)
    write_json(path, {"a": 2})
    assert seen == [{"a": 2}, {"a": 1}]
    assert read_json(path) == {"a": 2}


def test_everything_public_is_listed() -> None:
    assert all(hasattr(runs, name) for name in runs.__all__)
    assert runs.__all__ == sorted(runs.__all__)
