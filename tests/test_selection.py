"""Layer selection: who wins, who ties, who is not asked further, and what is said about it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tiltmeter import selection
from tiltmeter.selection import STRENGTH, Candidate, changes_by_steering, choose, racing
from tiltmeter.steer import SteeringVector, apply
from tiny import LAYERS, WIDTH, tiny_lm

CONVERSATIONS = [[{"role": "user", "content": text}] for text in ("how do i grow tea", "what is good", "tell me more")]


def candidate(layer: int, *, transfer: float = 0.5, probe: float = 0.9, seed: int = 0) -> Candidate:
    rng = np.random.default_rng(seed + layer)
    directions = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T.astype(np.float32)
    return Candidate(layer, directions, 10.0, (probe, probe), (transfer, transfer))


def spread(mean: float, *, n: int = 42, seed: int = 0) -> np.ndarray:
    """Changes about a mean, with a spread of their own."""
    noise = np.random.default_rng(seed).normal(0, 0.1, n)
    return np.asarray(mean + noise - noise.mean())


class TestChoosing:
    def test_a_clear_winner_wins_whatever_the_probes_say(self) -> None:
        found = [candidate(3, transfer=0.99), candidate(5, transfer=0.5), candidate(7, transfer=0.9)]
        changes = [spread(0.3, seed=1), spread(0.6, seed=2), spread(0.4, seed=3)]
        chosen, how = choose(found, changes)
        assert chosen.layer == 5
        assert "most after block 5 (divergence by block: 3: 0.300, 5: 0.600, 7: 0.400)" in how.reason
        assert how.strength == STRENGTH

    def test_a_tie_goes_to_the_layer_that_knows_unseen_system_prompts_best(self) -> None:
        found = [candidate(3, transfer=0.7), candidate(5, transfer=0.6), candidate(7, transfer=0.99)]
        changes = [spread(0.59, seed=1), spread(0.6, seed=2), spread(0.3, seed=3)]
        chosen, how = choose(found, changes)
        assert chosen.layer == 3
        assert "does not tell blocks 3, 5 apart" in how.reason
        assert "best after block 3 (accuracy by block: 3: 0.700, 5: 0.600)" in how.reason

    def test_answers_are_compared_in_pairs(self) -> None:
        hard = np.linspace(0, 0.9, 42)  # what both have in common is no reason to call them tied
        found = [candidate(3, transfer=0.9), candidate(5, transfer=0.1)]
        assert choose(found, [hard, hard + 0.02 + spread(0, seed=1) / 10])[0].layer == 5

    def test_layers_that_do_the_same_are_tied(self) -> None:
        same = spread(0.5)
        assert choose([candidate(3, transfer=0.6), candidate(5, transfer=0.7)], [same, same])[0].layer == 5
        assert choose([candidate(3), candidate(5)], [same, same])[0].layer == 3  # the earliest of equals

    def test_one_that_was_not_asked_to_the_end_cannot_win(self) -> None:
        found = [candidate(3, transfer=0.9), candidate(5, transfer=0.1)]
        chosen, how = choose(found, [spread(0.9, n=14), spread(0.6)])
        assert chosen.layer == 5
        assert [score.answers for score in how.scores] == [14, 42]

    def test_scores_hold_divergence_with_its_error_and_count(self) -> None:
        values = spread(0.4)
        _, how = choose([candidate(3), candidate(5)], [values, spread(0.2, seed=5)])
        assert how.scores[0].divergence == pytest.approx(0.4)
        assert how.scores[0].divergence_se == pytest.approx(values.std(ddof=1) / math.sqrt(42))
        assert how.scores[0].answers == 42

    def test_nothing_to_choose_from_is_said(self) -> None:
        chosen, how = choose([candidate(4)], None, given=True)
        assert (chosen.layer, how.strength, how.scores[0].divergence) == (4, None, None)
        assert "block 4 was asked for" in how.reason
        assert "block 4 was the only candidate" in choose([candidate(4)], None)[1].reason

    @pytest.mark.parametrize(("probe", "passes"), [(0.81, True), (0.79, False)])
    def test_the_probes_of_the_chosen_layer_pass_or_not(self, probe: float, passes: bool) -> None:
        assert choose([candidate(4, probe=probe)], None)[1].probes_pass is passes


class TestRacing:
    def test_all_race_before_the_first_answer(self) -> None:
        assert racing([np.array([])] * 3) == [0, 1, 2]

    def test_those_clearly_behind_are_out_and_stay_out(self) -> None:
        assert racing([spread(0.6, n=14), spread(0.2, n=14, seed=1), spread(0.58, n=14, seed=2)]) == [0, 2]
        assert racing([spread(0.6, n=28), spread(0.9, n=14, seed=1), spread(0.58, n=28, seed=2)]) == [0, 2]

    def test_the_best_is_never_out(self) -> None:
        assert 1 in racing([np.full(14, 0.1), np.full(14, 0.2), np.full(14, 0.1)])


class TestSteering:
    def test_all_layers_and_directions_in_one_batch_answer_as_each_alone(self) -> None:
        lm = tiny_lm()
        found = [candidate(0), candidate(1), candidate(LAYERS - 1)]
        changes = changes_by_steering(lm, found, CONVERSATIONS, strength=0.8)
        plain = lm.generate(CONVERSATIONS, max_new_tokens=32, temperature=0.0)
        for one, got in zip(found, changes, strict=True):
            wanted = []
            for conversation, before in zip(CONVERSATIONS, plain, strict=True):
                for sign in (1.0, -1.0):
                    for direction in one.directions:
                        vector = SteeringVector(one.layer, sign * direction[None], strength=0.8, norm=one.norm)
                        with apply(lm, vector):
                            after = lm.generate([conversation], max_new_tokens=32, temperature=0.0)[0]
                        wanted.append(selection._change(before, after))
            np.testing.assert_allclose(got, wanted[: len(got)], atol=1e-9)
        assert max(map(len, changes)) == 12
        assert max(float(own.max()) for own in changes) > 0

    def test_a_layer_where_nothing_happens_is_not_asked_to_the_end(self) -> None:
        idle = candidate(1)._replace(norm=1e-9)
        busy = candidate(0)._replace(norm=1000.0)
        told: list[tuple[int, int]] = []
        changes = changes_by_steering(
            tiny_lm(), [busy, idle], CONVERSATIONS, progress=lambda done, total, _: told.append((done, total))
        )
        assert [len(own) for own in changes] == [12, 4]
        assert told == [(0, 24), (8, 24), (12, 24), (24, 24)]

    def test_no_hook_is_left(self) -> None:
        lm = tiny_lm()
        changes_by_steering(lm, [candidate(0), candidate(2)], CONVERSATIONS[:1])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
