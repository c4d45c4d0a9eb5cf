"""The other readouts: what the trait basis has to beat, read from the same activations.

Each turns activations after one block into numbers per prompt, as the trait basis does, so that drift,
calibration and alarm are the same for all of them and a comparison differs in the readout alone:

    activation norm          || h ||, one number: does magnitude do?
    random directions        k unit directions from a seed: do any k directions do?
    semantic basis           seven traits of style, made exactly like the alignment basis: do any traits do?
    difference components    the k main axes of tuned minus base activations: are directions from data better?
    scalar PC1               the trait drift's first component, one number: does the profile add anything?

(arXiv 2606.07631 compares the same families.) This module fits nothing to labels and knows no threshold.

    >>> readouts = [basis, ActivationNorm(basis.layer), random_directions(lm.hidden_size, basis.layer)]
    >>> readings = measure_all(lm, basis, readouts, step=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from tiltmeter.basis import Progress, TraitBasis, fit_basis
from tiltmeter.directions import Method, project
from tiltmeter.drift import PrincipalComponent
from tiltmeter.errors import InputError, NumericalError
from tiltmeter.fingerprint import sha

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = [
    "ActivationNorm",
    "LinearReadout",
    "difference_components",
    "random_directions",
    "scalar_component",
    "semantic_basis",
]

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class ActivationNorm:
    """Reads how long an activation is, and nothing else.

    Attributes:
        layer: the block after which is read, counted from 0.
    """

    layer: int
    name: Literal["activation_norm"] = "activation_norm"
    names: tuple[str, ...] = ("activation_norm",)

    def read(self, activations: FloatArray) -> FloatArray:
        """Activations (prompts, hidden) to norms (prompts, 1)."""
        return np.asarray(np.linalg.norm(activations.astype(np.float64), axis=1, keepdims=True), np.float32)


@dataclass(frozen=True, eq=False)
class LinearReadout:
    """Reads projections on given rows.

    Attributes:
        name: what the rows are, precisely enough that equal names mean equal rows.
        names: of the k rows.
        layer: the block after which is read, counted from 0.
        directions: (k, hidden); they need not be unit.

    Raises:
        InputError: there are not as many rows as names.
        NumericalError: a row is not finite.
    """

    name: str
    names: tuple[str, ...]
    layer: int
    directions: FloatArray

    def __post_init__(self) -> None:
        if self.directions.ndim != 2 or len(self.directions) != len(self.names):
            raise InputError(
                f"readout '{self.name}' has {len(self.names)} names and directions of shape "
                f"{self.directions.shape}; give one row per name"
            )
        if not np.isfinite(self.directions).all():
            raise NumericalError(f"readout '{self.name}' has directions that are not finite; make it again")

    def read(self, activations: FloatArray) -> FloatArray:
        """Activations (prompts, hidden) to projections (prompts, k).

        Raises:
            InputError: the activations have another width than the directions.
        """
        return project(activations, self.directions)


def random_directions(hidden_size: int, layer: int, *, k: int = 7, seed: int = 0) -> LinearReadout:
    """Unit directions drawn evenly from the sphere.

    Args:
        hidden_size: the width of the model's activations.
        layer: the block after which is read.
        k: how many.
        seed: which ones.

    Raises:
        InputError: `k` or `hidden_size` is below 1.
    """
    if k < 1 or hidden_size < 1:
        raise InputError(f"k is {k} and hidden_size {hidden_size}; both must be at least 1")
    drawn = np.random.default_rng(seed).normal(size=(k, hidden_size))
    return LinearReadout(
        name=f"random-{k}-of-{hidden_size}-seed-{seed}",
        names=tuple(f"random_{number}" for number in range(1, k + 1)),
        layer=layer,
        directions=(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32),
    )


def semantic_basis(lm: LM, basis: TraitBasis, *, progress: Progress | None = None) -> TraitBasis:
    """The seven traits of style, on the prompts, after the layer and by the method of a given basis.

    Args:
        lm: the model that `basis` was fitted on.
        basis: what it is to be compared with.
        progress: called as `progress(done, total, label)`.

    Raises:
        FingerprintMismatch: the basis was fitted on another model.
    """
    basis.check(lm)
    return fit_basis(
        lm,
        traits="semantic",
        prompts=basis.prompts,
        layer=basis.layer,
        method=cast(Method, basis.method),
        pooling=basis.pooling,
        seed=basis.seed or 0,
        progress=progress,
    )


def difference_components(
    base: Sequence[FloatArray], tuned: Sequence[FloatArray], layer: int, *, k: int = 7
) -> LinearReadout:
    """The k main axes of the change of activations over calibration runs.

    The singular vectors of all rows tuned - base, not centred: the shift that all prompts share is what is
    looked for, and centring would remove it. Each axis points to the side of the mean difference.

    Args:
        base: per run, activations (prompts, hidden) of the model before training.
        tuned: per run, activations of the same prompts after training.
        layer: the block that they were captured after.
        k: how many axes.

    Raises:
        InputError: the runs do not pair up, or hold fewer than k differences.
        NumericalError: the differences are not finite, or span fewer than k axes.
    """
    if not base or [part.shape for part in base] != [part.shape for part in tuned]:
        raise InputError(
            f"base activations {[part.shape for part in base]} and tuned ones "
            f"{[part.shape for part in tuned]} do not pair up; give both of each run, over the same prompts"
        )
    differences = np.concatenate(tuned).astype(np.float64) - np.concatenate(base).astype(np.float64)
    if not 1 <= k <= min(differences.shape):
        raise InputError(
            f"k is {k}; from {len(differences)} differences of width {differences.shape[1]} it can be 1 to "
            f"{min(differences.shape)}"
        )
    if not np.isfinite(differences).all():
        raise NumericalError("the activations hold numbers that are not finite; leave that run out")
    _, singular, rows = np.linalg.svd(differences, full_matrices=False)
    if singular[k - 1] <= 1e-9 * singular[0] or singular[0] == 0:
        raise NumericalError(
            f"the differences span fewer than {k} axes; ask for fewer, or give runs that changed the model"
        )
    axes = rows[:k]
    axes = (axes * np.where(axes @ differences.mean(axis=0) >= 0, 1.0, -1.0)[:, None]).astype(np.float32)
    return LinearReadout(
        name=f"difference-{k}-{sha(axes.tobytes().hex())[:12]}",
        names=tuple(f"difference_{number}" for number in range(1, k + 1)),
        layer=layer,
        directions=axes,
    )


def scalar_component(basis: TraitBasis, component: PrincipalComponent) -> LinearReadout:
    """The trait drift's projection on a principal component, as one number read from activations.

    Drift is linear in the activations, so its projection is too: the drift that this reads equals
    `drift @ component.direction` of the basis. The scalar |PC1| of the paper is its absolute value.

    Raises:
        InputError: the component is of other traits than the basis.
    """
    if component.names != basis.names:
        raise InputError(
            f"the component is over {', '.join(component.names)}, the basis reads {', '.join(basis.names)}; "
            "fit the component on profiles of this basis"
        )
    row = component.direction @ basis.directions.astype(np.float64)  # (hidden,)
    row = row[None].astype(np.float32)
    return LinearReadout(
        name=f"scalar-pc1-{sha(row.tobytes().hex())[:12]}", names=("pc1",), layer=basis.layer, directions=row
    )
