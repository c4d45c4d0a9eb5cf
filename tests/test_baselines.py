"""Every baseline keeps the readout contract and reads what it says, checked by independent arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bases import PROMPTS, TRAITS
from tiltmeter.baselines import (
    ActivationNorm,
    LinearReadout,
    difference_components,
    random_directions,
    scalar_component,
    semantic_basis,
)
from tiltmeter.basis import TraitBasis, fit_basis
from tiltmeter.drift import PrincipalComponent, Readout, drift, measure_all
from tiltmeter.errors import FingerprintMismatch, InputError, NumericalError
from tiltmeter.testing import check_readout, planted_activations
from tiltmeter.traits import load_traits
from tiny import tiny_lm

WIDTH = 32


@pytest.fixture(scope="module")
def basis() -> TraitBasis:
    return fit_basis(tiny_lm(), traits=TRAITS, prompts=PROMPTS, layer=2)


def component(basis: TraitBasis) -> PrincipalComponent:
    return PrincipalComponent(basis.names, np.array([0.6, -0.8]), 0.9, 5)


def test_every_readout_keeps_the_contract(basis: TraitBasis) -> None:
    planted = planted_activations(hidden=WIDTH)
    readouts: list[Readout] = [
        basis,
        ActivationNorm(2),
        random_directions(WIDTH, 2),
        difference_components([planted.reference], [planted.tuned], 2, k=4),
        scalar_component(basis, component(basis)),
    ]
    for readout in readouts:
        check_readout(readout, WIDTH)


def test_activation_norm_reads_the_length_of_each_activation() -> None:
    read = ActivationNorm(1).read(np.array([[3.0, 4.0], [0.0, 2.0]], dtype=np.float32))

    np.testing.assert_allclose(read, [[5.0], [2.0]])


def test_random_directions_are_unit_reproducible_and_spread_evenly() -> None:
    one, same, other = (random_directions(500, 4, k=200, seed=seed) for seed in (1, 1, 2))

    np.testing.assert_allclose(np.linalg.norm(one.directions, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(one.directions, same.directions)
    assert one.name == same.name != other.name
    assert not np.array_equal(one.directions, other.directions)
    off = (one.directions @ one.directions.T)[np.triu_indices(200, 1)]
    assert off.std() == pytest.approx(500**-0.5, rel=0.05)  # cosines of independent directions in 500 dimensions
    assert abs(off.mean()) < 0.002


@pytest.mark.parametrize(("hidden", "k"), [(10, 0), (0, 3)])
def test_no_random_directions_are_refused(hidden: int, k: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        random_directions(hidden, 0, k=k)


def test_difference_components_find_a_shift_that_all_prompts_share_and_point_along_it() -> None:
    planted = planted_activations(("a",), hidden=WIDTH, shift=(-6.0,), seed=2)

    readout = difference_components([planted.reference], [planted.tuned], 2, k=3)

    assert readout.directions[0] @ -planted.directions[0] > 0.99
    assert readout.names == ("difference_1", "difference_2", "difference_3")
    np.testing.assert_allclose(readout.directions @ readout.directions.T, np.eye(3), atol=1e-5)


def test_difference_components_pool_runs_and_are_ordered_by_size() -> None:
    zero, e = np.zeros((4, 3)), np.eye(3)
    signs = np.array([[1.0], [1.0], [1.0], [-1.0]])

    readout = difference_components([zero, zero], [zero + 5 * signs * e[1], zero + 2 * signs * e[0]], 0, k=2)

    np.testing.assert_allclose(readout.directions, [e[1], e[0]], atol=1e-6)


def test_difference_components_of_other_runs_have_another_name() -> None:
    parts = [planted_activations(hidden=WIDTH, seed=seed) for seed in (1, 1, 2)]
    names = [difference_components([p.reference], [p.tuned], 2).name for p in parts]

    assert names[0] == names[1] != names[2]


def test_difference_components_refuse_what_has_no_answer() -> None:
    zero = np.zeros((4, 3))
    with pytest.raises(InputError, match="do not pair up"):
        difference_components([], [], 0)
    with pytest.raises(InputError, match="do not pair up"):
        difference_components([zero], [zero[:2]], 0)
    with pytest.raises(InputError, match="1 to 3"):
        difference_components([zero], [zero + 1], 0, k=4)
    with pytest.raises(NumericalError, match="fewer than 1 axes"):
        difference_components([zero], [zero], 0, k=1)
    with pytest.raises(NumericalError, match="fewer than 2 axes"):
        difference_components([zero], [zero + 1], 0, k=2)
    with pytest.raises(NumericalError, match="not finite"):
        difference_components([zero], [zero + np.nan], 0, k=1)


def test_the_scalar_component_reads_the_drifts_projection(basis: TraitBasis) -> None:
    lm = tiny_lm()
    pc1 = scalar_component(basis, component(basis))
    start = measure_all(lm, basis, [basis, pc1], step=0)
    later = measure_all(tiny_lm(seed=1), basis, [basis, pc1], step=9, weights_may_differ=True)

    profile, scalar = (drift(now, then) for now, then in zip(later, start, strict=True))

    assert scalar.drift[0] == pytest.approx(0.6 * profile.drift[0] - 0.8 * profile.drift[1], abs=1e-5)
    assert abs(scalar.drift[0]) > 0.01


def test_a_component_of_other_traits_is_refused(basis: TraitBasis) -> None:
    with pytest.raises(InputError, match="a, b"):
        scalar_component(basis, component(basis)._replace(names=("a", "b")))


def test_the_semantic_basis_follows_the_given_one_in_all_but_the_traits() -> None:
    lm = tiny_lm(max_position_embeddings=512)
    given = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=1, method="pca", seed=5)

    found = semantic_basis(lm, given)

    assert found.names == load_traits("semantic").names
    assert (found.layer, found.prompts, found.plan) == (1, given.prompts, given.plan)
    assert (found.method, found.pooling, found.seed) == ("pca", "last_token", 5)
    with pytest.raises(FingerprintMismatch):
        semantic_basis(tiny_lm(seed=1, max_position_embeddings=512), given)


def test_a_linear_readout_needs_a_finite_row_per_name() -> None:
    rows = LinearReadout("rows", ("a", "b"), 0, np.ones((2, 3)))
    with pytest.raises(InputError, match="one row per name"):
        replace(rows, names=("a",))
    with pytest.raises(NumericalError, match="not finite"):
        replace(rows, directions=np.full((2, 3), np.nan))
    with pytest.raises(InputError, match="width 3"):
        rows.read(np.ones((2, 4), dtype=np.float32))
