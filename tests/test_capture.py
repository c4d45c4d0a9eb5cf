"""Activations against the model's own `output_hidden_states`, one prompt at a time: the oracle of this
file."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tiltmeter import attention
from tiltmeter import lm as lms
from tiltmeter.capture import Activations, capture, plan_batches, project, read_below
from tiltmeter.errors import ArtifactError, InputError, LayerError, NumericalError
from tiltmeter.plan import BatchPlan, RowCost, lay_tree, padded_rows, tree_rows
from tiny import ARCHITECTURES, LAYERS, WIDTH, enable_checkpointing, make_model, make_tokenizer, random_prompts, tiny_lm

TOLERANCE = 1e-4
# The last entry of hidden_states is after the final norm, so it says nothing of the last block.
INNER = tuple(range(LAYERS - 1))


def hidden_states(lm: lms.LM, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """(layers, tokens, hidden) outputs of the inner blocks for one prompt alone."""
    with torch.no_grad():
        states = lm.model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    return np.stack([states[k + 1][0].float().numpy() for k in INNER])


def expected(lm: lms.LM, prompts: Sequence[Sequence[int]], pooling: str) -> np.ndarray[Any, Any]:
    """(layers, prompts, hidden)."""
    states = [hidden_states(lm, ids) for ids in prompts]
    pooled = [s[:, -1] if pooling == "last_token" else s.mean(axis=1) for s in states]
    return np.stack(pooled, axis=1)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest) -> lms.LM:
    return tiny_lm(request.param)


class TestEveryArchitecture:
    @pytest.mark.parametrize("pooling", ["last_token", "mean"])
    @pytest.mark.parametrize("method", ["tree", "padded", "single"])
    def test_every_way_of_batching_gives_the_model_s_own_hidden_states(
        self, lm: lms.LM, method: Any, pooling: Any
    ) -> None:
        prompts = random_prompts()
        plan = plan_batches(lm, prompts, method=method)
        assert plan.method == method
        got = capture(lm, prompts, INNER, pooling=pooling, plan=plan)
        assert got.values.dtype == np.float32
        np.testing.assert_allclose(got.values, expected(lm, prompts, pooling), atol=TOLERANCE)

    def test_the_tree_is_the_default_and_shares_prefixes(self, lm: lms.LM) -> None:
        prompts = random_prompts()
        plan = plan_batches(lm, prompts)
        assert plan.method == "tree"
        assert len(plan.rows) < len(prompts)

    def test_rows_bounded_to_a_few_tokens_change_nothing(self, lm: lms.LM) -> None:
        prompts = random_prompts()
        plan = plan_batches(lm, prompts, max_tokens=24)
        assert len(plan.rows) > 1
        got = capture(lm, prompts, INNER, plan=plan)
        np.testing.assert_allclose(got.values, expected(lm, prompts, "last_token"), atol=TOLERANCE)

    def test_ending_the_pass_early_changes_nothing_below(self, lm: lms.LM) -> None:
        prompts = random_prompts()
        shallow = capture(lm, prompts, [0])
        deep = capture(lm, prompts, [0, LAYERS - 1])
        np.testing.assert_allclose(shallow.at(0), deep.at(0), atol=1e-6)
        np.testing.assert_allclose(shallow.at(0), expected(lm, prompts, "last_token")[0], atol=TOLERANCE)

    def test_the_last_block_is_read_before_the_final_norm(self, lm: lms.LM) -> None:
        prompts = random_prompts(6)
        got = capture(lm, prompts, [LAYERS - 1])
        norm = [m for name, m in lm.decoder.named_children() if "norm" in name or name == "ln_f"][-1]
        with torch.no_grad():
            after = norm(torch.from_numpy(got.at(LAYERS - 1))).numpy()
            states = [lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1] for ids in prompts]
        np.testing.assert_allclose(after, np.stack([s[0, -1].numpy() for s in states]), atol=TOLERANCE)
        assert np.abs(after - got.at(LAYERS - 1)).max() > 0.1

    def test_projections_are_dot_products_with_the_hidden_states(self, lm: lms.LM) -> None:
        prompts = random_prompts()
        directions = np.random.default_rng(0).normal(size=(3, WIDTH))
        got = project(lm, prompts, 2, directions)
        states = expected(lm, prompts, "last_token")[2]
        np.testing.assert_allclose(got.values, states @ directions.T, atol=1e-3)
        np.testing.assert_allclose(got.norms, np.linalg.norm(states, axis=1), atol=1e-3)
        np.testing.assert_allclose(got.mean, states.mean(axis=0), atol=1e-4)
        assert got.values.dtype == got.norms.dtype == np.float32

    def test_the_pass_goes_no_further_than_the_last_wanted_block(self, lm: lms.LM) -> None:
        ran: list[str] = []
        handles = [lm.blocks[2].register_forward_hook(lambda *_: ran.append("block 2"))]
        head = lm.model.get_output_embeddings()  # type: ignore[operator]
        handles.append(head.register_forward_hook(lambda *_: ran.append("logits")))
        try:
            capture(lm, random_prompts(), [0, 1])
        finally:
            for handle in handles:
                handle.remove()
        assert ran == []


class TestStretches:
    """Rows of several stretches: random_prompts alone would fit into few."""

    def test_every_block_takes_the_attention_that_it_is_given(
        self, lm: lms.LM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attention, "_STRETCH", 16)
        prompts = random_prompts(24)
        plan = plan_batches(lm, prompts)
        assert [len(row) for row in plan.rows] == [24]
        attend = attention.TreeAttention(lay_tree(prompts, plan.rows[0]), n_blocks=LAYERS, ends=None)
        own = lm.config._attn_implementation
        with torch.no_grad(), attention.attending(lm, attend):
            ids, places = (torch.from_numpy(x)[None] for x in lay_tree(prompts, plan.rows[0])[:2])
            lm.forward(ids, position_ids=places)
        assert attend.calls == LAYERS
        assert lm.config._attn_implementation == own
        for pooling in ("last_token", "mean"):
            got = capture(lm, prompts, INNER, plan=plan, pooling=pooling)  # type: ignore[arg-type]
            np.testing.assert_allclose(got.values, expected(lm, prompts, pooling), atol=TOLERANCE)

    def test_the_last_block_computes_only_the_rows_that_are_wanted(self, lm: lms.LM) -> None:
        prompts = random_prompts()
        n_ends = len({tuple(ids) for ids in prompts})
        rows: list[int] = []
        inner = [m for m in lm.blocks[2].modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        widest = max(inner, key=lambda m: m.weight.numel())  # of the feed-forward part
        own = widest.forward

        def counted(x: torch.Tensor) -> torch.Tensor:
            rows.append(x.shape[-2])
            result: torch.Tensor = own(x)
            return result

        widest.forward = counted  # type: ignore[method-assign]
        try:
            capture(lm, prompts, [0, 2])
        finally:
            del widest.forward
        assert rows[-1] == n_ends
        assert sum(rows) in (n_ends, n_ends + len(lay_tree(prompts, range(len(prompts))).ids))  # parallel blocks

    def test_whoever_listens_to_the_last_block_hears_all_tokens(self) -> None:
        lm, prompts = tiny_lm(), random_prompts()
        heard: list[int] = []
        handle = lm.blocks[2].mlp.register_forward_hook(lambda m, a, out: heard.append(out.shape[1]))  # type: ignore[union-attr]
        try:
            got = capture(lm, prompts, [2])
        finally:
            handle.remove()
        assert heard == [len(lay_tree(prompts, range(len(prompts))).ids)]
        np.testing.assert_allclose(got.at(2), expected(lm, prompts, "last_token")[2], atol=TOLERANCE)

    def test_blocks_that_compute_attention_their_own_way_are_found_and_read_under_a_mask(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm, prompts = tiny_lm(), random_prompts()
        want = expected(lm, prompts, "last_token")
        own = attention.attending

        @contextlib.contextmanager
        def ignored(model: lms.LM, attend: Any) -> Any:
            with own(model, attend):
                model.config._attn_implementation = "sdpa"
                yield

        monkeypatch.setattr(attention, "attending", ignored)
        np.testing.assert_allclose(capture(lm, prompts, INNER).values, want, atol=TOLERANCE)

    def test_the_model_s_own_attention_comes_back_after_an_error(self) -> None:
        lm = tiny_lm()
        handle = lm.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            capture(lm, random_prompts(), [2])
        handle.remove()
        assert lm.config._attn_implementation == "sdpa"
        assert lm.model(torch.tensor([[5, 6]])).logits.shape[1] == 2

    def test_compiled_parts_are_read_under_a_mask(self) -> None:
        lm = tiny_lm()
        lm.blocks[1].compile(backend="eager")
        assert "compiled" in attention.obstacle(lm)
        want = expected(tiny_lm(), random_prompts(), "last_token")
        np.testing.assert_allclose(capture(lm, random_prompts(), INNER).values, want, atol=TOLERANCE)

    @pytest.mark.parametrize("multiple", [1, 16])
    def test_a_stretch_sees_the_path_to_it_and_itself(self, multiple: int) -> None:
        prompts = random_prompts(30, seed=4)
        tree = lay_tree(prompts, range(len(prompts)), multiple=multiple)
        assert len(tree.ids) % multiple == 0
        n = len(tree.ids)
        for size in (1, 7, 64, n, n + 1):
            seen = np.zeros((n, n), dtype=int)
            for part in tree.stretches(size):
                for at, (keys, visible) in enumerate(zip(part.keys, part.visible, strict=True)):
                    length = visible.shape[0]
                    for token in range(length):
                        np.add.at(seen[part.first + at * length + token], keys[visible[token]], 1)
            np.testing.assert_array_equal(seen, tree.visible.astype(int))


class TestWhatLiesBelow:
    """Models that are equal up to a block: what enters it is computed once."""

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("method", ["tree", "padded"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_model_that_differs_above_reads_as_it_does_alone(
        self, architecture: str, method: Any, dtype: torch.dtype
    ) -> None:
        base, prompts = lms.wrap(make_model(architecture).to(dtype), make_tokenizer()), random_prompts()
        tuned = lms.wrap(copy.deepcopy(base.model), make_tokenizer())
        with torch.no_grad():
            for parameter in tuned.blocks[2].parameters():
                parameter.mul_(1.5)
        plan = plan_batches(base, prompts, method=method)
        axes = np.eye(WIDTH, dtype=np.float32)
        below = read_below(base, prompts, 2, plan=plan)
        for layer, pooling in ((2, "last_token"), (3, "last_token"), (2, "mean")):
            alone = project(tuned, prompts, layer, axes, plan=plan, pooling=pooling)  # type: ignore[arg-type]
            ran: list[int] = []
            first = next(m for m in tuned.blocks[1].modules() if isinstance(m, nn.Linear) or "Conv1D" in str(type(m)))
            handle = first.register_forward_hook(lambda *_, ran=ran: ran.append(1))
            got = project(tuned, prompts, layer, axes, plan=plan, pooling=pooling, below=below)  # type: ignore[arg-type]
            handle.remove()
            assert not ran
            np.testing.assert_array_equal(got.values, alone.values)
            assert np.abs(got.values - project(base, prompts, layer, axes, plan=plan).values).max() > 0.01
        assert not any("forward" in vars(block) for block in tuned.blocks)

    def test_it_serves_no_other_plan_and_no_lower_layer(self) -> None:
        lm, prompts = tiny_lm(), random_prompts()
        below = read_below(lm, prompts, 2, plan=plan_batches(lm, prompts))
        axes = np.eye(WIDTH, dtype=np.float32)
        with pytest.raises(InputError, match="below block 2"):
            project(lm, prompts, 1, axes, below=below)
        with pytest.raises(InputError, match="batch plan"):
            project(lm, prompts, 3, axes, plan=plan_batches(lm, prompts, max_tokens=24), below=below)
        with pytest.raises(LayerError, match="block 0"):
            read_below(lm, prompts, 0, plan=plan_batches(lm, prompts))

    def test_filling_a_row_up_moves_no_prompt_in_it(self) -> None:
        prompts = random_prompts(30, seed=4)
        bare = lay_tree(prompts, range(len(prompts)))
        n = len(bare.ids)
        full = lay_tree(prompts, range(len(prompts)), multiple=n + 5)
        assert len(full.ids) == n + 5
        np.testing.assert_array_equal(full.visible[:n, :n], bare.visible)
        np.testing.assert_array_equal(full.visible[n:, n:], np.eye(5, dtype=bool))
        assert not full.visible[:n, n:].any()
        assert not full.visible[n:, :n].any()
        assert max(path.max() for path in full.paths) < n


class TestWhatIsRead:
    def test_layers_come_in_the_order_asked_for(self) -> None:
        lm, prompts = tiny_lm(), random_prompts(5)
        got = capture(lm, prompts, [2, 0])
        assert got.layers == (2, 0)
        np.testing.assert_array_equal(got.values[0], got.at(2))
        np.testing.assert_allclose(got.at(0), expected(lm, prompts, "last_token")[0], atol=TOLERANCE)

    def test_one_prompt_alone_can_be_read(self) -> None:
        lm = tiny_lm()
        got = capture(lm, [[7, 8, 9]], [1])
        np.testing.assert_allclose(got.at(1), expected(lm, [[7, 8, 9]], "last_token")[1], atol=TOLERANCE)

    def test_the_same_prompt_twice_gives_the_same_row_twice(self) -> None:
        got = capture(tiny_lm(), [[7, 8, 9], [5, 6], [7, 8, 9]], [1]).at(1)
        np.testing.assert_array_equal(got[0], got[2])

    def test_a_changed_token_in_one_prompt_moves_no_other_prompt(self) -> None:
        lm, prompts = tiny_lm(), random_prompts()
        plan = plan_batches(lm, prompts)
        before = capture(lm, prompts, [2], plan=plan).at(2)
        changed = [list(ids) for ids in prompts]
        changed[5][-1] = (changed[5][-1] + 1) % 50 + 4
        after = capture(lm, changed, [2], plan=plan).at(2)
        moved = np.abs(after - before).max(axis=1) > 1e-4
        assert moved.tolist() == [i == 5 for i in range(len(prompts))]

    def test_half_precision_is_read_in_its_own_dtype_and_comes_out_in_float32(self) -> None:
        model = make_model("llama").to(torch.bfloat16)
        lm, prompts = lms.wrap(model, make_tokenizer()), random_prompts()
        for method in ("tree", "padded"):
            plan = plan_batches(lm, prompts, method=method)  # type: ignore[arg-type]
            got = capture(lm, prompts, INNER, plan=plan)
            assert got.values.dtype == np.float32
            want = expected(lm, prompts, "last_token")
            relative = np.linalg.norm(got.values - want, axis=-1) / np.linalg.norm(want, axis=-1)
            assert relative.max() < 0.02

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("method", ["tree", "padded"])
    def test_the_residual_stream_of_a_half_precision_model_is_not_rounded(self, architecture: str, method: Any) -> None:
        """A large embedding, as real models have large common activations: rounding the sums would cost most there."""
        model = make_model(architecture).to(torch.bfloat16)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(256)
        half = lms.wrap(model, make_tokenizer())
        prompts = random_prompts()
        true = expected(lms.wrap(copy.deepcopy(model).float(), make_tokenizer()), prompts, "last_token")[-1]
        rounded = expected(half, prompts, "last_token")[-1]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in half.model.modules()]
        got = capture(half, prompts, [INNER[-1]], plan=plan_batches(half, prompts, method=method)).at(INNER[-1])
        assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in half.model.modules()]
        share = 0.35 if not architecture.startswith("gemma") else 0.8  # scales what it embeds, in half precision
        assert np.linalg.norm(got - true) < share * np.linalg.norm(rounded - true)
        assert half.model(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16  # type: ignore[operator]

    def test_the_plan_makes_a_half_precision_reading_repeatable_to_the_bit(self) -> None:
        lm = lms.wrap(make_model("llama").to(torch.bfloat16), make_tokenizer())
        prompts = random_prompts()
        plan = plan_batches(lm, prompts)
        again = BatchPlan.from_dict(plan.to_dict())
        np.testing.assert_array_equal(
            capture(lm, prompts, [2], plan=plan).values, capture(lm, prompts, [2], plan=again).values
        )

    def test_progress_counts_every_prompt(self) -> None:
        lm, prompts = tiny_lm(), random_prompts()
        seen: list[tuple[int, int]] = []
        plan = plan_batches(lm, prompts, max_tokens=24)
        capture(lm, prompts, [0], plan=plan, progress=lambda done, total, _: seen.append((done, total)))
        assert len(seen) == len(plan.rows)
        assert seen[-1] == (len(prompts), len(prompts))
        assert [d for d, _ in seen] == sorted(d for d, _ in seen)

    def test_eager_attention_gives_the_same_as_sdpa(self) -> None:
        prompts = random_prompts()
        lm = tiny_lm()
        want = expected(lm, prompts, "last_token")
        lm.config._attn_implementation = "eager"
        np.testing.assert_allclose(capture(lm, prompts, INNER).values, want, atol=TOLERANCE)


class TestWindowsAndContexts:
    @pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3", "phi3"])
    def test_a_prompt_longer_than_the_sliding_window_falls_back_and_stays_right(self, architecture: str) -> None:
        lm = tiny_lm(architecture, sliding_window=8)
        prompts = random_prompts(longest=40)
        plan = plan_batches(lm, prompts)
        assert plan.method == "padded"
        assert "window of 8" in plan.reason
        got = capture(lm, prompts, INNER, plan=plan)
        np.testing.assert_allclose(got.values, expected(lm, prompts, "last_token"), atol=TOLERANCE)

    def test_the_window_matters_in_that_test(self) -> None:
        wide, narrow = tiny_lm("mistral", sliding_window=64), tiny_lm("mistral", sliding_window=8)
        prompts = random_prompts(longest=40)
        difference = expected(wide, prompts, "last_token") - expected(narrow, prompts, "last_token")
        assert np.abs(difference).max() > 0.1

    def test_a_prompt_as_long_as_the_window_still_fits_a_tree(self) -> None:
        lm = tiny_lm("mistral", sliding_window=12)
        prompts = [list(range(10, 22)), [*range(10, 16), 30]]
        plan = plan_batches(lm, prompts)
        assert plan.method == "tree"
        got = capture(lm, prompts, INNER, plan=plan)
        np.testing.assert_allclose(got.values, expected(lm, prompts, "last_token"), atol=TOLERANCE)

    def test_a_stored_tree_plan_is_refused_where_it_would_be_wrong(self) -> None:
        prompts = random_prompts(longest=40)
        plan = plan_batches(tiny_lm("mistral"), prompts)
        with pytest.raises(InputError, match="sliding window"):
            capture(tiny_lm("mistral", sliding_window=8), prompts, [0], plan=plan)

    def test_rotary_frequencies_that_follow_the_length_are_read_one_by_one(self) -> None:
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        lm = tiny_lm("llama", max_position_embeddings=16, rope_parameters=rope)
        object.__setattr__(lm.config, "original_max_position_embeddings", 16)
        assert plan_batches(lm, [list(range(5, 15)), [5, 6]]).method == "tree"
        lm.config.max_position_embeddings = 64
        plan = plan_batches(lm, [list(range(5, 25)), [5, 6]])
        assert plan.method == "single"

    def test_attention_that_takes_no_mask_falls_back(self) -> None:
        lm = tiny_lm()
        lm.config._attn_implementation = "flash_attention_2"
        plan = plan_batches(lm, random_prompts())
        assert plan.method == "padded"
        assert "flash_attention_2" in plan.reason

    def test_layers_that_are_no_attention_fall_back(self) -> None:
        lm = tiny_lm("gemma2")
        lm.config.layer_types = ["full_attention", "linear_attention"] * 2
        plan = plan_batches(lm, random_prompts())
        assert plan.method == "padded"
        assert "linear_attention" in plan.reason


class TestTheProbe:
    def test_the_probe_passes_a_model_whose_tree_is_right(self, lm: lms.LM) -> None:
        assert plan_batches(lm, random_prompts(), verify=True).method == "tree"

    def test_an_unknown_architecture_that_ignores_positions_is_found_and_read_padded(self) -> None:
        lm = tiny_lm("gpt2")
        lm.config.model_type = "stranger"
        prompts = random_prompts()
        assert plan_batches(lm, prompts).method == "tree"
        want = expected(lm, prompts, "last_token")
        # From here on the model takes positions from the place in the row, as some architectures do.
        original = type(lm.decoder).forward

        class Deaf(type(lm.decoder)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                kwargs["position_ids"] = None
                return original(self, *args, **kwargs)

        lm.decoder.__class__ = Deaf
        plan = plan_batches(lm, prompts)
        assert plan.method == "padded"
        assert "differs from the plain pass" in plan.reason
        np.testing.assert_allclose(capture(lm, prompts, INNER, plan=plan).values, want, atol=TOLERANCE)


class TestTheModelIsLeftAsItWas:
    def make_training(self) -> lms.LM:
        lm = tiny_lm("llama", attention_dropout=0.3)
        lm.model.train()
        lm.blocks[1].eval()  # a mixed setting, as with frozen parts
        enable_checkpointing(lm.model)
        return lm

    def snapshot(self, lm: lms.LM) -> list[object]:
        modules = [
            (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in lm.model.named_modules()
        ]
        checkpointing = [getattr(m, "gradient_checkpointing", None) for m in lm.model.modules()]
        parameters = [(n, p.requires_grad, p.grad is None) for n, p in lm.model.named_parameters()]
        return [modules, checkpointing, parameters, lm.config.to_dict(), lm.tokenizer.padding_side]

    def test_flags_hooks_and_settings_come_back(self) -> None:
        lm = self.make_training()
        before = self.snapshot(lm)
        capture(lm, random_prompts(), [1])
        plan_batches(lm, random_prompts(), verify=True)
        assert self.snapshot(lm) == before

    def test_flags_and_hooks_come_back_after_an_error_inside_the_pass(self) -> None:
        lm = self.make_training()
        before = self.snapshot(lm)

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        handle = lm.blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            capture(lm, random_prompts(), [1])
        handle.remove()
        assert self.snapshot(lm) == before

    def test_dropout_is_off_while_reading_though_the_model_trains(self) -> None:
        prompts = random_prompts()
        quiet = tiny_lm("llama", attention_dropout=0.3)
        np.testing.assert_array_equal(
            capture(self.make_training(), prompts, [2]).values, capture(quiet, prompts, [2]).values
        )

    def test_the_random_state_does_not_move(self) -> None:
        lm = self.make_training()
        torch.manual_seed(3)
        want = torch.rand(3)
        torch.manual_seed(3)
        capture(lm, random_prompts(), [1])
        assert torch.equal(torch.rand(3), want)

    def test_training_after_a_reading_gives_the_gradients_of_training_without(self) -> None:
        ids = torch.tensor([[5, 6, 7, 8]])

        def gradients(read: bool) -> list[torch.Tensor]:
            lm = self.make_training()
            torch.manual_seed(0)
            if read:
                capture(lm, random_prompts(), [1])
            lm.model(input_ids=ids, labels=ids).loss.backward()
            return [p.grad for p in lm.model.parameters() if p.grad is not None]

        with_reading, without = gradients(True), gradients(False)
        assert without
        assert all(torch.equal(a, b) for a, b in zip(with_reading, without, strict=True))

    def test_a_reading_inside_autocast_and_gradients_is_the_plain_one(self) -> None:
        lm, prompts = tiny_lm(), random_prompts()
        want = capture(lm, prompts, [2]).values
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            got = capture(lm, prompts, [2]).values
        np.testing.assert_array_equal(got, want)

    def test_an_accelerator_s_mixed_precision_shell_is_left_out(self) -> None:
        from accelerate import Accelerator

        lm, prompts = tiny_lm(), random_prompts()
        want = capture(lm, prompts, [2]).values
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        live = lms.wrap(accelerator.prepare_model(lm.model), lm.tokenizer)
        got = capture(live, prompts, [2]).values
        np.testing.assert_array_equal(got, want)
        assert live.fingerprint() == lm.fingerprint()


class TestBadInput:
    def test_a_layer_outside_the_model_is_named_with_the_range(self) -> None:
        for layer in (-1, LAYERS):
            with pytest.raises(LayerError, match=rf"layer {layer} .* 0 to {LAYERS - 1}"):
                capture(tiny_lm(), [[5]], [layer])

    def test_a_layer_that_was_not_captured_is_named(self) -> None:
        activations = capture(tiny_lm(), [[5]], [1])
        with pytest.raises(LayerError, match="layer 2 was not captured"):
            activations.at(2)

    def test_no_prompts_no_layers_and_empty_prompts_are_refused(self) -> None:
        lm = tiny_lm()
        with pytest.raises(InputError, match="no prompts"):
            capture(lm, [], [0])
        with pytest.raises(InputError, match="no layers"):
            capture(lm, [[5]], [])
        with pytest.raises(InputError, match="prompt 1 has no tokens"):
            capture(lm, [[5], []], [0])

    def test_a_prompt_beyond_the_context_is_refused_before_it_breaks_the_model(self) -> None:
        lm = tiny_lm("gpt2", n_positions=16)
        with pytest.raises(InputError, match="17 tokens and the model's context is 16"):
            capture(lm, [[5] * 17], [0])

    def test_a_plan_of_other_prompts_is_refused(self) -> None:
        lm = tiny_lm()
        plan = plan_batches(lm, random_prompts(5))
        with pytest.raises(InputError, match="covers 5 prompts and 6 were given"):
            capture(lm, random_prompts(6), [0], plan=plan)
        doubled = BatchPlan("tree", 10, ((0, 0),), "")
        with pytest.raises(InputError, match="batch plan"):
            capture(lm, [[5], [6]], [0], plan=doubled)

    def test_words_that_are_no_method_or_pooling_are_refused(self) -> None:
        lm: Any = tiny_lm()
        bad: Any = "median"
        with pytest.raises(InputError, match="median"):
            capture(lm, [[5]], [0], pooling=bad)
        with pytest.raises(InputError, match="median"):
            plan_batches(lm, [[5]], method=bad)
        with pytest.raises(InputError, match="max_tokens"):
            plan_batches(lm, [[5]], max_tokens=0)

    def test_directions_of_another_width_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"\(2, 31\)"):
            project(tiny_lm(), [[5]], 0, np.zeros((2, WIDTH - 1)))

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_numbers_that_are_none_are_an_error_not_a_reading(self, poison: float) -> None:
        lm = tiny_lm()
        parameter: nn.Parameter = next(lm.blocks[0].parameters())
        parameter.data.view(-1)[0] = poison
        with pytest.raises(NumericalError, match="NaN or infinity"):
            capture(lm, [[5, 6]], [1])
        with pytest.raises(NumericalError, match="NaN or infinity"):
            project(lm, [[5, 6]], 1, np.ones((1, WIDTH)))


def brute_force_cost(prompts: list[list[int]], cost: RowCost, limit: int) -> float:
    """The least cost over all splits of the sorted prompts, by trying every one."""

    def tokens(group: Sequence[Sequence[int]]) -> int:
        return len({tuple(ids[:k]) for ids in group for k in range(1, len(ids) + 1)})

    def price(group: Sequence[Sequence[int]]) -> float:
        n = tokens(group)
        return cost.fixed + cost.linear * n + cost.quadratic * n * n

    ordered, best = sorted(prompts), float("inf")
    for cuts in itertools.product([False, True], repeat=len(prompts) - 1):
        groups, start = [], 0
        for at, cut in enumerate(cuts, start=1):
            if cut:
                groups.append(ordered[start:at])
                start = at
        groups.append(ordered[start:])
        if all(len(g) == 1 or tokens(g) <= limit for g in groups):
            best = min(best, sum(map(price, groups)))
    return best


class TestPlans:
    def random_small(self, seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randint(0, 2) for _ in range(rng.randint(1, 7))] for _ in range(rng.randint(1, 8))]

    @pytest.mark.parametrize("seed", range(40))
    def test_rows_are_the_cheapest_split_of_the_sorted_prompts(self, seed: int) -> None:
        prompts = self.random_small(seed)
        cost, limit = RowCost(1.0, 0.1 * (seed % 3), float(seed % 4)), 12
        rows = tree_rows(prompts, cost=cost, max_tokens=limit)
        sizes = [len({tuple(prompts[i][:k]) for i in row for k in range(1, len(prompts[i]) + 1)}) for row in rows]
        got = sum(cost.fixed + cost.linear * n + cost.quadratic * n * n for n in sizes)
        assert got == pytest.approx(brute_force_cost(prompts, cost, limit))
        assert sorted(itertools.chain(*rows)) == list(range(len(prompts)))

    @pytest.mark.parametrize("seed", range(20))
    def test_a_tree_shows_each_token_its_ancestors_only(self, seed: int) -> None:
        prompts = self.random_small(seed)
        row = list(range(len(prompts)))[::-1]
        tree = lay_tree(prompts, row)
        assert len(tree.ids) == len({tuple(p[:k]) for p in prompts for k in range(1, len(p) + 1)})
        for i, path in zip(row, tree.paths, strict=True):
            assert tree.ids[path].tolist() == prompts[i]
            assert tree.depths[path].tolist() == list(range(len(prompts[i])))
            for depth, place in enumerate(path):
                assert np.flatnonzero(tree.visible[place]).tolist() == sorted(path[: depth + 1].tolist())

    def test_padded_rows_hold_prompts_of_like_length_within_the_limit(self) -> None:
        prompts = [[1] * n for n in (3, 9, 4, 8, 1)]
        rows = padded_rows(prompts, max_tokens=18)
        assert rows == ((1, 3), (2, 0, 4))

    def test_a_prompt_above_the_limit_gets_a_row_of_its_own(self) -> None:
        prompts = [[1] * 9, [2, 3]]
        assert sorted(tree_rows(prompts, cost=RowCost(1, 0, 100), max_tokens=4)) == [(0,), (1,)]
        assert padded_rows(prompts, max_tokens=4) == ((0,), (1,))

    def test_a_plan_depends_on_the_prompts_alone(self) -> None:
        prompts = random_prompts()
        assert plan_batches(tiny_lm(seed=1), prompts) == plan_batches(tiny_lm(seed=2), prompts)

    def test_half_precision_allows_no_longer_rows_since_its_stream_is_float32(self) -> None:
        prompts = [[5 + i // 60, 5 + i % 60, *([7] * 20)] for i in range(400)]
        wide, half = (tiny_lm(dtype=dtype, intermediate_size=4096) for dtype in ("float32", "bfloat16"))
        assert half.dtype == torch.bfloat16
        plans = [plan_batches(lm, prompts) for lm in (wide, half)]
        assert [plan.max_tokens for plan in plans] == [1024, 1024]  # 16 MiB of 4096 numbers of four bytes
        assert len(plans[1].rows) > 4

    def test_the_digest_follows_what_decides_the_arithmetic(self) -> None:
        plan = BatchPlan("tree", 10, ((0, 1),), "one")
        assert plan.digest() == BatchPlan("tree", 20, ((0, 1),), "two").digest()
        assert plan.digest() != BatchPlan("padded", 10, ((0, 1),), "one").digest()
        assert plan.digest() != BatchPlan("tree", 10, ((0,), (1,)), "one").digest()

    def test_a_plan_survives_its_json_form(self) -> None:
        plan = BatchPlan("padded", 64, ((2, 0), (1,)), "why")
        assert BatchPlan.from_dict(plan.to_dict()) == plan

    @pytest.mark.parametrize(
        "change", [{"method": "guess"}, {"rows": "no"}, {"rows": [["a"]]}, {"rows": [3]}, {"max_tokens": None}]
    )
    def test_a_damaged_plan_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ArtifactError, match="batch plan"):
            BatchPlan.from_dict(BatchPlan("tree", 1, ((0,),), "").to_dict() | change)


def test_a_reading_of_the_real_model_is_its_own_hidden_states(real_model_dir: Any) -> None:
    lm = lms.load(real_model_dir)
    questions = ["Is tea good for sleep?", "How do I save money?", "How do I save water at home?"]
    prompts = lm.encode_all([[{"role": "user", "content": q}] for q in questions])
    got: Activations = capture(lm, prompts, [10, 28])
    assert got.plan.method == "tree"
    with torch.no_grad():
        states = [lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in prompts]
    for layer in (10, 28):
        want = np.stack([s[layer + 1][0, -1].numpy() for s in states])
        scale = np.linalg.norm(want, axis=1, keepdims=True)
        np.testing.assert_allclose(got.at(layer) / scale, want / scale, atol=1e-5)
