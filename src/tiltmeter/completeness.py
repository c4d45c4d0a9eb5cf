"""Whether a checkpoint is all there, judged by its content, and what says that it is still the same.

A trainer writes its state last, but whoever copies a run keeps another order and old times. So every safetensors file
must be as long as its own header says, every shard that an index or a name promises must be there, and every JSON file
that is needed must be whole. Age decides only where there is no trainer's state. Nothing is loaded; torch-free.
"""

from __future__ import annotations

import hashlib
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiltmeter.errors import ArtifactError
from tiltmeter.untrusted import parse_json, read_bytes

__all__ = ["STATE_FILE", "checkpoint_stamp", "missing_part"]

STATE_FILE = "trainer_state.json"
SETTLED_SECONDS = 30.0
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors)")
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
_SAMPLE = 1 << 16


def missing_part(path: Path, *, now: float | None = None) -> str | None:
    """What a checkpoint still lacks, as the end of a sentence; None where it is complete.

    Args:
        path: the checkpoint's folder.
        now: the time to compare with, seconds since the epoch; the clock's by default.
    """
    try:
        return _missing(path, time.time() if now is None else now)
    except (OSError, ArtifactError) as error:  # removed or exchanged by the trainer meanwhile, or no file at all
        return f"it changes while it is looked at ({getattr(error, 'strerror', None) or error})"


def _missing(path: Path, now: float) -> str | None:
    folders = [path, *(entry for entry in sorted(path.iterdir()) if entry.is_dir())]
    if (path / STATE_FILE).exists() and _json(path / STATE_FILE) is None:
        return f"{STATE_FILE} is half written"
    adapters = [folder for folder in folders if (folder / _ADAPTER).exists()]
    if not adapters and not (path / "config.json").exists():
        return f"it holds no {_ADAPTER} and no config.json"
    for folder in folders:
        if (problem := _missing_weights(path, folder)) is not None:
            return problem
    if not (path / STATE_FILE).exists():
        # The time of change too: a copy may keep the old time of modification, but not that one.
        stats = [entry.stat() for folder in folders for entry in folder.iterdir()]
        age = now - max((max(s.st_mtime, s.st_ctime) for s in stats), default=now)
        if age <= SETTLED_SECONDS:
            return f"it has no {STATE_FILE}, and its files changed {max(age, 0):.0f} s ago"
    return None


def _missing_weights(path: Path, folder: Path) -> str | None:
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    inside = "" if folder == path else f"{folder.name}/"
    if _ADAPTER in names:
        if _json(folder / _ADAPTER) is None:
            return f"{inside}{_ADAPTER} is half written"
        if _ADAPTER_WEIGHTS not in names and "adapter_model.bin" not in names:
            return f"it holds no {inside}{_ADAPTER_WEIGHTS}"
    for name in sorted(names):
        if name.endswith(".safetensors.index.json"):
            index = _json(folder / name)
            shards = index.get("weight_map") if index else None
            if not isinstance(shards, dict):
                return f"{inside}{name} is half written"
            if lost := sorted({str(shard) for shard in shards.values()} - names):
                return f"{len(lost)} shard(s) that {inside}{name} names are missing, such as {lost[0]}"
        elif match := _SHARD.fullmatch(name):
            wanted = (f"{match[1]}-{n:05d}-of-{match[3]}{match[4]}" for n in range(1, int(match[3]) + 1))
            if (lost_one := next((one for one in wanted if one not in names), None)) is not None:
                return f"{inside}{lost_one} is missing"
        if name.endswith(".safetensors") and (problem := _cut_short(folder / name)) is not None:
            return f"{inside}{name} is truncated: {problem}"
    return None


def _cut_short(path: Path) -> str | None:
    """How a safetensors file is shorter than its header says; damage of other kinds is its reader's business."""
    size = path.stat().st_size
    if not path.is_file():
        return "it is no file"
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return f"it has {size} bytes"
        (length,) = struct.unpack("<Q", start)
        if length > _LONGEST_HEADER:
            return None
        if size < 8 + length:
            return f"it has {size} bytes, and its header alone {8 + length}"
        header = _parse(file.read(length))
    if header is None:
        return None
    spans = [entry.get("data_offsets") for entry in header.values() if isinstance(entry, dict)]
    ends = [span[1] for span in spans if isinstance(span, list) and len(span) == 2 and isinstance(span[1], int)]
    wanted = 8 + length + max(ends, default=0)
    return f"it has {size} of {wanted} bytes" if size < wanted else None


def checkpoint_stamp(path: Path) -> str:
    """What says that a checkpoint's weights are still those that were read: names, sizes and samples of the content.

    Raises:
        OSError: a file was removed meanwhile.
    """
    digest = hashlib.sha256()
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLE))
            if size > 2 * _SAMPLE:
                content.seek(size // 2)
                digest.update(content.read(_SAMPLE))
            content.seek(max(0, size - _SAMPLE))
            digest.update(content.read(_SAMPLE))
    return digest.hexdigest()


def _weight_files(path: Path) -> Iterator[Path]:
    for pattern in ("*.safetensors", "*/*.safetensors", _ADAPTER, f"*/{_ADAPTER}"):
        yield from sorted(file for file in path.glob(pattern) if file.is_file())


def _json(path: Path) -> dict[str, Any] | None:
    return _parse(read_bytes(path))


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(content, foreign=True)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
