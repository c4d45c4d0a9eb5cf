"""What is believed, and what is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tiltmeter import sound
from tiltmeter.errors import InputError

NO_NUMBERS = (float("nan"), math.inf, -math.inf, None, "1.0", True, [1.0], 10**400, np.float32("nan"), 1j)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_only_finite_numbers_are_numbers(value: object) -> None:
    with pytest.raises(InputError, match="threshold is"):
        sound.number("threshold", value)


def test_limits_are_kept_and_named() -> None:
    sound.number("rate", 0.05, above=0, below=1)
    sound.number("rate", np.float64(1.0), least=0, most=1)
    for value in (0, 1, -3):
        with pytest.raises(InputError, match="above 0 and below 1"):
            sound.number("rate", value, above=0, below=1)
    with pytest.raises(InputError, match="at least 0"):
        sound.number("step", -1, least=0)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (lambda v: sound.whole("n", v, least=1), (1, np.int64(3)), (0, 1.0, True, None, "1", float("nan"))),
        (lambda v: sound.text("t", v), ("word",), ("", " \n", None, 3, b"x")),
        (lambda v: sound.texts("t", v), (("a",), ("a", "b")), ((), ("",), ("a", "a"), ["a"], "a", None)),
        (lambda v: sound.digest("d", v), ("0a" * 32,), ("", "0a" * 31, "0A" * 32, None, 0, "0a" * 32 + "\n")),
        (lambda v: sound.choice("c", v, ("x", "y")), ("x",), ("z", None, ["x"], "")),
    ],
)
def test_whole_numbers_texts_digests_and_choices(
    check: Callable[[object], None], good: tuple[object, ...], bad: tuple[object, ...]
) -> None:
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(InputError):
            check(value)


def test_arrays_have_their_kind_shape_and_range() -> None:
    sound.array("a", np.ones((2, 3), np.float32), (None, 3), above=0)
    sound.array("a", np.zeros(2, np.int64), (2,), kind="i", least=0)
    sound.array("a", np.zeros((0, 3)), (None, 3))
    for value in (
        None, [1.0], np.ones(2), np.ones((2, 4)), np.ones((2, 3), int), np.full((2, 3), np.nan), -np.ones((2, 3)),
        np.array([[1.0, np.inf, 1.0]]), np.array([["a", "b", "c"]]), np.ones((2, 3), object), np.ones((1, 2, 3)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"^a "):
            sound.array("a", value, (None, 3), least=0)


def test_orthonormal_rows_are_told_from_others() -> None:
    rows = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 4)))[0].T
    sound.orthonormal("d", rows)
    sound.orthonormal("d", np.zeros((0, 9)))
    twice = rows.copy()
    twice[1] = twice[0]  # of unit length, and not orthogonal
    for bad in (2 * rows, twice, 1e300 * rows):
        with pytest.raises(InputError, match="orthonormal"):
            sound.orthonormal("d", bad)


def test_json_lists_become_arrays_and_nothing_else_does() -> None:
    found = sound.from_json("values", [[1, None], [2.5, 3]], 2)
    np.testing.assert_array_equal(found, np.array([[1, np.nan], [2.5, 3]], np.float32))
    assert found.dtype == np.float32
    assert sound.from_json("norms", [], 1).shape == (0,)
    for bad in (["1.0"], [True], [[1.0]], None, "12", [1e39], [10**400], {"0": 1.0}):
        with pytest.raises(InputError, match="norms"):
            sound.from_json("norms", bad, 1)
    for bad in ([1.0], [[1.0], [1.0, 2.0]], [[[1.0]]], [[1.0], None]):
        with pytest.raises(InputError, match="values"):
            sound.from_json("values", bad, 2)
