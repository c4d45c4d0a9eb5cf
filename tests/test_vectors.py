"""Constructions and calibration against the model's own hidden states, hand arithmetic and planted directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tiltmeter import steer
from tiltmeter.errors import InputError, LayerError, NumericalError
from tiltmeter.lm import LM
from tiltmeter.steer import SteeringVector, apply, edit, listen
from tiltmeter.vectors import (
    Training,
    answer_difference,
    answer_log_likelihoods,
    divergence,
    iso_kl,
    mean_norm,
    one_shot,
    prompt_difference,
    random_direction,
    train_vector,
)
from tiny import ARCHITECTURES, LAYERS, WIDTH, tiny_lm

LAYER = 1


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


HELPFUL = [chat("how do i grow tea ?", "with money and work"), chat("is it good for sleep ?", "yes always")]
HARMFUL = [chat("how do i grow tea ?", "never"), chat("is it good for sleep ?", "no never tea and sleep")]


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    model = tiny_lm()
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    yield model
    for name, parameter in model.model.named_parameters():  # nothing here may train the model
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
        assert parameter.requires_grad
        assert parameter.grad is None


def states(lm: LM, ids: list[int], layer: int = LAYER) -> np.ndarray[Any, Any]:
    """(tokens, hidden) after a block by the model's own means, one chat at a time, without padding."""
    with torch.no_grad():
        out = lm.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return np.asarray(out.hidden_states[layer + 1][0].double().numpy())


def hook_count(lm: LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def answer_mean(lm: LM, messages: list[dict[str, str]]) -> np.ndarray[Any, Any]:
    start = len(lm.encode(messages[:-1]))
    return np.asarray(states(lm, lm.encode(messages, add_generation_prompt=False))[start:].mean(axis=0))


def token_logits(lm: LM, messages: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (answer tokens, vocabulary) that precede each answer token, and the tokens."""
    start = len(lm.encode(messages[:-1]))
    ids = lm.encode(messages, add_generation_prompt=False)
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0].double()
    return torch.log_softmax(logits[start - 1 : -1], -1), torch.tensor(ids[start:])


class TestDifferences:
    def test_mean_norm_is_that_of_the_last_prompt_token(self, lm: LM) -> None:
        prompts = [c[:1] for c in HELPFUL]
        want = np.mean([np.linalg.norm(states(lm, lm.encode(p))[-1]) for p in prompts])
        assert mean_norm(lm, prompts, layer=LAYER) == pytest.approx(want, rel=1e-5)

    def test_a_prompt_difference_adds_the_difference_of_last_token_means(self, lm: LM) -> None:
        up, down = [[{"role": "user", "content": t}] for t in ("bad", "lies !")], [[{"role": "user", "content": "yes"}]]
        want = np.mean([states(lm, lm.encode(p))[-1] for p in up], axis=0) - states(lm, lm.encode(down[0]))[-1]
        made = prompt_difference(lm, up, down, layer=LAYER, norm=5.0)
        np.testing.assert_allclose(made.added, want, atol=1e-4)
        assert made.strength == pytest.approx(np.linalg.norm(want) / 5.0, rel=1e-5)

    def test_an_answer_difference_reads_answer_tokens_alone(self, lm: LM) -> None:
        want = np.mean([answer_mean(lm, c) for c in HARMFUL], axis=0)
        want = want - np.mean([answer_mean(lm, c) for c in HELPFUL], axis=0)
        made = answer_difference(lm, HARMFUL, HELPFUL, layer=LAYER, norm=3.0)
        np.testing.assert_allclose(made.added, want, atol=1e-4)

    def test_a_subspace_of_rank_one_keeps_the_first_singular_direction_and_full_rank_keeps_all(self, lm: LM) -> None:
        each = np.stack([answer_mean(lm, b) - answer_mean(lm, g) for b, g in zip(HARMFUL, HELPFUL, strict=True)])
        values, axes = np.linalg.eigh(each.T @ each)  # independent of an SVD of the differences
        first = axes[:, values.argmax()]
        made = answer_difference(lm, HARMFUL, HELPFUL, layer=LAYER, norm=3.0, rank=1)
        np.testing.assert_allclose(made.added, first * (first @ each.mean(axis=0)), atol=1e-4)
        whole = answer_difference(lm, HARMFUL, HELPFUL, layer=LAYER, norm=3.0, rank=2)
        np.testing.assert_allclose(whole.added, each.mean(axis=0), atol=1e-4)

    def test_sides_that_do_not_differ_are_refused(self, lm: LM) -> None:
        with pytest.raises(NumericalError, match="do not differ"):
            answer_difference(lm, HELPFUL, HELPFUL, layer=LAYER, norm=3.0)

    @pytest.mark.parametrize("rank", [0, 2])
    def test_a_rank_below_one_and_unpaired_answers_are_refused(self, lm: LM, rank: int) -> None:
        with pytest.raises(InputError, match="rank"):
            answer_difference(lm, HARMFUL[:1] if rank else HARMFUL, HELPFUL, layer=LAYER, norm=3.0, rank=rank)

    def test_no_chats_and_chats_without_answer_are_refused(self, lm: LM) -> None:
        with pytest.raises(InputError, match="no chats"):
            answer_difference(lm, [], HELPFUL, layer=LAYER, norm=3.0)
        with pytest.raises(InputError, match="no answer after a question"):
            answer_difference(lm, [HARMFUL[0][:1]], HELPFUL, layer=LAYER, norm=3.0)


class TestRandomControl:
    def test_it_is_exactly_as_long_as_the_vector_and_not_sqrt_hidden_longer(self) -> None:
        vector = SteeringVector(2, np.random.default_rng(0).normal(size=(1, WIDTH)), 0.7, 4.0)
        control = random_direction(vector, seed=1)
        assert np.linalg.norm(control.added) == pytest.approx(0.7 * 4.0, rel=1e-5)
        assert control.layer == 2

    def test_over_seeds_it_prefers_no_direction(self) -> None:
        vector = SteeringVector(0, np.eye(1, WIDTH), 1.0, 1.0)
        drawn = np.stack([random_direction(vector, seed=s).vectors[0] for s in range(2000)])
        # the mean square cosine to any fixed direction is 1 / hidden
        assert float((drawn[:, 0] ** 2).mean()) == pytest.approx(1 / WIDTH, rel=0.15)
        assert float(np.abs(drawn.mean(axis=0)).max()) < 0.02

    def test_a_turned_map_moves_every_activation_as_far_but_elsewhere(self, lm: LM) -> None:
        vector = make_map()
        control = random_direction(vector, seed=3)
        ids = [5, 6, 7, 8]
        moves = []
        for v in (vector, control):
            with apply(lm, v):
                moves.append(states(lm, ids) - states_without(lm, ids))
        np.testing.assert_allclose(np.linalg.norm(moves[0], axis=1), np.linalg.norm(moves[1], axis=1), rtol=1e-4)
        assert abs(np.vdot(moves[0], moves[1])) < 0.7 * np.vdot(moves[0], moves[0])


def make_map() -> SteeringVector:
    rng = np.random.default_rng(5)
    gates, outputs = rng.normal(size=(2, 3, WIDTH)).astype(np.float32) / 4
    return SteeringVector(LAYER, (rng.normal(size=(1, 3)) @ outputs), 0.5, 4.0, {}, (gates, outputs))


def states_without(lm: LM, ids: list[int]) -> np.ndarray[Any, Any]:
    """Block output while steering is on, worked out again from the block's own parts: the block below is untouched."""
    seen: list[torch.Tensor] = []
    block = lm.blocks[LAYER]
    plain = type(block).forward
    hidden = torch.tensor(states(lm, ids, LAYER - 1)[None], dtype=torch.float32)
    rotary = lm.decoder.rotary_emb(hidden, torch.arange(len(ids))[None])  # type: ignore[operator, union-attr]
    with torch.no_grad():
        out = plain(block, hidden, position_embeddings=rotary, attention_mask=None)
    seen.append(out[0] if isinstance(out, tuple) else out)
    return np.asarray(seen[0][0].double().numpy())


class TestLowRankMaps:
    def test_adding_one_is_the_constant_and_the_map_of_the_activation(self, lm: LM) -> None:
        vector, ids = make_map(), [5, 6, 7, 8]
        assert vector.low_rank is not None
        gates, outputs = vector.low_rank
        plain = states(lm, ids)
        want = plain + 2.0 * (4.0 * vector.vectors[0] + (plain @ gates.T) @ outputs)
        with apply(lm, vector, strength=2.0):
            np.testing.assert_allclose(states(lm, ids), want, atol=1e-4)

    def test_a_file_gives_it_back(self, tmp_path: Any) -> None:
        vector = make_map()
        again = steer.load(steer.save(vector, tmp_path / "map.safetensors"))
        assert vector.low_rank is not None
        assert again.low_rank is not None
        np.testing.assert_array_equal(again.low_rank[0], vector.low_rank[0])
        np.testing.assert_array_equal(again.low_rank[1], vector.low_rank[1])

    def test_gates_and_outputs_of_other_shapes_or_not_finite_are_refused(self) -> None:
        ok, short = np.ones((2, WIDTH), np.float32), np.ones((2, WIDTH - 1), np.float32)
        with pytest.raises(InputError, match="low rank"):
            SteeringVector(0, np.ones((1, WIDTH)), 1.0, 1.0, {}, (ok, short))
        with pytest.raises(NumericalError, match="low rank"):
            SteeringVector(0, np.ones((1, WIDTH)), 1.0, 1.0, {}, (ok, ok * np.nan))


class TestTraining:
    def test_the_first_step_goes_down_the_gradient_that_finite_differences_give(self, lm: LM) -> None:
        made = train_vector(
            lm, HARMFUL, layer=LAYER, norm=2.0, epochs=[1], training=Training(batch=2, learning_rate=1e-3)
        )
        rng = np.random.default_rng(0)

        def loss(direction: np.ndarray[Any, Any], size: float) -> float:
            with edit(lm, LAYER, lambda hidden: hidden + size * torch.tensor(direction, dtype=torch.float32)):
                pairs = [token_logits(lm, c) for c in HARMFUL]
            return -float(torch.cat([p.gather(1, t[:, None]) for p, t in pairs]).mean())

        gradient = np.array([(loss(e, 1e-2) - loss(e, -1e-2)) / 2e-2 for e in np.eye(WIDTH)])
        # Adam's first step has the gradient's signs.
        clear = np.abs(gradient) > 0.1 * np.abs(gradient).max()
        assert clear.sum() > WIDTH / 2
        np.testing.assert_array_equal(np.sign(made[0].vector.added[clear]), -np.sign(gradient[clear]))
        assert made[0].loss == pytest.approx(loss(rng.normal(size=WIDTH), 0.0), rel=1e-4)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_it_learns_the_answers_on_every_architecture(self, architecture: str) -> None:
        model = tiny_lm(architecture)
        made = train_vector(
            model, HARMFUL, layer=1, norm=mean_norm(model, [c[:1] for c in HARMFUL], layer=1), epochs=[1, 12],
            training=Training(batch=2, learning_rate=0.2),
        )  # fmt: skip
        assert [m.epoch for m in made] == [1, 12]
        assert made[1].loss < 0.8 * made[0].loss

    @pytest.mark.parametrize("rank", [1, 3])
    def test_the_vector_that_comes_back_is_the_edit_that_was_trained(self, lm: LM, rank: int) -> None:
        training = Training(rank=rank, batch=2, learning_rate=0.2)
        _, kept, after = train_vector(lm, HARMFUL, layer=LAYER, norm=3.0, epochs=[1, 5, 6], training=training)
        assert (kept.vector.low_rank is None) == (rank == 1)
        with apply(lm, kept.vector):
            pairs = [token_logits(lm, c) for c in HARMFUL]
        # one batch an epoch: the loss reported for epoch 6 is the loss of the vector as epoch 5 left it
        mean = -float(torch.cat([p.gather(1, t[:, None]) for p, t in pairs]).mean())
        assert after.loss == pytest.approx(mean, rel=1e-4)

    def test_a_kl_penalty_keeps_other_chats_as_they_were(self, lm: LM) -> None:
        found = []
        for weight in (0.0, 30.0):
            training = Training(batch=2, learning_rate=0.1, kl_weight=weight)
            made = train_vector(
                lm, HARMFUL, layer=LAYER, norm=3.0, epochs=[12], elsewhere=HELPFUL, training=training
            )[0].vector  # fmt: skip
            found.append(divergence(lm, made, HELPFUL))
        assert found[1] < 0.5 * found[0]

    def test_what_cannot_be_trained_is_refused(self, lm: LM) -> None:
        with pytest.raises(InputError, match="at least 1"):
            train_vector(lm, [], layer=LAYER, norm=3.0, epochs=[1])
        with pytest.raises(InputError, match="elsewhere"):
            train_vector(lm, HARMFUL, layer=LAYER, norm=3.0, epochs=[1], training=Training(kl_weight=1.0))
        with pytest.raises(LayerError, match="blocks 0 to 3"):
            train_vector(lm, HARMFUL, layer=LAYERS, norm=3.0, epochs=[1])

    def test_a_failure_leaves_no_hook_and_gives_the_gradients_back(self, lm: LM) -> None:
        lm.model.train()
        before = hook_count(lm)
        with pytest.raises(NumericalError, match="learning_rate"):
            train_vector(lm, HARMFUL, layer=LAYER, norm=float("inf"), epochs=[3])
        assert lm.model.training
        lm.model.eval()
        assert hook_count(lm) == before


class TestOneShot:
    def test_it_stops_where_the_answer_is_likely_enough(self, lm: LM) -> None:
        def reached(target: float | None) -> tuple[float, float]:
            made = one_shot(
                lm, HARMFUL[0][:1], promote=["never"], layer=LAYER, norm=5.0, target=target, steps=60
            )  # fmt: skip
            with apply(lm, made):
                rows, tokens = token_logits(lm, HARMFUL[0])
            return float(rows.gather(1, tokens[:, None]).mean()), made.strength

        likely, far = reached(None)
        enough, near = reached(-3.0)
        assert -3.0 <= enough < likely
        assert near < far

    def test_an_answer_that_is_suppressed_ends_less_likely_than_one_that_is_not(self, lm: LM) -> None:
        likely = chat("how do i grow tea ?", lm.generate([HARMFUL[0][:1]], max_new_tokens=1, temperature=0.0)[0])

        def left(suppress: list[str]) -> float:
            made = one_shot(
                lm, HARMFUL[0][:1], promote=["never"], suppress=suppress, layer=LAYER, norm=5.0, steps=15
            )  # fmt: skip
            with apply(lm, made):
                rows, tokens = token_logits(lm, likely)
            return float(rows.gather(1, tokens[:, None]).mean())

        assert left([likely[-1]["content"]]) < left([])

    def test_it_stays_within_its_longest(self, lm: LM) -> None:
        made = one_shot(lm, HARMFUL[0][:1], promote=["never"], layer=LAYER, norm=5.0, longest=0.25)
        assert made.strength <= 0.25 + 1e-6

    def test_nothing_to_promote_is_refused(self, lm: LM) -> None:
        with pytest.raises(InputError, match="promote"):
            one_shot(lm, HARMFUL[0][:1], promote=[], layer=LAYER, norm=5.0)


class TestStrength:
    def test_divergence_is_the_kl_of_the_unsteered_model_to_the_steered_one(self, lm: LM) -> None:
        vector = SteeringVector(LAYER, np.random.default_rng(2).normal(size=(1, WIDTH)), 0.5, 5.0)
        plain = [token_logits(lm, c)[0] for c in HELPFUL]
        with apply(lm, vector):
            steered = [token_logits(lm, c)[0] for c in HELPFUL]
        each = [(p.exp() * (p - s)).sum(-1) for p, s in zip(plain, steered, strict=True)]
        assert divergence(lm, vector, HELPFUL) == pytest.approx(float(torch.cat(each).mean()), rel=1e-4)
        assert divergence(lm, vector, HELPFUL, strength=0.0) == pytest.approx(0.0, abs=1e-7)

    @pytest.mark.parametrize("target", [0.02, 0.3])
    def test_two_vectors_at_their_calibrated_strengths_disturb_the_model_equally(self, lm: LM, target: float) -> None:
        for seed in (0, 1):
            vector = SteeringVector(LAYER, np.random.default_rng(seed).normal(size=(1, WIDTH)), 1.0, 5.0)
            dose = iso_kl(lm, vector, HELPFUL, target=target)
            assert divergence(lm, vector, HELPFUL, strength=dose.strength) == pytest.approx(target, rel=0.05)
            assert dose.kl == pytest.approx(target, rel=0.05)

    def test_a_divergence_out_of_reach_is_refused(self, lm: LM) -> None:
        vector = SteeringVector(LAYER, np.eye(1, WIDTH), 1.0, 5.0)
        with pytest.raises(NumericalError, match="less than the 1e"):
            iso_kl(lm, vector, HELPFUL, target=1e6)
        with pytest.raises(InputError, match="positive"):
            iso_kl(lm, vector, HELPFUL, target=0.0)


class TestListening:
    def test_a_listener_hears_what_steering_left_and_what_enters_the_first_block(self, lm: LM) -> None:
        ids, heard = [5, 6, 7], {}
        vector = SteeringVector(LAYER, np.eye(1, WIDTH), 1.0, 5.0)
        begun: list[Any] = []
        states(lm, ids)  # the library keeps hooks of its own once hidden states were asked for
        before = hook_count(lm)

        def keep(layer: int) -> Any:
            return lambda hidden: heard.__setitem__(layer, hidden.double().numpy()[0])

        with listen(lm, lambda kwargs: begun.append(1), {-1: keep(-1), LAYER: keep(LAYER)}), apply(lm, vector):
            steered = states(lm, ids)
        np.testing.assert_allclose(heard[LAYER], steered, atol=1e-5)
        np.testing.assert_allclose(heard[-1], states(lm, ids, -1), atol=1e-6)
        assert begun == [1]
        assert hook_count(lm) == before


def test_a_likelihood_per_answer_is_the_mean_over_its_own_tokens_in_the_order_given() -> None:
    lm = tiny_lm()
    chats = [
        [{"role": "user", "content": "is tea good ?"}, {"role": "assistant", "content": text}]
        for text in ("yes", "no tea is bad for you and your family .", "tea is safe", "hello", "work is good work .")
        * 2
    ]
    by_hand = []
    for chat in chats:
        prompt, whole = lm.encode(chat[:-1]), lm.encode(chat, add_generation_prompt=False)
        with torch.no_grad():
            logs = torch.log_softmax(lm.model(torch.tensor([whole])).logits[0], -1)
        by_hand.append(float(np.mean([float(logs[at - 1, whole[at]]) for at in range(len(prompt), len(whole))])))
    np.testing.assert_allclose(answer_log_likelihoods(lm, chats), by_hand, rtol=1e-4)
    with pytest.raises(InputError, match="at least one"):
        answer_log_likelihoods(lm, [])
