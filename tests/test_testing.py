"""The public doubles plant what they say, and the readout contract catches each breach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tiltmeter.baselines import ActivationNorm
from tiltmeter.errors import InputError, NumericalError
from tiltmeter.testing import check_readout, planted_activations

Read = Callable[[Any], Any]


@dataclass
class Double:
    """A readout of two numbers, good unless told otherwise."""

    reads: Read
    name: str = "double"
    names: tuple[str, ...] = ("sum", "first")
    layer: int = 0

    def read(self, activations: Any) -> Any:
        return self.reads(activations)


def good(x: Any) -> Any:
    return np.stack([x.sum(axis=1), x[:, 0] + 0 * x.sum(axis=1)], axis=1)


def in_place(x: Any) -> Any:
    values = good(x)
    x[0, 0] += 1
    return values


def forgetful() -> Read:
    calls: list[int] = []

    def read(x: Any) -> Any:
        calls.append(1)
        return good(x) + len(calls)

    return read


def refusing(x: Any) -> Any:
    if np.isnan(x).any():
        raise NumericalError("no")
    return good(x)


def test_a_good_readout_passes() -> None:
    check_readout(Double(good), 5)
    check_readout(Double(refusing), 5)
    check_readout(ActivationNorm(3), 5)


@pytest.mark.parametrize(
    ("readout", "clause"),
    [
        (Double(good, name=" "), "a readout has a name"),
        (Double(good, names=()), "names are present"),
        (Double(good, names=("a", "a")), "names are present and distinct"),
        (Double(good, layer=-1), "a layer is 0 or more"),
        (Double(lambda x: good(x)[:, :1]), r"values are \(8, 2\)"),
        (Double(lambda x: good(x).mean(axis=0)), r"values are \(8, 2\)"),
        (Double(lambda x: good(x).astype(int)), "floating type"),
        (Double(lambda x: good(x) / np.float32(1e-45) * np.float32(1e30)), "finite"),
        (Double(in_place), "are not changed"),
        (Double(forgetful()), "asked again"),
        (Double(lambda x: good(x) - good(x).mean(axis=0)), "rows beside it"),
        (Double(lambda x: good(x) + np.arange(len(x))[:, None] * (len(x) > 1)), "rows beside it"),
        (Double(lambda x: good(np.nan_to_num(x))), "NaN never gives a finite"),
        (Double(lambda x: good(x) + (np.nan if np.isnan(x).any() else 0.0)), "NaN never gives a finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:divide by zero", "ignore:invalid value")
def test_each_breach_of_the_contract_is_named(readout: Double, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_readout(readout, 5)


def test_a_readout_that_depends_on_the_order_of_its_rows_is_caught() -> None:
    def read(x: Any) -> Any:
        values = good(x)
        return values if len(x) == 1 or x[0, 0] == first else values[::-1]

    first = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)[0, 0]
    with pytest.raises(AssertionError, match="the order"):
        check_readout(Double(read), 5)


def test_planted_poles_lie_the_stated_gap_apart_along_orthonormal_directions() -> None:
    planted = planted_activations(("a", "b"), hidden=32, n=4000, gap=6.0, seed=3)

    np.testing.assert_allclose(planted.directions @ planted.directions.T, np.eye(2), atol=1e-12)
    for t in range(2):
        apart = (planted.positive[t] - planted.negative[t]).mean(axis=0)
        np.testing.assert_allclose(apart, 6.0 * planted.directions[t], atol=0.12)  # 5 standard errors


def test_the_planted_shift_is_the_mean_difference_after_training() -> None:
    planted = planted_activations(("a", "b"), n_prompts=4000, shift=(1.5, -0.5), seed=3)

    moved = (planted.tuned - planted.reference).mean(axis=0)

    np.testing.assert_allclose(moved, np.array([1.5, -0.5]) @ planted.directions, atol=0.08)


def test_planted_activations_follow_the_seed() -> None:
    one, same, other = (planted_activations(seed=seed) for seed in (1, 1, 2))

    np.testing.assert_array_equal(one.tuned, same.tuned)
    assert not np.array_equal(one.tuned, other.tuned)
    assert one.positive.shape == (3, 150, 64)
    assert one.reference.shape == one.tuned.shape == (115, 64)


@pytest.mark.parametrize("given", [{"shift": (1.0,)}, {"hidden": 2}, {"names": ()}])
def test_a_plan_that_does_not_fit_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="do not fit"):
        planted_activations(**given)
