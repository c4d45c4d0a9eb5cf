"""What a number, a text or an array must be to be believed: every artifact checks its own fields with these when it is
made, so that an unsound one exists neither in a file nor in memory.

Each check names what was got, what is allowed, and (in `remedy`, where it is given) what to do. A bool is no number and
a text that spells a number is none.

    >>> number("threshold", 0.35)
    >>> number("threshold", float("nan"))
    Traceback (most recent call last):
    tiltmeter.errors.InputError: threshold is nan; it must be a finite number
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltmeter.errors import InputError

__all__ = ["array", "choice", "digest", "from_json", "number", "orthonormal", "text", "texts", "whole"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 60


def number(
    what: str,
    value: object,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Refuse what is no finite number, or outside its range.

    Args:
        what: the message calls it so.
        value: of any type.
        above, below: the number must lie strictly between them.
        least, most: the number may equal them.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{what} is {_shown(value)}; it must be a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise InputError(f"{what} is {found}; it must be a finite number")
    limits = ((above, "above"), (below, "below"), (least, "at least"), (most, "at most"))
    if not (above < found < below and least <= found <= most):
        said = " and ".join(f"{word} {limit:g}" for limit, word in limits if math.isfinite(limit))
        raise InputError(f"{what} is {found:g}; it must be {said}")


def whole(what: str, value: object, *, least: int = 0) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{what} is {_shown(value)}; it must be a whole number")
    if value < least:
        raise InputError(f"{what} is {_shown(value)}; it must be at least {least}")


def text(what: str, value: object, *, blank: bool = False) -> None:
    """Refuse what is no text, or a blank one unless that is allowed.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, str) or not (blank or value.strip()):
        raise InputError(f"{what} is {_shown(value)}; it must be text{'' if blank else ' that says something'}")


def texts(what: str, value: object) -> None:
    """Refuse what is no tuple of at least one text, all different.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, tuple) or not value:
        raise InputError(f"{what} is {_shown(value)}; it must be a tuple of at least one text")
    for one in value:
        text(what, one)
    if len(set(value)) != len(value):
        raise InputError(f"{what} names {_shown(value)}; each may stand there once")


def digest(what: str, value: object) -> None:
    """Refuse what is no SHA-256 in hex.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise InputError(f"{what} is {_shown(value)}; it must be a SHA-256, 64 hex digits")


def choice(what: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse what is not among the allowed words.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{what} is {_shown(value)}; allowed are {', '.join(allowed)}")


def array(
    what: str,
    value: object,
    shape: Sequence[int | None],
    *,
    kind: str = "f",
    least: float = -math.inf,
    above: float = -math.inf,
) -> None:
    """Refuse what is no array of finite numbers of that shape.

    Args:
        what: the message calls it so.
        value: of any type.
        shape: wanted; None stands for any length.
        kind: "f" for floating point numbers, "i" for whole ones.
        least, above: each entry must be at least this, or above it.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind != kind:
        found = f"of dtype {value.dtype}" if isinstance(value, np.ndarray) else _shown(value)
        raise InputError(f"{what} is {found}; it must be an array of {'floats' if kind == 'f' else 'whole numbers'}")
    if value.ndim != len(shape) or any(w not in (None, n) for n, w in zip(value.shape, shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{what} has shape {value.shape}; it must be ({wanted})")
    if not np.isfinite(value).all():
        raise InputError(f"{what} holds {int((~np.isfinite(value)).sum())} numbers that are not finite")
    if value.size and not (value.min() >= least and value.min() > above):
        limit = f"at least {least:g}" if math.isfinite(least) else f"above {above:g}"
        raise InputError(f"{what} holds {float(value.min()):g}; each number must be {limit}")


def orthonormal(what: str, rows: NDArray[Any]) -> None:
    """Refuse rows (rank, dim) that are not orthonormal; seen in one random combination of them, which costs little.

    Raises:
        InputError: they are not.
    """
    wide = rows.astype(np.float64)
    drawn = np.random.default_rng(0).normal(size=len(wide))
    with np.errstate(all="ignore"):  # rows of 1e300 overflow, and are refused
        again, lengths = wide @ (drawn @ wide), np.linalg.norm(wide, axis=1)
    if not (np.allclose(lengths, 1.0, atol=1e-3) and np.allclose(again, drawn, atol=1e-3)):
        raise InputError(f"{what} are not orthonormal rows (lengths {lengths.min():.3g} to {lengths.max():.3g})")


def from_json(what: str, value: object, ndim: int) -> NDArray[np.float32]:
    """Nested lists of numbers as float32; None becomes NaN ("no number here").

    Raises:
        InputError: ragged or too deep lists, or anything in them that is neither a number nor None.
    """
    rows = value if ndim > 1 else [value]
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise InputError(
            f"{what} is {_shown(value)}; it must be {'lists in a list' if ndim > 1 else 'a list'} of numbers"
        )
    if len({len(row) for row in rows}) > 1:
        raise InputError(f"{what} has rows of different lengths")
    bad = next((x for row in rows for x in row if x is not None and type(x) not in (int, float)), None)
    if bad is not None:
        raise InputError(f"{what} holds {_shown(bad)}; each entry must be a number, or null")
    limit = float(np.finfo(np.float32).max)
    if any(x is not None and abs(x) > limit for row in rows for x in row):
        raise InputError(f"{what} holds a number beyond {limit:.3g}, the largest that a reading keeps")
    found = np.array([[math.nan if x is None else x for x in row] for row in rows], dtype=np.float32)
    return found if ndim > 1 else found[0]


def _shown(value: object) -> str:
    shown = f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else repr(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
