"""The run directory: a manifest that says where results came from, and records that survive a crash.

A run directory holds `manifest.json` (provenance, written once) and any number of record files in JSON lines.
A record is on the disk when `append` returns: one line, one write, flush and fsync. A process that dies in
the middle of a line leaves at most one torn last line, which reading back counts and skips; damage anywhere
else is refused, since a hole in the evidence must not pass for a shorter run.

It knows nothing of models, readings or verdicts: a record is a JSON object. Not-a-number and infinity are
written as `null` (the project's "no number here"), never as the NaN that strict JSON readers reject. One
process writes a record file at a time.

    >>> run = RunDir.create("runs/one", config={"every": 10}, seed=0)
    >>> run.append("readings.jsonl", {"step": 0})
    >>> run.records("readings.jsonl").rows
    ({'step': 0},)
"""

from __future__ import annotations

import codecs
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tiltmeter import untrusted
from tiltmeter.artifacts import sync_folder, write_file
from tiltmeter.errors import ArtifactError, InputError, StorageError
from tiltmeter.untrusted import parse_json, read_bytes

__all__ = [
    "Checkpoint",
    "Records",
    "RunDir",
    "append_record",
    "checkpoints",
    "provenance",
    "read_json",
    "read_records",
    "write_json",
    "write_records",
]

FORMAT = 1
MANIFEST = "manifest.json"
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
)
_GIT_SECONDS = 10.0
_TAIL = 1 << 16


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Checkpoint(NamedTuple):
    """A folder `checkpoint-N` that a trainer saved, and its step N."""

    step: int
    path: Path


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a trainer's output folder, in the order of their steps."""
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(Checkpoint(int(match[1]), path) for match, path in found if match)


class Records(NamedTuple):
    """What a record file holds: its whole rows, and how many torn last lines were skipped (0 or 1).

    `lines` holds the number of each row's line in the file, from 1: blank lines are no rows.
    """

    rows: tuple[dict[str, Any], ...]
    torn: int
    lines: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunDir:
    """A folder of results with its provenance. Make one with `create`, reopen it with `open`.

    Attributes:
        path: the folder.
        manifest: the content of `manifest.json`: `format`, `provenance`, `config`.
    """

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        seed: int | None = None,
        command: Sequence[str] | None = None,
        existing: Literal["refuse", "resume"] = "refuse",
    ) -> RunDir:
        """Make the folder and write its manifest.

        Args:
            path: the folder; parents are made.
            config: what the run was asked to do, as JSON values. On resume it must equal the stored one.
            seed: the seed of the run, if it has one.
            command: the command line; `sys.argv` by default.
            existing: what to do when the folder already holds a run.

        Raises:
            InputError: the folder holds a run and `existing="refuse"`, or a run with another config.
            ArtifactError: the manifest of the run to resume cannot be used.
            StorageError: the folder cannot be made or written.
        """
        folder = Path(path)
        wanted = _plain(config or {})
        if (folder / MANIFEST).exists():
            if existing == "refuse":
                raise InputError(f"{folder} already holds a run; choose another folder, or resume this run")
            return _resume(folder, wanted)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _storage_error(folder, error) from error
        manifest = {"format": FORMAT, "provenance": provenance(seed=seed, command=command), "config": wanted}
        write_json(folder / MANIFEST, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Reopen a run.

        Raises:
            ArtifactError: there is no manifest, or it is damaged or of another format version.
        """
        folder = Path(path)
        manifest = read_json(folder / MANIFEST)
        found = manifest.get("format")
        if found != FORMAT:
            raise ArtifactError(
                f"{folder / MANIFEST} has format {found!r}; this version of tiltmeter reads format {FORMAT}; "
                "use the tiltmeter version that wrote it, or start the run again"
            )
        return cls(folder, manifest)

    def append(self, record_file: str, record: Mapping[str, Any]) -> None:
        """Append one record to a JSONL file of this run; see `append_record`."""
        append_record(self.path / record_file, record)

    def records(self, record_file: str) -> Records:
        """The records of a JSONL file of this run; see `read_records`. An absent file has none."""
        path = self.path / record_file
        return read_records(path) if path.exists() else Records((), 0)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file of this run in one step; see `write_json`."""
        write_json(self.path / name, value)


def _resume(folder: Path, wanted: Mapping[str, Any]) -> RunDir:
    run = RunDir.open(folder)
    stored = run.manifest.get("config", {})
    if not isinstance(stored, dict):
        raise ArtifactError(f"{folder / MANIFEST} holds no config; restore it, or choose another folder")
    differing = sorted(k for k in {*stored, *wanted} if stored.get(k) != wanted.get(k))
    if differing:
        shown = "; ".join(f"{k}: {stored.get(k)!r} there, {wanted.get(k)!r} now" for k in differing[:5])
        raise InputError(
            f"{folder} holds a run with another config ({shown}); resume it with the config that it was "
            "started with, or choose another folder"
        )
    return run


def provenance(*, seed: int | None = None, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Where a result comes from: versions, commit, machine, seed, command and time. Imports none of the
    packages.

    Returns:
        `tiltmeter`, `git` (`commit` and `dirty` of the working folder's repository, or None), `python`,
        `platform`, `packages` (name to version, None where not installed), `seed`, `command`, `started`
        (UTC).
    """
    return {
        "tiltmeter": _version("tiltmeter"),
        "git": _git_state(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "seed": seed,
        "command": list(sys.argv if command is None else command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one record as one JSON line; it is on the disk when this returns.

    A torn last line that an earlier crash left is cut off first, and a line that could not be written whole
    is taken back, so that a full disk never damages the records before it.

    Raises:
        InputError: the record holds something that JSON cannot.
        StorageError: the line could not be written (disk full, no permission, not a folder).
    """
    target = Path(path)
    line = (_dump(record, target) + "\n").encode("utf-8", errors="replace")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        created = not target.exists()
        with target.open("ab+", buffering=0) as file:
            _mend_tail(file.fileno())
            size = os.fstat(file.fileno()).st_size
            try:
                _write_all(file.fileno(), line)
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):  # the next append mends what this could not take back
                    os.ftruncate(file.fileno(), size)
                raise
        if created:
            sync_folder(target.parent)
    except OSError as error:
        raise _storage_error(target, error) from error


def write_records(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file anew, whole or not at all.

    Raises:
        InputError: a record holds something that JSON cannot.
        StorageError: the file could not be written; the old one is untouched.
    """
    target = Path(path)
    text = "".join(_dump(record, target) + "\n" for record in records)
    write_file(target, text.encode("utf-8", errors="replace"))


def read_records(path: str | Path, *, constants: bool = False) -> Records:
    """Read a JSONL file back, forgiving blank lines and one torn last line.

    Args:
        path: the file.
        constants: whether to take NaN and Infinity, which other tools write.

    Raises:
        ArtifactError: the file is missing, or a line that is not a torn last one is not a JSON object.
    """
    target = Path(path)
    lines = read_bytes(target).removeprefix(codecs.BOM_UTF8).split(b"\n")
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        row = _parse(line, constants=constants)
        if row is None:
            raise ArtifactError(
                f"{target} is damaged at line {number} of {len(lines) - 1} ({line[:40]!r} is not a JSON "
                "object); only a torn last line can be forgiven; restore the file, or start the run again in "
                "a new folder"
            )
        rows.append(row)
        numbers.append(number)
    last = _parse(lines[-1], constants=constants)
    if last is not None:  # the process died between the closing brace and the newline: nothing is missing
        rows.append(last)
        numbers.append(len(lines))
    return Records(tuple(rows), int(bool(lines[-1].strip()) and last is None), tuple(numbers))


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: a reader sees the old content or the new, never half of it.

    Raises:
        InputError: the value holds something that JSON cannot.
        StorageError: the file could not be written; the old one is untouched.
    """
    target = Path(path)
    text = _dump(value, target, indent=2) + "\n"
    write_file(target, text.encode("utf-8", errors="replace"))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: the file is missing, cannot be read, or is not one JSON object.
    """
    return untrusted.read_json(path)


def _parse(line: bytes, *, constants: bool = False) -> dict[str, Any] | None:
    try:
        value = parse_json(line, constants=constants)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _dump(value: Mapping[str, Any], target: Path, indent: int | None = None) -> str:
    try:
        return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False, indent=indent)
    except TypeError as error:
        raise InputError(
            f"a record for {target} holds something that JSON cannot ({error}); turn it into text, numbers, "
            "lists or mappings with text keys first"
        ) from error


def _plain(value: Any) -> Any:
    """The same value in JSON's types: numpy unwrapped, paths as text, not-a-number and infinity as None."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is not text")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _mend_tail(handle: int) -> None:
    """Cut off a torn last line, or close a whole one that only lacks its newline."""
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        begin = max(0, start - _TAIL)
        tail = os.pread(handle, start - begin, begin) + tail
        start = begin
    line = tail.rpartition(b"\n")[2]
    if _parse(line) is None:
        os.ftruncate(handle, size - len(line))
    else:
        _write_all(handle, b"\n")


def _write_all(handle: int, data: bytes) -> None:
    written = 0
    while written < len(data):  # a nearly full disk accepts a part
        written += os.write(handle, data[written:])


def _storage_error(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(
        f"cannot write {path}: {reason}; what was written before is safe; free space or choose another "
        "folder, then resume"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
