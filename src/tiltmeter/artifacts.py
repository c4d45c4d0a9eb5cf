"""Files that we write: whole or not at all; arrays as one safetensors file with a JSON header. Torch-free, no pickle.

An artifact's header says what it is (`kind`) and in which version of its layout (`format`), so that a file of another
kind, a damaged one, or one of another version is refused by name.

    write_artifact("d.safetensors", "detector", 2, {"threshold": 0.35}, {"axis": axis})
    header, arrays = read_artifact("d.safetensors", "detector", 2, remedy="fit the detector again")
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltmeter.errors import ArtifactError, InputError, StorageError

__all__ = ["read_artifact", "sync_folder", "write_artifact", "write_file"]

_HEADER = "tiltmeter"


def write_file(path: str | Path, content: bytes) -> Path:
    """Write a file in one step: a reader sees the old content or the new, never half of it; folders are made.

    Raises:
        StorageError: it could not be written; an older file is untouched.
    """
    target = Path(path)
    scratch: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)  # mkstemp's 0600 would keep colleagues from reading it
        os.replace(scratch, target)
        scratch = None
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; what was there before is untouched: free space "
            f"({len(content) / 1e6:.1f} MB are needed) or choose another folder, then run the same command again"
        ) from error
    finally:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
    return target


def write_artifact(
    path: str | Path, kind: str, format: int, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> Path:
    """Write arrays and a JSON header as one safetensors file, in one step.

    Args:
        path: the file.
        kind: what it is, in a word.
        format: version of this kind's layout.
        header: JSON values; `kind` and `format` are added.
        arrays: by name.

    Raises:
        InputError: the header holds something that JSON cannot.
        StorageError: see `write_file`.
    """
    from safetensors.numpy import save

    try:
        text = json.dumps({**header, "kind": kind, "format": format}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the header of {path} cannot be written as JSON ({error}); use plain finite values"
        ) from error
    return write_file(path, save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {_HEADER: text}))


def read_artifact(
    path: str | Path, kind: str, format: int, *, remedy: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The header, without kind and format, and the arrays of an artifact.

    Args:
        path: the file.
        kind, format: what it must be.
        remedy: what to do otherwise, as an imperative: "fit the detector again".

    Raises:
        ArtifactError: it is missing, damaged, of another kind or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no {kind} at '{path}'; check the path, or {remedy}") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{path}' is truncated or no safetensors file ({error}); {remedy}") from error
    try:
        header = dict(json.loads(metadata[_HEADER]))
        found = header.pop("kind"), header.pop("format")
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"'{path}' was not written by tiltmeter; check the path, or {remedy}") from error
    if found != (kind, format):
        raise ArtifactError(
            f"'{path}' holds a {found[0]} of format {found[1]}; needed is a {kind} of format {format}: check the path, "
            f"use the version of tiltmeter that wrote it, or {remedy}"
        )
    return header, arrays


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
