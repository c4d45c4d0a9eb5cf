"""Public doubles: activations with a known answer planted in them, and the contract that every readout keeps.

For the tests of this package and of whoever writes a readout of their own. No model is needed.

    >>> planted = planted_activations(seed=1)
    >>> direction(planted.positive[0], planted.negative[0]) @ planted.directions[0]     # about 1
    >>> check_readout(MyReadout(...), hidden=576)     # raises, or is content
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiltmeter.drift import Readout
from tiltmeter.errors import InputError, NumericalError

__all__ = ["Planted", "check_readout", "planted_activations"]

FloatArray = NDArray[np.floating[Any]]


class Planted(NamedTuple):
    """Activations whose directions and shift are known.

    Attributes:
        names: of the k traits.
        directions: (k, hidden) orthonormal: the planted truth.
        positive: (k, n, hidden) activations of the positive poles.
        negative: (k, n, hidden) activations of the negative poles; rows of equal index form a pair.
        reference: (prompts, hidden) activations before training.
        tuned: (prompts, hidden) the same prompts after training: shifted, and disturbed by fresh noise.
        shift: (k,) by how much along each direction, in activation units.
    """

    names: tuple[str, ...]
    directions: FloatArray
    positive: FloatArray
    negative: FloatArray
    reference: FloatArray
    tuned: FloatArray
    shift: FloatArray


def planted_activations(
    names: Sequence[str] = ("first", "second", "third"),
    *,
    hidden: int = 64,
    n: int = 150,
    n_prompts: int = 115,
    gap: float = 10.0,
    shift: Sequence[float] | None = None,
    noise: float = 1.0,
    seed: int = 0,
) -> Planted:
    """Plant one direction per trait, and a shift along each, in noise around a common offset.

    Args:
        names: of the traits, k of them.
        hidden: width of an activation; at least k.
        n: activations per pole.
        n_prompts: measurement prompts.
        gap: distance between the poles of a trait, in the unit of the noise.
        shift: (k,) what training is to change; by default 1, -2, 3, ...
        noise: standard deviation of each coordinate.
        seed: of the draw.

    Raises:
        InputError: there are more traits than dimensions, or not one shift per trait.
    """
    k = len(names)
    moved = np.array([(-1.0) ** t * (t + 1) for t in range(k)] if shift is None else shift, dtype=np.float64)
    if not 1 <= k <= hidden or moved.shape != (k,):
        raise InputError(
            f"{k} traits, {moved.size} shifts and width {hidden} do not fit; give one shift per trait and a "
            "width of at least the number of traits"
        )
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(hidden, k)))[0].T  # (k, hidden)
    offset = 5 * rng.normal(size=hidden)

    def around(centre: FloatArray, *shape: int) -> FloatArray:
        return np.asarray(centre + noise * rng.normal(size=(*shape, hidden)), dtype=np.float32)

    half = gap / 2 * directions[:, None, :]  # (k, 1, hidden)
    reference = around(offset, n_prompts)
    return Planted(
        names=tuple(names),
        directions=directions,
        positive=around(offset + half, k, n),
        negative=around(offset - half, k, n),
        reference=reference,
        tuned=around(reference + moved @ directions, n_prompts),
        shift=moved,
    )


def check_readout(readout: Readout, hidden: int, *, n_prompts: int = 8, seed: int = 0) -> None:
    """Check that a readout keeps the contract of `tiltmeter.drift.Readout` on random activations.

    Checked are: a name, distinct names, a layer; values of shape (prompts, k), finite and of floating type;
    the same values when asked again; each row independent of the rows beside it and of their order; the
    activations untouched; and an activation that is NaN never turned into a finite value.

    Args:
        readout: to be checked.
        hidden: the width of the activations that it reads.
        n_prompts: how many activations to draw.
        seed: of the draw.

    Raises:
        AssertionError: naming the first clause that does not hold.
    """
    activations = np.random.default_rng(seed).normal(size=(n_prompts, hidden)).astype(np.float32)
    before = activations.copy()
    k = len(readout.names)
    _claim(bool(readout.name.strip()), "a readout has a name")
    _claim(k > 0 and len(set(readout.names)) == k, f"names are present and distinct, got {readout.names}")
    _claim(isinstance(readout.layer, int) and readout.layer >= 0, f"a layer is 0 or more: {readout.layer!r}")
    values = readout.read(activations)
    _claim(values.shape == (n_prompts, k), f"values are ({n_prompts}, {k}), got {values.shape}")
    _claim(np.issubdtype(values.dtype, np.floating), f"values are of floating type, got {values.dtype}")
    _claim(bool(np.isfinite(values).all()), "finite activations give finite values")
    _claim(np.array_equal(activations, before), "activations are not changed")
    _claim(np.array_equal(readout.read(activations), values), "asked again, the values are the same")
    alone = np.concatenate([readout.read(activations[row : row + 1]) for row in range(n_prompts)])
    _claim(_close(alone, values), "a row's values do not depend on the rows beside it")
    _claim(_close(readout.read(activations[::-1])[::-1], values), "a row's values do not depend on the order")
    _claim(_stays_nan(readout, activations, values), "an activation that is NaN never gives a finite value")


def _stays_nan(readout: Readout, activations: FloatArray, values: FloatArray) -> bool:
    broken = activations.copy()
    broken[0] = np.nan
    try:
        with np.errstate(invalid="ignore"):
            found = readout.read(broken)
    except NumericalError:
        return True
    return not np.isfinite(found[0]).any() and _close(found[1:], values[1:])


def _close(one: FloatArray, other: FloatArray) -> bool:
    scale = float(np.abs(other).max()) or 1.0
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-5, atol=1e-5 * scale))


def _claim(holds: bool, clause: str) -> None:
    if not holds:
        raise AssertionError(f"this readout breaks the contract: {clause}")
