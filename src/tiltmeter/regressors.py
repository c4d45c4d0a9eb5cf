"""Regressors from a drift profile to an EM rate or a probability: fitted by scikit-learn, kept as arrays.

    forest     mean over trees of the leaf that x falls into            (arXiv 2606.07631, the headline detector)
    boosting   base + rate * sum over trees of the leaf
    ridge      w . x + b, w shrunk by an L2 penalty in units of each feature's spread
    logistic   1 / (1 + exp(-(w . x + b))), likewise

scikit-learn is needed to fit and not to predict: a fitted regressor is a table of trees or a row of weights, stored
in one safetensors file with a JSON header and never pickled, and predicts the same to 1e-9 after loading. It knows
nothing of models, readings or thresholds. A feature that is not a number gives a prediction that is not a number.

    >>> fitted = fit_forest(points, rates, seed=0)
    >>> fitted.save("forest.safetensors"); load_regressor("forest.safetensors").predict(points)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter import sound
from tiltmeter.artifacts import made, read_artifact, write_artifact
from tiltmeter.errors import InputError, NumericalError

__all__ = [
    "Linear",
    "Regressor",
    "Trees",
    "fit_boosting",
    "fit_forest",
    "fit_logistic",
    "fit_ridge",
    "load_regressor",
]

Array = NDArray[np.float64]
_KIND, _FORMAT = "regressor", 2
_TREE_ARRAYS = ("feature", "threshold", "left", "right", "value", "roots")
_LINEAR_ARRAYS = ("weights", "center", "scale")


@dataclass(frozen=True, eq=False)
class Trees:
    """A sum of regression trees, all nodes in one table.

    Attributes:
        feature: (nodes,) column that a node looks at; -1 in a leaf.
        threshold: (nodes,) go left where x <= threshold.
        left, right: (nodes,) number of the child.
        value: (nodes,) prediction of a leaf.
        roots: (trees,) number of each tree's root.
        base: what the sum is added to.
        rate: what the sum is multiplied with.
        n_features: width of a point.
        about: what it was fitted on, as JSON values.

    Raises:
        InputError: a number is not finite, shapes do not agree, or the trees do not hang together: a child that lies
            before its parent would be walked to for ever, and one outside the table is none.
    """

    feature: NDArray[np.int64]
    threshold: Array
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: Array
    roots: NDArray[np.int64]
    base: float
    rate: float
    n_features: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sound.array("feature", self.feature, (None,), kind="i", least=-1)
        n = len(self.feature)
        sound.array("threshold", self.threshold, (n,))
        sound.array("left", self.left, (n,), kind="i")
        sound.array("right", self.right, (n,), kind="i")
        sound.array("value", self.value, (n,))
        sound.array("roots", self.roots, (None,), kind="i", least=0)
        sound.whole("the number of trees", len(self.roots), least=1)
        sound.number("base", self.base)
        sound.number("rate", self.rate)
        sound.whole("n_features", self.n_features, least=1)
        ahead = (self.left > np.arange(n)) & (self.right > np.arange(n)) & (np.maximum(self.left, self.right) < n)
        if not (ahead | (self.feature < 0)).all() or (self.feature >= self.n_features).any() or (self.roots >= n).any():
            raise InputError("the trees do not hang together")

    def predict(self, points: ArrayLike) -> Array:
        """Points (n, features) to predictions (n,); NaN for a point that is not finite.

        Raises:
            InputError: the points have another width than those that were fitted.
        """
        wide, finite = _checked(points, self.n_features)
        # scikit-learn compares features in single precision, so a feature within a rounding of a threshold must be too.
        narrow = wide.astype(np.float32)
        total = np.zeros(len(wide))
        for root in self.roots:
            at = np.full(len(wide), root)
            inner = self.feature[at] >= 0
            while inner.any():
                rows = np.flatnonzero(inner)
                nodes = at[rows]
                goes_left = narrow[rows, self.feature[nodes]] <= self.threshold[nodes]
                at[rows] = np.where(goes_left, self.left[nodes], self.right[nodes])
                inner = self.feature[at] >= 0
            total += self.value[at]
        return np.where(finite, self.base + self.rate * total, np.nan)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file.

        Raises:
            StorageError: it cannot be written.
        """
        plain = {"base": self.base, "rate": self.rate, "n_features": self.n_features, "about": dict(self.about)}
        return _save(path, "trees", plain, {key: getattr(self, key) for key in _TREE_ARRAYS})


@dataclass(frozen=True, eq=False)
class Linear:
    """Weights on standardised features, with or without a logistic link.

    Attributes:
        weights: (features,) on (x - center) / scale.
        center, scale: (features,).
        intercept: added.
        link: "identity", or "logistic" for a probability.
        about: what it was fitted on, as JSON values.

    Raises:
        InputError: a number is not finite, a scale is not above 0, shapes do not agree, or the link is unknown.
    """

    weights: Array
    center: Array
    scale: Array
    intercept: float
    link: Literal["identity", "logistic"] = "identity"
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sound.array("weights", self.weights, (None,))
        sound.array("center", self.center, (len(self.weights),))
        sound.array("scale", self.scale, (len(self.weights),), above=0)
        sound.whole("the number of features", len(self.weights), least=1)
        sound.number("intercept", self.intercept)
        sound.choice("link", self.link, ("identity", "logistic"))

    @property
    def n_features(self) -> int:
        """Width of a point."""
        return len(self.weights)

    def margin(self, points: ArrayLike) -> Array:
        """w . x + b, (n,), before the link; NaN for a point that is not finite.

        Raises:
            InputError: the points have another width than those that were fitted.
        """
        wide, finite = _checked(points, self.n_features)
        return np.where(finite, ((wide - self.center) / self.scale) @ self.weights + self.intercept, np.nan)

    def predict(self, points: ArrayLike) -> Array:
        """Points (n, features) to predictions (n,); see `margin`."""
        from scipy.special import expit

        margin = self.margin(points)
        return np.asarray(expit(margin)) if self.link == "logistic" else margin

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file.

        Raises:
            StorageError: it cannot be written.
        """
        plain = {"intercept": self.intercept, "link": self.link, "about": dict(self.about)}
        return _save(path, "linear", plain, {key: getattr(self, key) for key in _LINEAR_ARRAYS})


Regressor = Trees | Linear


def fit_forest(
    points: ArrayLike, targets: ArrayLike, *, trees: int = 300, seed: int = 0, about: Mapping[str, Any] | None = None
) -> Trees:
    """A random forest of unpruned trees, each split on a third of the features.

    Args:
        points: (n, features).
        targets: (n,).
        trees: how many.
        seed: of bootstrap and features.
        about: kept with it.

    Raises:
        InputError: the shapes do not fit together, or there are fewer than two points.
        NumericalError: a number is not finite.
    """
    from sklearn.ensemble import RandomForestRegressor

    x, y = _training(points, targets)
    model = RandomForestRegressor(n_estimators=trees, max_features=max(1, x.shape[1] // 3), random_state=seed)
    model.fit(x, y)
    return _trees([e.tree_ for e in model.estimators_], 0.0, 1.0 / trees, x.shape[1], about)


def fit_boosting(
    points: ArrayLike,
    targets: ArrayLike,
    *,
    trees: int = 200,
    rate: float = 0.05,
    depth: int = 2,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Trees:
    """Gradient boosting with squared error.

    Args:
        points: (n, features).
        targets: (n,).
        trees: how many.
        rate: learning rate.
        depth: of each tree.
        seed: of the order in which equal splits are tried.
        about: kept with it.

    Raises:
        InputError, NumericalError: see `fit_forest`.
    """
    from sklearn.ensemble import GradientBoostingRegressor

    x, y = _training(points, targets)
    model = GradientBoostingRegressor(n_estimators=trees, learning_rate=rate, max_depth=depth, random_state=seed)
    model.fit(x, y)
    return _trees([e.tree_ for e in model.estimators_[:, 0]], float(y.mean()), rate, x.shape[1], about)


def fit_ridge(
    points: ArrayLike, targets: ArrayLike, *, penalty: float = 1.0, about: Mapping[str, Any] | None = None
) -> Linear:
    """Ridge regression on standardised features.

    Args:
        points: (n, features).
        targets: (n,).
        penalty: on the squared weights; the loss is a sum over points.
        about: kept with it.

    Raises:
        InputError, NumericalError: see `fit_forest`.
    """
    from sklearn.linear_model import Ridge

    x, y = _training(points, targets)
    center, scale = _standard(x)
    model = Ridge(alpha=penalty).fit((x - center) / scale, y)
    return Linear(np.asarray(model.coef_, np.float64), center, scale, float(model.intercept_), "identity", about or {})


def fit_logistic(
    points: ArrayLike,
    dangerous: ArrayLike,
    *,
    penalty: float = 1.0,
    weights: ArrayLike | None = None,
    about: Mapping[str, Any] | None = None,
) -> Linear:
    """L2-regularised logistic regression on standardised features.

    Args:
        points: (n, features).
        dangerous: (n,) true or false.
        penalty: on the squared weights; the loss is a sum over points.
        weights: (n,) of the points; all 1 by default.
        about: kept with it.

    Raises:
        InputError: as `fit_forest`, or all points are of one kind.
        NumericalError: as `fit_forest`.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = _training(points, np.asarray(dangerous, dtype=np.float64))
    if len(set(y.tolist())) != 2:
        raise InputError(
            f"all {len(y)} points are of one kind; a logistic regression needs dangerous and harmless ones"
        )
    center, scale = _standard(x)
    model = LogisticRegression(C=1.0 / penalty, max_iter=5000, tol=1e-8)
    model.fit((x - center) / scale, y, sample_weight=None if weights is None else np.asarray(weights))
    row = np.asarray(model.coef_[0], np.float64)
    return Linear(row, center, scale, float(model.intercept_[0]), "logistic", about or {})


def load_regressor(path: str | Path) -> Regressor:
    """Read what `save` wrote; scikit-learn and torch are not needed.

    Raises:
        ArtifactError: the file is missing, damaged, changed, foreign, of another version, or holds what no regressor
            can have.
    """
    remedy = "fit the regressor again"
    header, arrays = read_artifact(path, _KIND, _FORMAT, remedy=remedy)
    makers = {"trees": Trees, "linear": Linear}

    def make() -> Regressor:
        found: Regressor = makers[header["of"]](**header["plain"], **arrays)
        return found

    return made(path, _KIND, remedy, make)


def _trees(fitted: list[Any], base: float, rate: float, n_features: int, about: Mapping[str, Any] | None) -> Trees:
    sizes = [tree.node_count for tree in fitted]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)

    def joined(key: str, shift: bool = False) -> NDArray[Any]:
        parts = [getattr(tree, key) for tree in fitted]
        return np.concatenate([part + start if shift else part for part, start in zip(parts, starts, strict=True)])

    leaf = joined("children_left") < 0
    return Trees(
        feature=np.where(leaf, -1, joined("feature")).astype(np.int64),
        threshold=joined("threshold").astype(np.float64),
        left=np.where(leaf, 0, joined("children_left", shift=True)).astype(np.int64),
        right=np.where(leaf, 0, joined("children_right", shift=True)).astype(np.int64),
        value=np.concatenate([tree.value[:, 0, 0] for tree in fitted]).astype(np.float64),
        roots=starts,
        base=base,
        rate=rate,
        n_features=n_features,
        about=about or {},
    )


def _training(points: ArrayLike, targets: ArrayLike) -> tuple[Array, Array]:
    x, y = np.asarray(points, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if x.ndim != 2 or y.shape != (len(x),) or len(x) < 2 or x.shape[1] < 1:
        raise InputError(
            f"points of shape {x.shape} and targets of shape {y.shape} do not fit; give (n, features) and (n,) with "
            "at least two points"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NumericalError("a point or a target is not finite; leave that reading out, and say that it was left out")
    return x, y


def _standard(x: Array) -> tuple[Array, Array]:
    spread = x.std(axis=0)
    return x.mean(axis=0), np.where(spread > 0, spread, 1.0)


def _checked(points: ArrayLike, width: int) -> tuple[Array, NDArray[np.bool_]]:
    wide = np.asarray(points, dtype=np.float64)
    if wide.ndim != 2 or wide.shape[1] != width:
        raise InputError(f"points of shape {wide.shape} cannot be predicted from {width} features; give (n, {width})")
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(wide).all(axis=1))
    return np.where(finite[:, None], wide, 0.0), finite


def _save(path: str | Path, of: str, plain: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Path:
    return write_artifact(path, _KIND, _FORMAT, {"of": of, "plain": plain}, arrays)
