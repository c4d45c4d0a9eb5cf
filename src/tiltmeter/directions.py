"""From the activations of two poles to one unit direction; linear probes between poles; projection.

The direction of a trait is the unit mean difference between its poles (arXiv 2606.07631, Eq. 1):

    v = (mean h+ - mean h-) / || mean h+ - mean h- ||

Plain arrays in and out: this module knows no model, layer or prompt.

    >>> direction(positive, negative) @ direction(positive, negative, "logistic")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiltmeter.errors import InputError, NumericalError

__all__ = ["METHODS", "Method", "direction", "probe_accuracies", "probe_accuracy", "project"]

FloatArray = NDArray[np.floating[Any]]
Method = Literal["mean_difference", "pca", "logistic"]
METHODS = ("mean_difference", "pca", "logistic")
_FOLDS = 5


def direction(positive: FloatArray, negative: FloatArray, method: Method = "mean_difference") -> FloatArray:
    """The unit direction from one pole's activations to the other's.

    Args:
        positive: (n, hidden) activations of the positive pole.
        negative: (m, hidden) activations of the negative pole; for "pca" the i-th rows form a pair.
        method: "mean_difference" (arXiv 2606.07631, Eq. 1); "pca", the first principal axis of the paired
            differences about zero; "logistic", the normal of an L2-regularised logistic regression. The last
            two are turned to the side of the mean difference.

    Returns:
        (hidden,) float64, of unit length, pointing to the positive pole.

    Raises:
        InputError: "pca" with poles of different size.
        NumericalError: the poles do not differ, or hold numbers that are not finite.
    """
    up, down = positive.astype(np.float64), negative.astype(np.float64)
    lead = up.mean(axis=0) - down.mean(axis=0)
    apart = float(np.linalg.norm(lead))
    if not np.isfinite(apart) or apart <= 1e-9 * max(float(np.abs(up).max()), float(np.abs(down).max())):
        raise NumericalError(
            f"the two poles do not differ (difference of length {apart:.3g}); give the trait system prompts "
            "that call forth different answers, or another layer"
        )
    if method == "mean_difference":
        return np.asarray(lead / apart)
    if method == "pca":
        if up.shape != down.shape:
            raise InputError(
                f"paired differences need poles of equal size, got {len(up)} and {len(down)} activations; "
                "give both poles as many system prompts, or use method='mean_difference'"
            )
        found = np.linalg.svd(up - down, full_matrices=False)[2][0]
    else:
        reduced, rows = _reduce(np.concatenate([up, down]))
        found = _logistic().fit(reduced, _labels(up, down)).coef_[0] @ rows
    return np.asarray(found / np.linalg.norm(found) * (1.0 if found @ lead >= 0 else -1.0))


def probe_accuracy(
    positive: FloatArray, negative: FloatArray, *, groups: Sequence[int] | None = None, seed: int = 0
) -> float:
    """Cross-validated accuracy of a linear probe between two poles: five-fold logistic regression.

    With shuffled folds the probe is tested on activations whose system prompt and question it has seen in
    other company, and it saturates. With groups, whole groups are left out, so that it has to know the trait
    and not the sentence that it was fitted on.

    Args:
        positive: (n, hidden) activations.
        negative: (m, hidden) activations.
        groups: (n + m,) the group of each row, positive rows first, numbered from 0; None shuffles.
        seed: of the shuffling.

    Returns:
        The share of left-out rows on the right side, 0 to 1.

    Raises:
        InputError: there are fewer than two groups, or rows in a pole.
    """
    return probe_accuracies(positive, negative, groupings=[groups], seed=seed)[0]


def probe_accuracies(
    positive: FloatArray, negative: FloatArray, *, groupings: Sequence[Sequence[int] | None], seed: int = 0
) -> tuple[float, ...]:
    """`probe_accuracy` for several ways of leaving rows out, in their order; what they share is computed once."""
    labels = _labels(positive, negative)
    reduced, _ = _reduce(np.concatenate([positive, negative]).astype(np.float64))
    found = []
    for groups in groupings:
        numbers, available = _fold_numbers(len(positive), len(negative), groups, seed)
        n_folds = min(_FOLDS, available)
        if n_folds < 2:
            raise InputError(
                f"cross-validation needs at least two groups, got {available}; give each pole more prompts"
            )
        right = 0
        for fold in range(n_folds):
            out = numbers % n_folds == fold
            model = _logistic().fit(reduced[~out], labels[~out])
            right += int((model.predict(reduced[out]) == labels[out]).sum())
        found.append(right / len(labels))
    return tuple(found)


def _fold_numbers(
    n_positive: int, n_negative: int, groups: Sequence[int] | None, seed: int
) -> tuple[NDArray[np.int64], int]:
    """A number per row that its fold follows from, and how many different folds that allows."""
    if groups is not None:
        return np.asarray(groups), int(max(groups)) + 1
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(n) for n in (n_positive, n_negative)]), min(n_positive, n_negative)


def _labels(positive: FloatArray, negative: FloatArray) -> NDArray[np.bool_]:
    return np.repeat([True, False], [len(positive), len(negative)])


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1.0, max_iter=2000)


def _reduce(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotate points into the space that they span, centred and scaled to unit mean variance.

    An L2-regularised logistic regression with intercept gives the same predictions there, with n columns at
    most instead of the model's width.

    Returns:
        The points (n, r), and the rows (r, hidden) that lead back.
    """
    centred = points - points.mean(axis=0)
    if len(points) < points.shape[1]:
        # From the small Gram matrix: several times faster than a decomposition of the points themselves, and what
        # squaring loses are axes of less than a millionth of the longest one's spread.
        values, left = np.linalg.eigh(centred @ centred.T)
        kept = values > 1e-12 * max(float(values[-1]), np.finfo(np.float64).tiny)
        singular = np.sqrt(values[kept])
        reduced = left[:, kept] * singular
        rows = (left[:, kept] / singular).T @ centred
    else:
        left, singular, rows = np.linalg.svd(centred, full_matrices=False)
        reduced = left * singular
    scale = float(np.sqrt((reduced**2).sum() / points.size)) or 1.0
    return reduced / scale, rows


def project(activations: FloatArray, directions: FloatArray) -> NDArray[np.float32]:
    """Activations (prompts, hidden) on directions (k, hidden): (prompts, k), in float32.

    Raises:
        InputError: the widths differ.
    """
    hidden = directions.shape[1]
    if activations.ndim != 2 or activations.shape[1] != hidden:
        raise InputError(
            f"activations of shape {activations.shape} do not fit directions of width {hidden}; give "
            f"(prompts, {hidden}), captured from the model and after the block that the directions belong to"
        )
    return np.asarray(activations.astype(np.float32) @ directions.astype(np.float32).T)
