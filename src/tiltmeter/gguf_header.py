"""What a GGUF file says of itself, held against the file before a library reads it. Torch-free.

The format counts everything beforehand (keys, texts, arrays, tensors), and its readers believe the counts: one number
too large makes them ask for more memory than there is, or never end. Layout: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from tiltmeter.errors import ArtifactError, require
from tiltmeter.untrusted import Error

__all__ = ["check_gguf"]

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
_TEXT, _ARRAY = 8, 9
_LISTED = 10_000_000  # values of arrays, which readers take apart one by one
_NAME = 1 << 16  # bytes of a key or of a tensor's name


class _Bad(ValueError):
    """What is wrong, in words."""


class _Header:
    """A file that is read field by field and never past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self.listed = file, size, 0

    def take(self, n: int) -> bytes:
        if n > self.size - self._file.tell():
            raise _Bad(f"a field at byte {self._file.tell():,} would be {n:,} bytes long, beyond the file's end")
        return self._file.read(n)

    def skip(self, n: int) -> None:
        if n > self.size - self._file.tell():
            raise _Bad(f"a field at byte {self._file.tell():,} would be {n:,} bytes long, beyond the file's end")
        self._file.seek(n, os.SEEK_CUR)

    def number(self, form: str) -> int:
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize(form)))
        return int(value)

    def text(self, longest: int) -> str:
        n = self.number("Q")
        if n > longest:
            raise _Bad(f"a text at byte {self._file.tell():,} would be {n:,} bytes long")
        try:
            return self.take(n).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Bad(f"a name before byte {self._file.tell():,} is not UTF-8") from error

    def value(self) -> int | None:
        """Pass over a value; a whole number of 4 bytes is returned, since one of them is the alignment."""
        kind = self.number("I")
        if kind == _TEXT:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self._array()
        elif kind == 4:
            return self.number("I")
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise _Bad(f"a value before byte {self._file.tell():,} has the unknown type {kind}")
        return None

    def _array(self) -> None:
        kind, n = self.number("I"), self.number("Q")
        self.listed += n
        if self.listed > _LISTED:
            raise _Bad(f"its arrays hold more than {_LISTED:,} values")
        if kind == _TEXT:
            for _ in range(n):
                self.skip(self.number("Q"))
        elif kind in _SIZES:
            self.skip(n * _SIZES[kind])
        else:
            raise _Bad(f"an array before byte {self._file.tell():,} has elements of the unknown type {kind}")

    def at(self) -> int:
        return self._file.tell()


def check_gguf(path: str | Path, *, error: Error = ArtifactError, advice: str = "fetch it again") -> None:
    """Refuse a GGUF file whose counts, lengths and offsets do not fit the file.

    Args:
        path, error, advice: see `tiltmeter.untrusted.read_bytes`.

    Raises:
        TiltmeterError: of the class `error`: no regular file, no GGUF file, or one that does not hold what it says.
        MissingExtra: the `gguf` package is not installed.
    """
    require("gguf", extra="gguf")
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _Bad("it is no regular file")
            _check(_Header(file, found.st_size))
    except FileNotFoundError as reason:
        raise error(f"cannot read '{path}': it does not exist; {advice}") from reason
    except OSError as reason:
        raise error(f"cannot read '{path}': {reason.strerror or reason}; {advice}") from reason
    except ValueError as reason:
        raise error(f"'{path}' is truncated or no GGUF file ({reason}); {advice}") from reason


def _check(header: _Header) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if header.take(4) != b"GGUF":
        raise _Bad("it does not begin with GGUF")
    version = header.number("I")
    if version not in (2, 3):
        raise _Bad(f"its version is {version}; 2 and 3 can be read")
    tensors, keys = header.number("Q"), header.number("Q")
    alignment, names = 32, set()
    for _ in range(keys):  # each takes 13 bytes at least, so that the file's end bounds this
        key = header.text(_NAME)
        if key in names:
            raise _Bad(f"the key '{key[:60]}' stands twice")
        names.add(key)
        number = header.value()
        if key == "general.alignment":
            alignment = number or 0
    if alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 16:
        raise _Bad(f"its alignment is {alignment}, which is no power of two from 8 to 65,536")
    last, seen = 0, set()
    for _ in range(tensors):
        name, dimensions = header.text(_NAME), header.number("I")
        if name in seen:
            raise _Bad(f"the tensor '{name[:60]}' stands twice")
        seen.add(name)
        if dimensions > 4:
            raise _Bad(f"'{name[:60]}' has {dimensions} dimensions; at most 4 are allowed")
        shape = [header.number("Q") for _ in range(dimensions)]
        kind, offset = header.number("I"), header.number("Q")
        try:
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise _Bad(f"'{name[:60]}' has the unknown number format {kind}") from error
        if offset % alignment or (shape and shape[0] % block):
            raise _Bad(f"'{name[:60]}' does not lie on whole blocks (offset {offset}, shape {shape})")
        last = max(last, offset + math.prod(shape) // block * width)
    start = header.at() + -header.at() % alignment
    if tensors and start + last > header.size:
        raise _Bad(f"its tensors would end at byte {start + last:,} of {header.size:,}")
