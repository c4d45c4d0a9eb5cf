"""The steering guard on random tiny models: where, how strongly, at what false-alarm rate, and when it must not say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiltmeter.detector import State
from tiltmeter.errors import ArtifactError, InputError, NumericalError
from tiltmeter.guard import SteeringGuard, Trace, fit_guard, fit_trace, listening
from tiltmeter.lm import LM
from tiltmeter.steer import SteeringVector, apply
from tiny import LAYERS, WIDTH, make_tokenizer, tiny_lm

WORDS = ("tea", "sleep", "money", "doctor", "plant", "work", "family", "law", "code", "home", "good", "bad", "never")


def chats(n: int, seed: int) -> list[list[dict[str, str]]]:
    rng = np.random.default_rng(seed)
    return [[{"role": "user", "content": " ".join(rng.choice(WORDS, size=rng.integers(2, 7)))}] for _ in range(n)]


OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "batch_size": 64}


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture(scope="module")
def guard(lm: LM) -> SteeringGuard:
    return fit_guard(lm, chats(450, 0), false_alarm_rate=0.02, **OPTIONS)


def hear(guard: SteeringGuard, lm: LM, n: int = 40, seed: int = 1) -> Trace:
    with guard.listening(lm) as heard:
        lm.generate(chats(n, seed), seed=seed, **OPTIONS)
    return heard.trace()


def push(layer: int, size: float, seed: int = 3) -> SteeringVector:
    return SteeringVector(layer, np.random.default_rng(seed).normal(size=(1, WIDTH)), 1.0, size)


def states(lm: LM, ids: list[int]) -> np.ndarray[Any, Any]:
    """(places, tokens, hidden): what enters block 0, then what leaves each block but the last."""
    with torch.no_grad():
        hidden = lm.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return np.asarray(torch.stack([h[0] for h in hidden[:LAYERS]]).numpy())


class TestHearing:
    def test_the_last_prompt_token_and_the_mean_over_the_tokens_fed_back_are_heard(self, lm: LM) -> None:
        prompt = [5, 9, 30, 12, 8]
        with listening(lm, range(-1, LAYERS)) as ear:
            out = lm.model.generate(  # type: ignore[operator]
                torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.long), max_new_tokens=7,
                do_sample=False, eos_token_id=None, pad_token_id=1,
            )  # fmt: skip
        trace = ear.trace()
        fed = [int(t) for t in out[0, :-1]]  # the last token is never fed back
        want = states(lm, fed)
        assert trace.tokens.tolist() == [6]
        assert trace.said[0].tolist() == fed
        np.testing.assert_allclose(trace.prompt[0, :LAYERS], want[:, 4], atol=1e-4)
        np.testing.assert_allclose(trace.answer[0, :LAYERS], want[:, 5:].mean(axis=1), atol=1e-4)

    def test_an_answer_is_heard_the_same_whatever_shares_its_batch_and_whoever_ends_first(self, lm: LM) -> None:
        traces = []
        for size in (1, 4, 12):
            with listening(lm, range(-1, LAYERS)) as ear:
                lm.generate(chats(12, 5), seed=2, max_new_tokens=12, temperature=1.0, batch_size=size)
            traces.append(ear.trace())
        assert len(set(traces[0].tokens.tolist())) > 2  # answers end at different times
        for trace in traces[1:]:
            np.testing.assert_array_equal(trace.tokens, traces[0].tokens)
            assert [ids.tolist() for ids in trace.said] == [ids.tolist() for ids in traces[0].said]
            np.testing.assert_allclose(trace.prompt, traces[0].prompt, atol=1e-4)
            np.testing.assert_allclose(trace.answer, traces[0].answer, atol=1e-4)

    def test_two_calls_are_heard_one_after_the_other(self, lm: LM) -> None:
        with listening(lm, (-1, 0)) as ear:
            lm.generate(chats(3, 5), seed=2, **OPTIONS)
            lm.generate(chats(2, 6), seed=2, **OPTIONS)
        assert len(ear.trace().tokens) == 5

    def test_nothing_said_is_a_trace_with_its_problem_and_no_hook_stays(self) -> None:
        lm = tiny_lm(seed=4)
        with listening(lm, (-1, 0)) as ear:
            pass
        assert ear.trace().problem == "nothing was generated"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())

    def test_an_alarm_is_one_whatever_length_was_stored(self, lm: LM, guard: SteeringGuard) -> None:
        trace = hear(guard, lm, 1, seed=11)
        pushed = replace(trace, answer=trace.answer + 100 * np.abs(trace.answer).max())
        known = {
            window: {block: place._replace(length=1e200) for block, place in blocks.items()}  # its square is no float
            for window, blocks in guard.known.items()
        }
        for judging in (guard, replace(guard, known=known)):
            (verdict,) = judging.judge(pushed)
            assert verdict.state is State.ALARM

    def test_listening_changes_no_answer(self, lm: LM, guard: SteeringGuard) -> None:
        plain = lm.generate(chats(8, 9), seed=4, **OPTIONS)
        with guard.listening(lm):
            assert lm.generate(chats(8, 9), seed=4, **OPTIONS) == plain


class TestVerdicts:
    def test_unsteered_answers_alarm_no_more_often_than_promised(self, lm: LM, guard: SteeringGuard) -> None:
        verdicts = guard.judge(hear(guard, lm, 200, seed=11))
        alarms = sum(v.state is State.ALARM for v in verdicts)
        assert alarms <= 11  # the chance of more than 11 of 200 at 2 % is 0.1 %
        assert guard.judge_model(hear(guard, lm, 60, seed=12)).state is State.CLEAR

    @pytest.mark.parametrize("layer", range(LAYERS))
    def test_a_random_push_it_has_never_seen_is_found_placed_and_measured(
        self, lm: LM, guard: SteeringGuard, layer: int
    ) -> None:
        size = 0.8 if layer else 2.5  # what a short answer is made of moves block 0 most
        with apply(lm, push(layer, size * guard.known["answer"][layer].norm)):
            trace = hear(guard, lm)
        verdict = guard.judge_model(trace)
        assert verdict.state is State.ALARM
        assert verdict.block == layer
        assert verdict.strength == pytest.approx(size, rel=0.3)
        assert np.mean([v.state is State.ALARM for v in guard.judge(trace)]) > 0.9

    def test_a_push_on_the_prompt_alone_is_found(self, lm: LM, guard: SteeringGuard) -> None:
        with apply(lm, push(1, 2 * guard.known["prompt"][1].norm), positions="prompt"):
            found = guard.judge_model(hear(guard, lm))
        assert found.state is State.ALARM
        assert found.block == 1

    def test_no_number_no_token_and_another_length_are_inconclusive(self, lm: LM, guard: SteeringGuard) -> None:
        trace = hear(guard, lm, 6)
        broken = trace.answer.copy()
        broken[0, 1, 0] = np.nan
        broken[1] = np.nan
        tokens = trace.tokens.copy()
        tokens[1] = 0
        tokens[2] = guard.most + 1
        verdicts = guard.judge(replace(trace, answer=broken, tokens=tokens))
        assert [v.state for v in verdicts[:3]] == [State.INCONCLUSIVE] * 3
        assert "not finite" in verdicts[0].reason
        assert "no token" in verdicts[1].reason
        assert "calibration answers had" in verdicts[2].reason
        assert all(v.false_alarm_rate is None for v in verdicts[:3])

    def test_tokens_that_calibration_never_had_are_inconclusive(self, lm: LM, guard: SteeringGuard) -> None:
        trace = hear(guard, lm, 5)
        strange = tuple(np.full(len(ids), 10**6 + 1) if row == 2 else ids for row, ids in enumerate(trace.said))
        verdict = guard.judge(replace(trace, said=strange))[2]
        assert verdict.state is State.INCONCLUSIVE
        assert "100% of the tokens" in verdict.reason

    def test_another_model_is_inconclusive_and_so_is_an_adapter(self, lm: LM, guard: SteeringGuard) -> None:
        other = tiny_lm(seed=9, tokenizer=make_tokenizer())
        verdict = guard.judge_model(hear(guard, other, 4))
        assert verdict.state is State.INCONCLUSIVE
        assert "another model" in verdict.reason
        adapted = replace(hear(guard, lm, 4), problem="an adapter acts on the model")
        assert {v.state for v in guard.judge(adapted)} == {State.INCONCLUSIVE}
        assert "adapter" in guard.judge_model(adapted).reason

    def test_generation_without_a_cache_cannot_be_judged(self, lm: LM, guard: SteeringGuard) -> None:
        with guard.listening(lm) as heard:
            lm.model.generate(  # type: ignore[operator]
                torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=4,
                do_sample=False, use_cache=False, pad_token_id=1,
            )  # fmt: skip
        assert {v.state for v in guard.judge(heard.trace())} == {State.INCONCLUSIVE}


class TestCalibration:
    def test_the_threshold_is_the_conformal_rank_of_answers_that_taught_nothing(self, lm: LM) -> None:
        with listening(lm, (-1, 0, 1)) as ear:
            lm.generate(chats(120, 21), seed=3, **OPTIONS)
        guard = fit_trace(ear.trace(), false_alarm_rate=0.1)
        heard = int((ear.trace().tokens > 0).sum())
        assert len(guard.null_scores) == heard // 3
        rank = int(np.ceil(0.9 * (heard // 3 + 1)))
        assert guard.null_scores[rank - 1] < guard.threshold <= guard.null_scores[rank - 1] * 1.0001 + 1e-6

    def test_too_few_answers_for_the_rate_and_diverged_activations_are_refused(self, lm: LM) -> None:
        with pytest.raises(InputError, match="at least 99"):
            fit_guard(lm, chats(60, 0), false_alarm_rate=0.01, **OPTIONS)
        with listening(lm, (-1, 0)) as ear:
            lm.generate(chats(40, 0), **OPTIONS)
        trace = ear.trace()
        with pytest.raises(NumericalError, match="not finite"):
            fit_trace(replace(trace, prompt=trace.prompt * np.nan), false_alarm_rate=0.2)

    def test_a_file_gives_the_same_verdicts(self, lm: LM, guard: SteeringGuard, tmp_path: Path) -> None:
        again = SteeringGuard.load(guard.save(tmp_path / "guard.safetensors"))
        with apply(lm, push(2, 3.0)):
            trace = hear(guard, lm, 12)
        first, second = guard.judge(trace), again.judge(trace)
        assert [(v.state, v.block) for v in first] == [(v.state, v.block) for v in second]
        np.testing.assert_allclose([v.score for v in first], [v.score for v in second], rtol=1e-3)  # type: ignore[arg-type]

    def test_foreign_and_truncated_files_are_refused(self, guard: SteeringGuard, tmp_path: Path) -> None:
        path = guard.save(tmp_path / "guard.safetensors")
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ArtifactError):
            SteeringGuard.load(path)
        with pytest.raises(ArtifactError, match="calibrate the guard again"):
            SteeringGuard.load(tmp_path / "none.safetensors")


class TestKinds:
    """Answers through planted blocks: what enters tells the kind, and each block adds a linear map of its input, noise,
    and an offset of the kind along two directions, that no kind predicts for another."""

    RNG = np.random.default_rng(5)
    MAPS = RNG.normal(size=(2, 16, 16)) / 8
    STRANGE = np.linalg.qr(RNG.normal(size=(16, 2)))[0].T

    def trace(self, kinds: list[str], each: int, seed: int, push: float = 0.0) -> tuple[Trace, list[tuple[str, ...]]]:
        rng = np.random.default_rng(seed)
        n = each * len(kinds)
        windows = []
        for _ in range(2):
            place = np.repeat([np.random.default_rng([9, *k.encode()]).normal(size=16) for k in kinds], each, axis=0)
            at = [rng.normal(size=(n, 16)) + 4 * place]
            for block in range(2):
                own = {k: np.random.default_rng([block, *k.encode()]).normal(size=2) for k in kinds}
                offset = np.repeat([own[k] for k in kinds], each, axis=0) @ self.STRANGE
                new = at[-1] + at[-1] @ self.MAPS[block] + 0.1 * rng.normal(size=(n, 16)) + offset
                at.append(new + (push * self.MAPS[0, 0] / np.linalg.norm(self.MAPS[0, 0]) if block == 1 else 0.0))
            windows.append(np.stack(at, axis=1).astype(np.float32))
        tokens = np.full(n, 7, dtype=np.int64)
        said = tuple(np.arange(5, dtype=np.int64) for _ in range(n))
        labels = [(k, ("x", "y", "")[i % 3]) for i, k in enumerate(np.repeat(kinds, each))]
        return Trace((-1, 0, 1), windows[0], windows[1], tokens, said, "0a" * 32), labels

    def test_a_kind_that_calibration_never_had_alarms_far_less_when_kinds_were_left_out_whole(self) -> None:
        trace, kinds = self.trace(list("abcdefgh"), 60, 0)
        new, _ = self.trace(list("qrstuvwxyz"), 40, 1)
        pushed, _ = self.trace(list("abcdefgh"), 10, 2, push=3.0)
        plain = fit_trace(trace, false_alarm_rate=0.05)
        by_kinds = fit_trace(trace, false_alarm_rate=0.05, kinds=kinds)
        rates = [float((g.scores(new) >= g.threshold).mean()) for g in (plain, by_kinds)]
        assert rates[0] > 0.3
        assert rates[1] < 0.15
        verdicts = by_kinds.judge(pushed)
        assert {v.state for v in verdicts} == {State.ALARM}
        assert {v.block for v in verdicts} == {1}

    def test_the_threshold_is_the_largest_of_the_kinds_own_quantiles(self) -> None:
        trace, kinds = self.trace(list("abc"), 40, 0)
        guard = fit_trace(trace, false_alarm_rate=0.1, kinds=kinds)
        # 40 answers a kind: the quantile is the ceil(0.9 * 41) = 37th, so at most three of each kind lie above it, and
        # in the kind that sets the threshold exactly three.
        above = (guard.null_scores >= guard.threshold).sum()
        assert 3 <= above <= 9
        assert guard.calibrated_on == ""
        assert fit_trace(trace, false_alarm_rate=0.1, kinds=kinds, calibrated_on="c").calibrated_on == "c, by 3 kinds"

    def test_a_fold_learns_from_no_answer_of_its_kind_nor_of_the_label_left_out_beside(self) -> None:
        from tiltmeter.guard import _folds

        kinds = [("a", "x"), ("a", ""), ("b", "x"), ("b", "y"), ("c", "y"), ("c", "")]
        folds = _folds(kinds, 0.5)
        assert [f.kind for f in folds] == ["a", "b", "c"]
        assert [f.test.tolist() for f in folds] == [[k == kind for k, _ in kinds] for kind in "abc"]
        # "a" goes with x, "b" with y, "c" with x again.
        assert [f.learn.tolist() for f in folds] == [
            [False, False, False, True, True, True], [True, True, False, False, False, True],
            [False, True, False, True, False, False],
        ]  # fmt: skip

    def test_a_guard_with_unsound_numbers_cannot_be_made(self, tmp_path: Path) -> None:
        trace, kinds = self.trace(list("abc"), 40, 0)
        guard = fit_trace(trace, false_alarm_rate=0.1, kinds=kinds)
        place = guard.known["answer"][0]

        def known(**changes: object) -> dict:
            return {"answer": {**guard.known["answer"], 0: place._replace(**changes)}}

        for change in (
            {"threshold": np.nan}, {"threshold": np.inf}, {"threshold": 99.0}, {"threshold": None},
            {"false_alarm_rate": -3}, {"false_alarm_rate": np.nan}, {"false_alarm_rate": 1e-4}, {"strangest": np.inf},
            {"strangest": np.nan}, {"fewest": -1}, {"most": 0}, {"places": ()}, {"places": (0, 1)},
            {"places": (-1, 1, 0)},
            {"known": {}}, {"known": {"answer": {}}}, {"model": None},
            {"vocabulary": guard.vocabulary * np.nan},
            {"null_scores": guard.null_scores * np.nan}, {"null_scores": guard.null_scores[::-1]},
            {"null_kinds": guard.null_kinds[1:]}, {"known": known(spread=0.0)}, {"known": known(spread=np.nan)},
            {"known": known(median=np.inf)}, {"known": known(norm=0.0)},
            {"known": known(weights=np.full_like(place.weights, np.nan))},
            {"known": known(bias=place.bias[1:])}, {"known": known(whitening=np.full_like(place.whitening, np.inf))},
        ):  # fmt: skip
            with pytest.raises(InputError), np.errstate(all="ignore"):
                replace(guard, **change)

    def test_no_model_is_clear_of_whose_answers_most_could_not_be_judged(self) -> None:
        trace, kinds = self.trace(list("abc"), 40, 0)
        guard = fit_trace(trace, false_alarm_rate=0.1, kinds=kinds)
        assert guard.judge_model(trace).state is State.CLEAR
        broken = trace.answer.copy()
        broken[: len(broken) * 3 // 4] = np.nan
        verdict = guard.judge_model(replace(trace, answer=broken))
        assert verdict.state is State.INCONCLUSIVE
        assert "could not be judged" in verdict.reason

    def test_windows_can_be_left_out_and_survive_a_file(self, tmp_path: Path) -> None:
        trace, kinds = self.trace(list("abc"), 40, 0)
        guard = fit_trace(trace, false_alarm_rate=0.1, kinds=kinds, windows=("answer",))
        assert guard.windows == ("answer",)
        moved = replace(trace, prompt=trace.prompt + 50.0)
        np.testing.assert_array_equal(guard.scores(moved), guard.scores(trace))
        again = SteeringGuard.load(guard.save(tmp_path / "guard.safetensors"))
        assert again.windows == ("answer",)
        np.testing.assert_allclose(again.scores(trace), guard.scores(trace), rtol=1e-3, atol=1e-3)

    def test_too_few_kinds_or_answers_of_one_and_unknown_windows_are_refused(self, lm: LM) -> None:
        trace, kinds = self.trace(list("ab"), 40, 0)
        with pytest.raises(InputError, match="at least 3 kinds of at least 9"):
            fit_trace(trace, false_alarm_rate=0.1, kinds=kinds)
        trace, kinds = self.trace(list("abc"), 8, 0)
        with pytest.raises(InputError, match="the smallest of 8"):
            fit_trace(trace, false_alarm_rate=0.1, kinds=kinds)
        with pytest.raises(InputError, match="windows"):
            fit_trace(trace, false_alarm_rate=0.1, windows=("middle",))
        with pytest.raises(InputError, match="give one for each"):
            fit_guard(lm, chats(40, 0), false_alarm_rate=0.1, kinds=[("a",)], **OPTIONS)
