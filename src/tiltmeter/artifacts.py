"""Files that we write: whole or not at all; arrays as one safetensors file with a JSON header. Torch-free, no pickle.

An artifact's header says what it is (`kind`) and in which version of its layout (`format`), and holds a SHA-256 over
the whole file but itself (`sha256`), so that a file of another kind, a damaged or edited one, or one of another version
is refused by name. The digest is no signature: who can write the file can write its digest.

    write_artifact("d.safetensors", "detector", 2, {"threshold": 0.35}, {"axis": axis})
    header, arrays = read_artifact("d.safetensors", "detector", 2, remedy="fit the detector again")
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tiltmeter.errors import ArtifactError, InputError, StorageError, TiltmeterError
from tiltmeter.fingerprint import sha
from tiltmeter.untrusted import check_safetensors, parse_json, read_bytes

__all__ = [
    "made", "read_artifact", "read_json_artifact", "sync_folder", "write_artifact", "write_file", "write_json_artifact",
]  # fmt: skip

_HEADER = "tiltmeter"
_DTYPES = ("F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")  # that numpy has
_SHA = "sha256"
_BLANK = "0" * 64  # stands where the digest comes to stand, while it is computed

T = TypeVar("T")


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
        header: JSON values; `kind`, `format` and `sha256` are added.
        arrays: by name.

    Raises:
        InputError: the header holds something that JSON cannot.
        StorageError: see `write_file`.
    """
    from safetensors.numpy import save

    # The digest comes first, so that its place is the first one in the file that looks like it.
    text = _dump(path, {_SHA: _BLANK, **header, "kind": kind, "format": format})
    content = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {_HEADER: text})
    return write_file(path, content.replace(_BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1))


def read_artifact(
    path: str | Path, kind: str, format: int, *, remedy: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The header, without kind, format and digest, and the arrays of an artifact.

    Args:
        path: the file.
        kind, format: what it must be.
        remedy: what to do otherwise, as an imperative: "fit the detector again".

    Raises:
        ArtifactError: it is missing, damaged, changed after it was written, of another kind or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = _read(path, kind, remedy)
    _, metadata = check_safetensors(path, dtypes=_DTYPES, advice=remedy)
    try:
        arrays = {key: array.copy() for key, array in load(content).items()}  # of their own: those may be written to
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"'{path}' is truncated or no safetensors file ({error}); {remedy}") from error
    header = _parse(path, metadata.get(_HEADER, ""), remedy)
    stored = header.pop(_SHA, None)
    whole = isinstance(stored, str) and len(stored) == len(_BLANK)
    blanked = content.replace(str(stored).encode(), _BLANK.encode(), 1) if whole else b""
    _check(path, header, (kind, format), stored, hashlib.sha256(blanked).hexdigest(), remedy)
    return header, arrays


def write_json_artifact(path: str | Path, kind: str, format: int, content: Mapping[str, Any]) -> Path:
    """Write a JSON object that says what it is, with a digest over its content; its layout may be changed.

    Raises:
        InputError: the content holds something that JSON cannot.
        StorageError: see `write_file`.
    """
    plain = {**content, "kind": kind, "format": format}
    text = _dump(path, {**plain, _SHA: sha(json.loads(_dump(path, plain)))})
    return write_file(path, f"{text}\n".encode())


def read_json_artifact(path: str | Path, kind: str, format: int, *, remedy: str) -> dict[str, Any]:
    """What `write_json_artifact` wrote, without kind, format and digest.

    Raises:
        ArtifactError: it is missing, damaged, changed after it was written, of another kind or of another format.
    """
    try:
        text = _read(path, kind, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"'{path}' is no JSON text ({error}); {remedy}") from error
    content = _parse(path, text, remedy)
    stored = content.pop(_SHA, None)
    _check(path, content, (kind, format), stored, sha(content), remedy)
    return content


def made(path: str | Path, what: str, remedy: str, make: Callable[[], T]) -> T:
    """Make an object from a file's fields; whatever is wrong with them becomes one error that names the file.

    Args:
        path: the file.
        what: what it holds, in words.
        remedy: what to do otherwise, as an imperative.
        make: makes it.

    Raises:
        ArtifactError: a field is missing, unknown, of another type or unsound.
    """
    try:
        return make()
    except (TiltmeterError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = f"{error}" if isinstance(error, TiltmeterError) else f"{type(error).__name__}: {error}"
        said = f"it lacks {error}" if isinstance(error, KeyError) else said
        raise ArtifactError(f"'{path}' is no sound {what}: {said}; restore it, or {remedy}") from error


def _dump(path: str | Path, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the header of {path} cannot be written as JSON ({error}); use plain finite values"
        ) from error


def _read(path: str | Path, kind: str, remedy: str) -> bytes:
    if not Path(path).exists():
        raise ArtifactError(f"there is no {kind} at '{path}'; check the path, or {remedy}")
    return read_bytes(path, advice=f"check the path, or {remedy}")


def _parse(path: str | Path, text: str, remedy: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"'{path}' is damaged or was not written by tiltmeter ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"'{path}' was not written by tiltmeter; check the path, or {remedy}")
    return found


def _check(
    path: str | Path, header: dict[str, Any], wanted: tuple[str, int], stored: object, real: str, remedy: str
) -> None:
    """Take kind and format out of the header, and refuse what is foreign, of another version, or changed."""
    if stored is not None and stored != real:
        raise ArtifactError(
            f"'{path}' was changed after it was written: its digest does not match its content (damage on the way, or "
            f"an edit); restore it, or {remedy}"
        )
    if not {"kind", "format"} <= set(header):
        raise ArtifactError(f"'{path}' was not written by tiltmeter; check the path, or {remedy}")
    found = header.pop("kind"), header.pop("format")
    if found != wanted:
        raise ArtifactError(
            f"'{path}' holds a {found[0]} of format {found[1]}; needed is a {wanted[0]} of format {wanted[1]}: check "
            f"the path, use the version of tiltmeter that wrote it, or {remedy}"
        )
    if stored is None:
        raise ArtifactError(
            f"'{path}' carries no digest, so nobody could tell whether it was changed: an older version of tiltmeter "
            f"wrote it; {remedy}"
        )


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
