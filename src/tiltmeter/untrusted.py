"""Reading files that somebody else may have written: the one place where their bytes become values. Torch-free.

Everything that could run away is bounded before it is done: only regular files are opened (a pipe would be waited for
for ever), size, nesting and digits are counted before anything is parsed, and what a header says about sizes is held
against the file before anything is allocated. What comes out is plain: text without lone surrogates, numbers that are
finite and fit into 64 bits, mappings in which every key stands once.

    content = read_json("adapter_config.json", error=AdapterError, advice="save the adapter again")
    for number, row in read_json_lines("answers.jsonl"): ...
    check_safetensors("model.safetensors", error=ModelError, advice="fetch it again")

Every refusal is one sentence that names the file, the place in it where there is one, and what to do.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiltmeter.errors import ArtifactError, InputError, TiltmeterError, require

__all__ = [
    "LIMIT", "TensorEntry", "check_safetensors", "parse_json", "path_in", "read_bytes", "read_json", "read_json_lines",
    "read_text", "read_toml", "read_yaml",
]  # fmt: skip

LIMIT = 1 << 30  # bytes; a file of text beyond a gigabyte is no config and no record
_WRITTEN_BY_HAND = 1 << 22  # bytes of a TOML or YAML file: its parsers are slow
_DEPTH = 64  # levels of lists and mappings
_NODES = 5_000_000  # values in one TOML or YAML file, every use of an alias counted
_DIGITS = 40  # of a whole number where more than 64 bits are allowed, as in a tokenizer's "no limit"
_HEADER_BYTES = 100_000_000  # as safetensors has it
_TENSORS = 1_000_000
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_KEY = re.compile(r"""(?:(?:(?<![\w-])[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")  # of TOML, dotted
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

Error = type[TiltmeterError]
TensorEntry = tuple[str, tuple[int, ...]]  # (dtype, shape) of a tensor, as safetensors spells them


class _Bad(ValueError):
    """What is wrong with a content, in words; becomes an error that names the file."""


def read_bytes(
    path: str | Path, *, limit: int = LIMIT, error: Error = ArtifactError, advice: str = "check the path"
) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file; a link to a regular file is followed.
        limit: the most bytes that it may hold.
        error: what to raise.
        advice: what to do then, as an imperative.

    Raises:
        TiltmeterError: of the class `error`: missing, not readable, no regular file, or larger than `limit`.
    """
    try:
        # Without waiting: opening a pipe that nobody writes into would never return.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _Bad(f"it is no file but {_kind(found.st_mode)}")
            content = file.read(limit + 1) if found.st_size <= limit else b""  # one more: sizes of /proc are zero
            if max(found.st_size, len(content)) > limit:
                raise _Bad(f"it holds more than the {limit:,} bytes that such a file may hold")
    except FileNotFoundError as reason:
        raise error(f"cannot read '{path}': it does not exist; {advice}") from reason
    except IsADirectoryError as reason:
        raise error(f"cannot read '{path}': it is no file but a folder; {advice}") from reason
    except OSError as reason:
        raise error(f"cannot read '{path}': {reason.strerror or reason}; {advice}") from reason
    except ValueError as reason:  # _Bad, and a path with a NUL in it
        raise error(f"cannot read {str(path)[:200]!r}: {reason}; {advice}") from reason
    return content


def read_text(
    path: str | Path, *, limit: int = LIMIT, error: Error = ArtifactError, advice: str = "check the path"
) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; see `read_bytes`.

    Raises:
        TiltmeterError: of the class `error`: see `read_bytes`, or it is not UTF-8.
    """
    content = read_bytes(path, limit=limit, error=error, advice=advice)
    try:
        return _decoded(content)
    except _Bad as reason:
        raise error(f"'{path}' is no text: {reason}; {advice}") from reason


def read_json(
    path: str | Path,
    *,
    limit: int = LIMIT,
    error: Error = ArtifactError,
    advice: str = "restore it or make it again",
    constants: bool = False,
    foreign: bool = False,
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path, limit, error, advice: see `read_bytes`.
        constants, foreign: see `parse_json`.

    Raises:
        TiltmeterError: of the class `error`: see `read_bytes`, or it is not one sound JSON object.
    """
    content = read_bytes(path, limit=limit, error=error, advice=advice)
    try:
        value = parse_json(content, constants=constants, foreign=foreign)
    except ValueError as reason:
        raise error(f"'{path}' cannot be read as JSON ({reason}); {advice}") from reason
    if not isinstance(value, dict):
        raise error(f"'{path}' is not a JSON object (damaged or foreign); {advice}")
    return value


def read_json_lines(
    path: str | Path,
    *,
    limit: int = LIMIT,
    error: Error = ArtifactError,
    advice: str = "mend that line, or make the file again",
    constants: bool = False,
) -> list[tuple[int, dict[str, Any]]]:
    """The numbered objects of a file with one JSON object per line; blank lines are passed over.

    Args:
        path, limit, error, advice: see `read_bytes`.
        constants: see `parse_json`.

    Raises:
        TiltmeterError: of the class `error`: see `read_bytes`, or a line is not one sound JSON object.
    """
    rows = []
    content = read_bytes(path, limit=limit, error=error, advice=advice).removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, constants=constants)
        except ValueError as reason:
            raise error(f"'{path}' is damaged at line {number}: {reason}; {advice}") from reason
        if not isinstance(row, dict):
            raise error(f"'{path}' is damaged at line {number}: it is no JSON object; {advice}")
        rows.append((number, row))
    return rows


def parse_json(content: bytes | str, *, constants: bool = False, foreign: bool = False) -> Any:
    """A JSON value whose nesting and numbers are bounded.

    Args:
        content: UTF-8 or text.
        constants: whether to take NaN and Infinity, which JSON does not have and other tools write.
        foreign: whether to take those, whole numbers of more than 64 bits (up to 40 digits, a tokenizer's "no limit"),
            and a key that stands twice (the last one counts).

    Returns:
        The value; a lone surrogate in a text has become the replacement character.

    Raises:
        ValueError: it is not JSON, or breaks a bound; the message says what and where.
    """
    raw = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    _refuse_depth(raw)
    text = _decoded(raw)
    try:
        value = json.loads(
            text,
            parse_int=_big_integer if foreign else _integer,
            parse_float=float if foreign or constants else _float,
            parse_constant=None if foreign or constants else _no_constant,
            object_pairs_hook=None if foreign else _once,
        )
    except json.JSONDecodeError as reason:
        raise _Bad(str(reason)) from reason
    # Escapes such as \\ud800 are the one way in which a surrogate gets past the decoder.
    return _plain(value) if "\\u" in text else value


def read_toml(
    path: str | Path,
    *,
    limit: int = _WRITTEN_BY_HAND,
    error: Error = ArtifactError,
    advice: str = "mend that line",
) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        TiltmeterError: of the class `error`: see `read_text`, it is not TOML, or too deep or too long.
    """
    text = read_text(path, limit=limit, error=error, advice=advice)
    content: dict[str, Any] = _parsed(path, "TOML", lambda: _toml(text), error, advice)
    return content


def read_yaml(
    path: str | Path,
    *,
    limit: int = _WRITTEN_BY_HAND,
    error: Error = ArtifactError,
    advice: str = "mend that line",
) -> Any:
    """The value in a YAML file, made of plain types only.

    Raises:
        TiltmeterError: of the class `error`: see `read_text`, it is not YAML, or too deep, or its aliases unfold to
            too much.
        MissingExtra: PyYAML is not installed.
    """
    yaml = require("yaml", extra="judge")
    text = read_text(path, limit=limit, error=error, advice=advice)
    return _parsed(path, "YAML", lambda: _yaml(yaml, text), error, advice)


def path_in(folder: Path, name: str, *, error: Error = InputError, advice: str = "name a folder that exists") -> Path:
    """The path that a file's content names, relative to a folder.

    Raises:
        TiltmeterError: of the class `error`: no file can have that name.
    """
    parts = [part.encode("utf-8", "replace") for part in name.split("/")]
    if not name.strip() or "\0" in name or len(name) > 4000 or max(map(len, parts)) > 255:
        raise error(f"{_short(name)!r} is no name that a file or folder can have; {advice}")
    return folder / name


def check_safetensors(
    path: str | Path,
    *,
    dtypes: Sequence[str] | None = None,
    error: Error = ArtifactError,
    advice: str = "make it again",
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Hold the header of a safetensors file against the file, before anything is allocated.

    Args:
        path: the file.
        dtypes: those that may stand in it, as safetensors spells them; None allows all.
        error, advice: see `read_bytes`.

    Returns:
        The dtype and shape of each tensor by its name, and the metadata.

    Raises:
        TiltmeterError: of the class `error`: no regular file, a header that is damaged or does not fit the file, or
            another dtype.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _Bad(f"it is no file but {_kind(found.st_mode)}")
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(found.st_size - 8, _HEADER_BYTES):
                raise _Bad(f"its header would be {length:,} bytes long and the file has {found.st_size:,}")
            header = parse_json(file.read(length))
        return _tensor_entries(header, found.st_size - 8 - length, dtypes)
    except FileNotFoundError as reason:
        raise error(f"cannot read '{path}': it does not exist; {advice}") from reason
    except IsADirectoryError as reason:
        raise error(f"cannot read '{path}': it is no file but a folder; {advice}") from reason
    except OSError as reason:
        raise error(f"cannot read '{path}': {reason.strerror or reason}; {advice}") from reason
    except ValueError as reason:
        raise error(f"'{path}' is truncated or no safetensors file that can be used ({reason}); {advice}") from reason


def _tensor_entries(
    header: Any, size: int, dtypes: Sequence[str] | None
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The entries of a header, for a file with `size` bytes of data."""
    if not isinstance(header, dict):
        raise _Bad("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Bad("its metadata are no mapping from text to text")
    if len(header) > _TENSORS:
        raise _Bad(f"it names {len(header):,} tensors; {_TENSORS:,} are allowed")
    entries, spans = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _Bad(f"the entry of '{_short(name)}' is not made of dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise _Bad(f"'{_short(name)}' has the unknown dtype {_short(dtype)}")
        if dtypes is not None and dtype not in dtypes:
            raise _Bad(f"'{_short(name)}' is stored as {dtype}; readable are {', '.join(dtypes)}")
        if not _counts(shape) or len(shape) > 16 or not _counts(offsets) or len(offsets) != 2:
            raise _Bad(f"'{_short(name)}' has a shape or offsets that are no lists of whole numbers")
        if math.prod(shape) * _BITS[dtype] != (offsets[1] - offsets[0]) * 8:
            raise _Bad(f"'{_short(name)}' has {offsets[1] - offsets[0]} bytes, which do not make {dtype} {shape}")
        entries[name] = (dtype, tuple(shape))
        spans.append((offsets[0], offsets[1]))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _Bad("its tensors overlap, or leave holes between them")
        end = stop
    if end != size:
        raise _Bad(f"its tensors end at byte {end:,} of {size:,}")
    return entries, metadata


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(part) is int and 0 <= part < 1 << 62 for part in value)


def _short(value: object) -> str:
    shown = value if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


def _decoded(content: bytes) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as reason:
        line = content.count(b"\n", 0, reason.start) + 1
        raise _Bad(f"byte {reason.start} (line {line}) is not UTF-8") from reason


def _parsed(path: str | Path, kind: str, make: Callable[[], Any], error: Error, advice: str) -> Any:
    try:
        return make()
    except ValueError as reason:
        raise error(f"'{path}' is not {kind} that can be used ({_short_lines(reason)}); {advice}") from reason


def _short_lines(reason: BaseException) -> str:
    return " ".join(str(reason).split())[:200]


def _toml(text: str) -> dict[str, Any]:
    raw = text.encode()
    _refuse_depth(raw, what="TOML")
    if _LONG_KEY.search(text):  # the parser's time grows with their square
        raise _Bad("a key has more than 64 parts")
    try:
        content = tomllib.loads(text)
    except RecursionError as reason:  # strings in other quotes than JSON's can hide brackets from the count
        raise _Bad(f"it is nested more than {_DEPTH} levels deep") from reason
    return dict(_walked(content))


def _yaml(yaml: Any, text: str) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):  # one event at a time: this does not recurse
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH:
                raise _Bad(f"it is nested more than {_DEPTH} levels deep")
        return _walked(yaml.load(text, Loader=loader))  # a safe loader: plain types only
    except yaml.YAMLError as reason:
        raise _Bad(str(reason)) from reason
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as reason:
        # What the library's makers of numbers, dates and truth values raise where the text is none.
        raise _Bad(str(reason) or type(reason).__name__) from reason


def _walked(content: Any) -> Any:
    """Refuse what is too deep, too much, or holds numbers that are none; what is used twice is counted twice."""
    waiting: list[tuple[int, Any]] = [(0, content)]
    count = 0
    while waiting:
        depth, value = waiting.pop()
        count += 1
        if count > _NODES:
            raise _Bad(f"it holds more than {_NODES:,} values")
        if depth > _DEPTH:
            raise _Bad(f"it is nested more than {_DEPTH} levels deep")
        if isinstance(value, dict):
            waiting += [(depth + 1, part) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple | set):
            waiting += [(depth + 1, part) for part in value]
        elif isinstance(value, int):
            _refuse_wide(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise _Bad(f"{value} stands where a finite number belongs")
    return content


def _refuse_depth(content: bytes, *, what: str = "JSON") -> None:
    """Refuse deep nesting without parsing: brackets outside of double quotes are counted."""
    if content.count(b"[") + content.count(b"{") <= _DEPTH:
        return
    brackets = _STRING.sub(b"", content).translate(None, _NOT_BRACKETS)
    signs = np.frombuffer(brackets, dtype=np.uint8)
    steps = np.where((signs == ord("[")) | (signs == ord("{")), 1, -1).cumsum()
    if steps.size and int((steps - np.minimum.accumulate(np.minimum(steps, 0))).max()) > _DEPTH:
        raise _Bad(f"{what} nested more than {_DEPTH} levels deep")


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise _Bad(f"a whole number of {len(digits):,} digits ({digits[:12]}...)")
    value = int(digits)
    _refuse_wide(value)
    return value


def _big_integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise _Bad(f"a whole number of {len(digits):,} digits ({digits[:12]}...)")
    return int(digits)


def _refuse_wide(value: int) -> None:
    if not -(1 << 63) <= value < 1 << 64:
        raise _Bad("a whole number that does not fit into 64 bits")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Bad(f"{digits[:20]} is beyond the largest number")
    return value


def _no_constant(name: str) -> float:
    raise _Bad(f"{name} stands where a finite number belongs")


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Bad(f"the key '{_short(key)}' stands twice")
        found[key] = value
    return found


def _plain(value: Any) -> Any:
    """The same without lone surrogates, which no file could be written with."""
    if isinstance(value, str):
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(part) for key, part in value.items()}
    return value
