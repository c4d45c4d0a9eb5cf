"""Drift is the difference of two comparable readings in units of the reference's norm, or says why not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from bases import PROMPTS, TRAITS, hidden_states
from tiltmeter import steer
from tiltmeter.baselines import ActivationNorm
from tiltmeter.basis import TraitBasis, fit_basis
from tiltmeter.drift import (
    DriftProfile,
    Reading,
    drift,
    measure,
    measure_all,
    plane,
    principal_component,
    trajectory,
)
from tiltmeter.errors import ArtifactError, FingerprintMismatch, InputError, NumericalError
from tiltmeter.testing import planted_activations
from tiny import make_tokenizer, tiny_lm


def reading(values: Any, norms: Any = None, **changes: Any) -> Reading:
    values = np.array(values, dtype=np.float32)
    given: dict[str, Any] = {
        "readout": "two",
        "names": tuple(f"t{i}" for i in range(values.shape[1])),
        "values": values,
        "norms": np.ones(len(values), np.float32) if norms is None else np.array(norms, np.float32),
        "layer": 2,
        "step": None,
        "model": "m",
        "adapter_state": "none",
        "fingerprint": "f",
        "weights": "w",
        "basis": "b",
        "plan": "p",
        "dtype": "float32",
        "time": "2026-01-01T00:00:00+00:00",
    }
    return Reading(**(given | changes))


def profile(numbers: Any, **changes: Any) -> DriftProfile:
    """A profile with these numbers."""
    made = drift(reading([numbers, numbers]), reading(np.zeros((2, len(numbers)))))
    return replace(made, **changes)


@pytest.fixture(scope="module")
def basis() -> TraitBasis:
    return fit_basis(tiny_lm(), traits=TRAITS, prompts=PROMPTS, layer=2)


# ---------------------------------------------------------------- arithmetic


def test_drift_is_the_mean_difference_over_the_references_mean_norm() -> None:
    now, then = reading([[3.0, 1.0], [5.0, 1.0]]), reading([[1.0, 2.0], [2.0, 6.0]], norms=[3.0, 5.0])

    found = drift(now, then)

    # ((3-1) + (5-2)) / 2 / 4 and ((1-2) + (1-6)) / 2 / 4
    assert found.drift == pytest.approx([0.625, -0.75])
    assert found.per_prompt == pytest.approx(np.array([[0.5, -0.25], [0.75, -1.25]]))
    assert found.n_prompts == 2


def test_the_standard_error_is_that_of_paired_differences() -> None:
    now, then = reading([[3.0], [5.0], [10.0]]), reading([[1.0], [2.0], [6.0]], norms=[2.0, 2.0, 2.0])

    # differences 2, 3, 4: standard deviation 1, over sqrt(3), over the norm 2
    assert drift(now, then).se == pytest.approx([1 / math.sqrt(3) / 2])


def test_what_the_prompts_have_in_common_cancels_from_the_standard_error() -> None:
    spread = np.array([[-100.0], [0.0], [250.0]])

    assert drift(reading(spread + 1), reading(spread)).se == pytest.approx([0.0])


def test_one_prompt_has_no_standard_error() -> None:
    found = drift(reading([[3.0]]), reading([[1.0]]))

    assert found.drift == pytest.approx([2.0])
    assert np.isnan(found.se).all()
    assert np.isnan(reading([[3.0]]).se).all()


def test_the_norm_ratio_is_now_over_then() -> None:
    assert drift(reading([[1.0]], norms=[6.0]), reading([[1.0]], norms=[4.0])).norm_ratio == pytest.approx(1.5)


def test_a_reading_knows_its_mean_and_standard_error() -> None:
    found = reading([[1.0, 10.0], [3.0, 10.0]])

    assert found.n == 2
    assert found.mean == pytest.approx([2.0, 10.0])
    assert found.se == pytest.approx([1.0, 0.0])


def test_a_planted_shift_is_measured_within_three_standard_errors() -> None:
    planted = planted_activations(("a", "b"), shift=(2.0, -3.0), noise=2.0, seed=4)
    then, now = (
        reading(part @ planted.directions.T, norms=np.linalg.norm(part, axis=1))
        for part in (planted.reference, planted.tuned)
    )
    expected = planted.shift / np.linalg.norm(planted.reference, axis=1).mean()

    found = drift(now, then)

    assert np.all(np.abs(found.drift - expected) < 3 * found.se)
    assert np.all(np.abs(found.drift) > 5 * found.se)  # so that a lost sign could not pass


@pytest.mark.parametrize(
    ("values", "norms"), [([[1.0, 2.0, 3.0]], [1.0]), ([[1.0, 2.0]], [1.0, 1.0]), (np.ones((0, 2)), [])]
)
def test_a_reading_whose_parts_do_not_fit_is_refused(values: Any, norms: Any) -> None:
    with pytest.raises(InputError, match="measure again"):
        reading(values, norms, names=("t0", "t1"))


# ---------------------------------------------------------------- what cannot be compared or judged


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("readout", "other", "readout differ"),
        ("names", ("t1", "t0"), "names differ"),
        ("layer", 3, "layer differ"),
        ("basis", "c", "basis differ"),
        ("plan", "q", "batch plan differ"),
        ("dtype", "bfloat16", "dtype differ"),
    ],
)
def test_readings_that_were_not_made_alike_are_refused(key: str, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        drift(reading([[1.0, 2.0]]), reading([[1.0, 2.0]], **{key: value}))


def test_readings_over_different_numbers_of_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="number of prompts differ"):
        drift(reading([[1.0]]), reading([[1.0], [1.0]]))


def test_readings_of_different_models_are_refused() -> None:
    with pytest.raises(FingerprintMismatch, match="different models"):
        drift(reading([[1.0]]), reading([[1.0]], fingerprint="g"))


def test_full_fine_tuning_may_change_the_weights() -> None:
    assert drift(reading([[2.0]], weights="v", step=9), reading([[1.0]], step=0)).problem is None


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_make_a_problem_whichever_reading_holds_them(number: float) -> None:
    good, bad = reading([[1.0], [2.0]]), reading([[1.0], [number]])
    bad_norm = reading([[1.0], [2.0]], norms=[1.0, number])

    for pair in ((bad, good), (good, bad), (bad, bad), (bad_norm, good), (good, bad_norm)):
        problem = drift(*pair).problem
        assert problem is not None
        assert "not finite for 1 of 2 prompts" in problem


@pytest.mark.parametrize(("step", "judged"), [(None, False), (40, False), (0, True)])
def test_an_adapter_that_does_nothing_is_a_problem_except_before_training(step: int | None, judged: bool) -> None:
    found = drift(reading([[1.0]], adapter_state="zero", step=step), reading([[1.0]], step=0))

    assert (found.problem is None) is judged
    if not judged:
        assert "does nothing" in str(found.problem)


@pytest.mark.parametrize(
    ("state", "step", "base_step", "judged"),
    [
        ("active", None, None, False),  # an adapter above the layer
        ("active", 40, 0, False),
        ("none", 40, 0, False),  # full fine-tuning of later layers only
        ("none", None, None, True),  # the same model twice: truly no drift
        ("active", 0, 0, True),  # a warm start, compared with itself
        ("none", 0, 0, True),
    ],
)
def test_training_without_any_trace_at_the_layer_is_a_problem(
    state: str, step: int | None, base_step: int | None, judged: bool
) -> None:
    found = drift(reading([[1.0]], adapter_state=state, step=step), reading([[1.0]], step=base_step))

    assert (found.problem is None) is judged
    assert found.drift == pytest.approx([0.0])


def test_a_reference_whose_activations_are_all_zero_is_a_problem_and_not_a_warning() -> None:
    found = drift(reading([[1.0], [0.0]]), reading([[0.0], [0.0]], norms=[0.0, 0.0]))

    assert "no unit" in str(found.problem)


# ---------------------------------------------------------------- trajectories


def test_a_trajectory_is_measured_from_step_zero_wherever_it_stands() -> None:
    run = [reading([[4.0]], step=10), reading([[1.0]], step=0, norms=[2.0]), reading([[5.0]], step=20)]

    found = trajectory(run)

    assert [p.step for p in found] == [10, 0, 20]
    assert [float(p.drift[0]) for p in found] == pytest.approx([1.5, 0.0, 2.0])
    assert {p.reference for p in found} == {"step0"}


def test_a_trajectory_may_be_measured_from_a_named_reading() -> None:
    benign = reading([[2.0]], model="benign", step=60)

    (found,) = trajectory([reading([[5.0]], step=10)], reference=benign)

    assert found.drift == pytest.approx([3.0])
    assert found.reference == "benign at step 60"


def test_a_trajectory_without_a_start_is_refused() -> None:
    with pytest.raises(InputError, match="steps: 10, None"):
        trajectory([reading([[1.0]], step=10), reading([[1.0]])])
    with pytest.raises(InputError, match="none at all"):
        trajectory([])


# ---------------------------------------------------------------- records


def test_a_reading_survives_strict_json() -> None:
    before = reading([[0.1, math.nan], [-3.0, 1e-30]], norms=[math.inf, 2.0], step=5)

    after = Reading.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False)))

    assert after.values.dtype == np.float32
    np.testing.assert_array_equal(after.values, before.values)
    np.testing.assert_array_equal(after.norms, [math.nan, 2.0])
    plain = {k: v for k, v in vars(before).items() if k not in ("values", "norms")}
    assert {k: v for k, v in vars(after).items() if k not in ("values", "norms")} == plain


def test_the_mean_activation_survives_json_and_may_be_absent() -> None:
    kept = reading([[1.0], [2.0]], activation=np.array([0.5, -2.0, math.nan], np.float32))
    after = Reading.from_dict(json.loads(json.dumps(kept.to_dict(), allow_nan=False)))
    assert after.activation is not None
    np.testing.assert_array_equal(after.activation, [0.5, -2.0, math.nan])
    assert Reading.from_dict(reading([[1.0], [2.0]]).to_dict()).activation is None


def test_the_shift_is_the_mean_activations_difference_in_the_unit_of_drift() -> None:
    then = reading([[0.0], [0.0]], norms=[3.0, 5.0], activation=np.array([1.0, 1.0, 1.0], np.float32))
    now = reading([[4.0], [4.0]], activation=np.array([5.0, 1.0, -1.0], np.float32))
    assert drift(now, then).shift == pytest.approx([1.0, 0.0, -0.5])  # over the mean norm, 4
    assert drift(now, replace(then, activation=None)).shift is None
    assert drift(replace(now, activation=None), then).shift is None


@pytest.mark.parametrize("change", [{"values": [[1.0], [1.0, 2.0]]}, {"values": [[1.0]]}, {"norms": "x"}])
def test_a_damaged_record_is_refused(change: dict[str, Any]) -> None:
    good = reading([[1.0], [2.0]]).to_dict()
    with pytest.raises(ArtifactError, match="not a stored reading"):
        Reading.from_dict(good | change)


def test_a_record_that_lacks_a_key_is_refused() -> None:
    record = reading([[1.0]]).to_dict()
    del record["basis"]
    with pytest.raises(ArtifactError, match="basis"):
        Reading.from_dict(record)


def test_a_profile_is_written_as_strict_json_with_none_for_what_is_missing() -> None:
    record = json.loads(json.dumps(drift(reading([[3.0]]), reading([[1.0]])).to_dict(), allow_nan=False))

    assert record["drift"] == [2.0]
    assert record["se"] == [None]
    assert record["names"] == ["t0"]
    assert "per_prompt" not in record


# ---------------------------------------------------------------- geometry


def test_the_first_component_is_that_of_a_centred_pca() -> None:
    points = np.random.default_rng(0).normal(size=(12, 4)) * (3, 1, 0.5, 0.2) + (1, 2, 3, 4)
    oracle = PCA().fit(points)

    found = principal_component([profile(point) for point in points])

    assert abs(found.direction @ oracle.components_[0]) == pytest.approx(1.0, abs=1e-6)
    assert found.variance_share == pytest.approx(oracle.explained_variance_ratio_[0], abs=1e-6)
    assert found.n == 12


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_component_points_to_the_side_of_the_mean_profile(sign: float) -> None:
    points = sign * np.array([[1.0, 0.1], [2.0, -0.1], [3.0, 0.0]])

    found = principal_component([profile(point) for point in points])

    assert found.direction @ [sign, 0.0] > 0.99


def test_profiles_lie_in_the_plane_of_direction_and_magnitude() -> None:
    component = principal_component([profile([1.0, 0.0]), profile([3.0, 0.0])])

    along, across, still = plane([profile([0.0, 2.0]), profile([-3.0, 4.0]), profile([0.0, 0.0])], component)

    assert along == pytest.approx((0.0, 2.0, 0.0))
    assert across == pytest.approx((-0.6, 5.0, -3.0))
    assert math.isnan(still.cosine)
    assert still[1:] == (0.0, 0.0)
    assert plane([], component) == ()


def test_a_component_needs_profiles_that_differ() -> None:
    with pytest.raises(NumericalError, match="all 3 profiles are the same"):
        principal_component([profile([0.1, 0.2])] * 3)
    with pytest.raises(InputError, match="at least two"):
        principal_component([profile([0.1, 0.2])])


def test_profiles_with_a_problem_or_of_another_readout_are_refused() -> None:
    good = profile([1.0, 0.0])
    with pytest.raises(InputError, match="it is broken; leave it out"):
        principal_component([good, profile([2.0, 0.0], problem="it is broken")])
    with pytest.raises(InputError, match="different readouts"):
        principal_component([good, profile([2.0, 0.0], readout="norm")])
    component = principal_component([good, profile([3.0, 0.0])])
    with pytest.raises(InputError, match="fit the component"):
        plane([profile([1.0, 0.0], names=("a", "b"))], component)


# ---------------------------------------------------------------- measuring a model


def test_a_reading_holds_the_projections_of_the_librarys_own_hidden_states(basis: TraitBasis) -> None:
    lm = tiny_lm()
    states = hidden_states(lm, PROMPTS.prompts, 2)

    found = measure(lm, basis, step=3)

    np.testing.assert_allclose(found.values, states @ basis.directions.T, atol=1e-4)
    np.testing.assert_allclose(found.norms, np.linalg.norm(states, axis=1), rtol=1e-5)
    assert found.activation is not None
    np.testing.assert_allclose(found.activation, states.mean(axis=0), atol=1e-5)
    assert (found.layer, found.step, found.model, found.adapter_state) == (2, 3, "tiny-llama", "none")
    assert (found.names, found.readout, found.basis) == (("truth", "care"), "two", basis.digest)
    assert found.dtype == "float32"


def test_a_vector_added_at_the_layer_is_measured_as_drift_of_that_length(basis: TraitBasis) -> None:
    lm = tiny_lm()
    start = measure(lm, basis, step=0)
    added = np.array([0.5, -2.0]) @ basis.directions  # (hidden,)
    with steer.apply_rows(lm, 2, np.repeat(added[None], 1, axis=0)):
        rows = [measure(lm, replace_plan(basis), step=1)]
    expected = basis.directions @ added / start.norms.mean()

    found = drift(replace(rows[0], basis=start.basis, plan=start.plan), start)

    assert found.drift == pytest.approx(expected, abs=1e-5)
    assert found.se == pytest.approx([0.0, 0.0], abs=1e-6)
    assert found.shift is not None
    np.testing.assert_allclose(found.shift, added / start.norms.mean(), atol=1e-5)
    np.testing.assert_allclose(basis.directions @ found.shift, found.drift, atol=1e-5)


def replace_plan(basis: TraitBasis) -> TraitBasis:
    """The same basis with every prompt in a pass of its own, as row-wise steering needs it."""
    rows = tuple((at,) for at in range(len(basis.prompts.prompts)))
    return replace(basis, plan=replace(basis.plan, method="single", rows=rows))


def test_all_readouts_share_one_pass_and_agree_with_single_measurement(basis: TraitBasis) -> None:
    lm = tiny_lm()

    traits, norm = measure_all(lm, basis, [basis, ActivationNorm(2)], step=0)

    alone = measure(lm, basis, step=0)
    np.testing.assert_allclose(traits.values, alone.values, atol=1e-5)
    np.testing.assert_allclose(traits.norms, alone.norms, rtol=1e-5)
    np.testing.assert_allclose(norm.values[:, 0], alone.norms, rtol=1e-5)
    assert drift(traits, alone).drift == pytest.approx([0.0, 0.0], abs=1e-5)
    assert (norm.readout, norm.names) == ("activation_norm", ("activation_norm",))


def test_a_readout_of_another_layer_is_refused(basis: TraitBasis) -> None:
    with pytest.raises(InputError, match="make the readout for block 2"):
        measure_all(tiny_lm(), basis, [ActivationNorm(1)])


def test_another_model_is_refused_whatever_differs(basis: TraitBasis) -> None:
    half = tiny_lm()
    half.model.to(torch.bfloat16)
    template = make_tokenizer()
    template.chat_template += " "
    for other, said in (
        (tiny_lm(seed=1), "weights"),
        (tiny_lm("qwen2"), "architecture"),
        (half, "dtype"),
        (tiny_lm(tokenizer=template), "template"),
    ):
        with pytest.raises(FingerprintMismatch, match=said):
            measure(other, basis)


def test_other_weights_are_read_only_when_that_is_asked_for(basis: TraitBasis) -> None:
    other = tiny_lm(seed=1)

    found = measure(other, basis, step=7, weights_may_differ=True)

    start = measure(tiny_lm(), basis, step=0)
    assert found.weights != start.weights
    assert found.fingerprint == start.fingerprint
    assert drift(found, start).problem is None
    with pytest.raises(FingerprintMismatch, match="architecture"):
        measure(tiny_lm("qwen2"), basis, weights_may_differ=True)


def test_a_diverged_model_raises_instead_of_giving_a_number(basis: TraitBasis) -> None:
    lm = tiny_lm()
    with torch.no_grad():
        lm.blocks[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericalError):
        measure(lm, basis, weights_may_differ=True)
    with pytest.raises(NumericalError):
        measure_all(lm, basis, [basis], weights_may_differ=True)


def test_a_readout_that_makes_nan_of_good_activations_raises(basis: TraitBasis) -> None:
    class Broken(ActivationNorm):
        def read(self, activations: Any) -> Any:
            return np.full((len(activations), 1), np.nan)

    with pytest.raises(NumericalError, match="6 of 6 prompts"):
        measure_all(tiny_lm(), basis, [Broken(2)])


def test_a_negative_step_is_refused(basis: TraitBasis) -> None:
    with pytest.raises(InputError, match="step is -1"):
        measure(tiny_lm(), basis, step=-1)


def test_a_reading_is_kept_in_a_file_that_shows_when_it_was_edited(tmp_path: Path) -> None:
    one = reading([[1.0, 2.0], [np.nan, 3.0]], step=3, activation=np.ones(4, np.float32))
    path = one.save(tmp_path / "r.json")
    again = Reading.load(path)
    np.testing.assert_array_equal(again.values, one.values)
    assert (again.step, again.basis, again.names) == (one.step, one.basis, one.names)
    path.write_text(path.read_text().replace("2.0", "2.5"))
    with pytest.raises(ArtifactError, match=r"r\.json' was changed after it was written"):
        Reading.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"values": [["1.0", 2.0]]}, {"values": [[True, 2.0]]}, {"values": [[1.0], [1.0, 2.0]]}, {"values": 3},
        {"values": []},        {"values": [[1e39, 2.0]]}, {"norms": [[1.0]]}, {"norms": None}, {"norms": "1"},
        {"activation": [[1.0]]},
        {"activation": []}, {"activation": "none"}, {"names": "ab"}, {"names": [1, 2]}, {"names": []}, {"step": -1},
        {"step": 1.5}, {"step": "3"}, {"step": True}, {"layer": None}, {"layer": -1}, {"basis": None}, {"basis": ""},
        {"plan": 3}, {"fingerprint": None}, {"weights": []}, {"adapter_state": None}, {"dtype": ""}, {"model": None},
    ],
)  # fmt: skip
def test_a_stored_reading_with_an_unsound_field_is_refused(change: dict[str, object]) -> None:
    content = reading([[1.0, 2.0]]).to_dict()
    Reading.from_dict(content)
    with pytest.raises(ArtifactError, match="not a stored reading"):
        Reading.from_dict(content | change)


def test_a_reference_of_absurd_length_makes_no_drift_look_small() -> None:
    now, then = reading([[1.0], [2.0]], step=9), reading([[0.0], [1.0]], step=0)
    assert drift(now, then).problem is None
    for norms in ([1e9, 1.0], [30.0, 30.0]):
        found = drift(now, replace(then, norms=np.array(norms, np.float32)))
        assert "no sound unit" in str(found.problem)
    with pytest.raises(InputError, match="no length is below 0"):
        replace(then, norms=np.array([-1.0, 1.0], np.float32))


def test_readings_of_activations_of_different_width_are_not_compared() -> None:
    wide, narrow = (reading([[1.0]], activation=np.ones(n, np.float32)) for n in (4, 3))
    with pytest.raises(InputError, match="measure both with the same basis"):
        drift(wide, narrow)
