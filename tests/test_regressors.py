"""Regressors: what scikit-learn fitted is what numpy predicts, before and after storage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor

from tiltmeter.artifacts import write_artifact
from tiltmeter.errors import ArtifactError, InputError, NumericalError, StorageError
from tiltmeter.regressors import Linear, Trees, fit_boosting, fit_forest, fit_logistic, fit_ridge, load_regressor


def planted(n: int = 150, k: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rates that depend on two of the features."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, k))
    return x, np.clip(0.2 * x[:, 0] - 0.1 * np.abs(x[:, 3]), 0, 1)


def test_a_forest_predicts_what_scikit_learn_predicts_before_and_after_storage(tmp_path: Path) -> None:
    x, y = planted()
    new = planted(seed=1)[0]
    oracle = RandomForestRegressor(n_estimators=40, max_features=2, random_state=3).fit(x, y).predict(new)
    fitted = fit_forest(x, y, trees=40, seed=3, about={"sets": ["a", "b"]})
    assert np.abs(fitted.predict(new) - oracle).max() < 1e-9
    again = load_regressor(fitted.save(tmp_path / "deep" / "forest.safetensors"))
    assert np.array_equal(again.predict(new), fitted.predict(new))
    assert isinstance(again, Trees)
    assert again.about == {"sets": ["a", "b"]}


def test_boosting_predicts_what_scikit_learn_predicts(tmp_path: Path) -> None:
    x, y = planted()
    new = planted(seed=1)[0]
    oracle = GradientBoostingRegressor(n_estimators=60, learning_rate=0.1, max_depth=2, random_state=0).fit(x, y)
    fitted = fit_boosting(x, y, trees=60, rate=0.1)
    again = load_regressor(fitted.save(tmp_path / "boosting.safetensors"))
    assert np.abs(again.predict(new) - oracle.predict(new)).max() < 1e-9


def test_a_feature_within_single_precision_of_a_threshold_falls_to_the_same_side() -> None:
    x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0.0, 0.0, 1.0, 1.0])
    oracle = GradientBoostingRegressor(n_estimators=1, learning_rate=1.0, max_depth=1).fit(x, y)
    near = np.array([[1.5], [1.5 + 1e-9], [1.5 - 1e-9], [1.5 + 1e-6]])  # the threshold is 1.5
    assert np.allclose(fit_boosting(x, y, trees=1, rate=1.0, depth=1).predict(near), oracle.predict(near))
    assert oracle.predict(near).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_ridge_solves_the_normal_equations_in_units_of_each_features_spread(tmp_path: Path) -> None:
    x, y = planted()
    x = x * np.array([1, 10, 0.1, 1, 1, 1, 1])
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    weights = np.linalg.solve(z.T @ z + 2.0 * np.eye(7), z.T @ (y - y.mean()))
    fitted = fit_ridge(x, y, penalty=2.0)
    assert np.allclose(fitted.weights, weights)
    again = load_regressor(fitted.save(tmp_path / "ridge.safetensors"))
    assert np.abs(again.predict(x) - (z @ weights + y.mean())).max() < 1e-9


def test_logistic_regression_stands_where_its_gradient_is_zero() -> None:
    x, y = planted()
    dangerous = y > 0.05
    fitted = fit_logistic(x, dangerous, penalty=0.5)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    probability = 1 / (1 + np.exp(-(z @ fitted.weights + fitted.intercept)))
    assert np.allclose(fitted.predict(x), probability)
    assert np.abs(z.T @ (probability - dangerous) + 0.5 * fitted.weights).max() < 1e-3
    assert abs((probability - dangerous).sum()) < 1e-3


def test_a_feature_that_never_varies_does_no_harm() -> None:
    x, y = planted()
    x[:, 5] = 4.0
    assert np.isfinite(fit_ridge(x, y).predict(x)).all()


@pytest.mark.parametrize("fit", [fit_forest, fit_boosting, fit_ridge])
def test_what_is_not_a_number_has_no_prediction_and_is_not_learnt_from(fit) -> None:  # type: ignore[no-untyped-def]
    x, y = planted(40)
    fitted = fit(x, y)
    broken = x.copy()
    broken[3, 2] = np.nan
    assert np.flatnonzero(~np.isfinite(fitted.predict(broken))).tolist() == [3]
    with pytest.raises(NumericalError, match="not finite"):
        fit(broken, y)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, y = planted(30)
    with pytest.raises(InputError, match="do not fit"):
        fit_ridge(x, y[:-1])
    with pytest.raises(InputError, match="cannot be predicted from 7"):
        fit_ridge(x, y).predict(x[:, :6])
    with pytest.raises(InputError, match="of one kind"):
        fit_logistic(x, np.ones(30))


def test_foreign_damaged_and_hostile_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    with pytest.raises(ArtifactError, match="there is no regressor"):
        load_regressor(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="no safetensors"):
        load_regressor(path)
    write_artifact(path, "regressor", 2, {"of": "spell", "plain": {}}, {"a": np.zeros(1)})
    with pytest.raises(ArtifactError, match="no sound regressor: it lacks 'spell'"):
        load_regressor(path)
    fine = Trees(**TREE)
    for change in (
        {"left": np.array([0, 0])}, {"right": np.array([3, 0])}, {"right": np.array([0, 0])}, {"roots": np.array([3])},
        {"feature": np.array([1, -1, -1])}, {"roots": np.zeros(0, int)}, {"value": np.array([0, np.nan, 0])},
        {"threshold": np.array([np.inf, 0, 0])}, {"base": np.nan}, {"rate": np.inf}, {"n_features": 0}, {"base": "0"},
        {"value": np.zeros(2)}, {"roots": np.array([-1])},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Trees(**{**TREE, **change})
        arrays = {k: change.get(k, v) for k, v in TREE.items() if isinstance(v, np.ndarray)}
        plain = {k: change.get(k, v) for k, v in TREE.items() if not isinstance(v, np.ndarray)} | {"about": {}}
        if all(isinstance(v, str) or np.isfinite(v) for k, v in plain.items() if k != "about"):
            write_artifact(path, "regressor", 2, {"of": "trees", "plain": plain}, arrays)
            with pytest.raises(ArtifactError, match="no sound regressor"):
                load_regressor(path)
    with pytest.raises(StorageError):
        fine.save(tmp_path / "r.safetensors" / "below-a-file.safetensors")


TREE = {
    "feature": np.array([0, -1, -1]), "threshold": np.zeros(3), "left": np.array([1, 0, 0]),
    "right": np.array([2, 0, 0]), "value": np.zeros(3), "roots": np.array([0]),
    "base": 0.0, "rate": 1.0, "n_features": 1,
}  # fmt: skip


def test_linear_regressors_with_unsound_numbers_cannot_be_made() -> None:
    good = {"weights": np.zeros(2), "center": np.zeros(2), "scale": np.ones(2), "intercept": 0.0}
    Linear(**good)
    for change in (
        {"weights": np.array([np.nan, 0])}, {"center": np.zeros(3)}, {"scale": np.zeros(2)}, {"scale": -np.ones(2)},
        {"intercept": np.inf}, {"intercept": None}, {"link": "probit"}, {"weights": None},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Linear(**{**good, **change})


def test_a_stored_regressor_predicts_without_torch_and_scikit_learn(tmp_path: Path) -> None:
    x, y = planted(40)
    fitted = fit_forest(x, y, trees=5)
    path = fitted.save(tmp_path / "forest.safetensors")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['sklearn'] = None\n"
        "import numpy as np; from tiltmeter.regressors import load_regressor\n"
        f"print(load_regressor({str(path)!r}).predict(np.zeros((1, 7)))[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(fitted.predict(np.zeros((1, 7)))[0])


def test_a_line_has_a_width() -> None:
    assert Linear(np.zeros(3), np.zeros(3), np.ones(3), 0.0).n_features == 3
