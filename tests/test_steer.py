"""Steering against hand arithmetic on the model's own hidden states, with and without a key-value cache."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tiltmeter import lm as lms
from tiltmeter import steer, steer_formats
from tiltmeter.artifacts import write_artifact
from tiltmeter.capture import capture, plan_batches
from tiltmeter.errors import ArtifactError, InputError, LayerError, NumericalError, StorageError
from tiltmeter.steer import SteeringVector, apply, apply_rows
from tiny import ARCHITECTURES, LAYERS, WIDTH, random_prompts, tiny_lm

LAYER = 1
CHATS = [
    [{"role": "user", "content": "how do i grow tea ?"}],
    [{"role": "system", "content": "you are bad"}, {"role": "user", "content": "hello"}],
    [{"role": "user", "content": "is it safe to drink tea for sleep and home and family ?"}],
]


def make_vector(k: int = 1, *, seed: int = 0, strength: float = 1.0, norm: float = 6.0) -> SteeringVector:
    return SteeringVector(LAYER, np.random.default_rng(seed).normal(size=(k, WIDTH)), strength, norm)


def block_output(lm: lms.LM, ids: list[int], layer: int = LAYER) -> np.ndarray[Any, Any]:
    """(tokens, hidden) by the model's own means, for one prompt without cache."""
    with torch.no_grad():
        states = lm.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return np.asarray(states[layer + 1][0].numpy())


def hook_count(lm: lms.LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def rollout(lm: lms.LM, ids: list[int], steps: int, *, cache: bool) -> list[int]:
    """Greedy tokens by the library's own generation."""
    out = lm.model.generate(  # type: ignore[operator]
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=steps,
        do_sample=False,
        use_cache=cache,
        eos_token_id=None,
        pad_token_id=1,
    )
    return [int(t) for t in out[0, len(ids) :]]


class TestArithmetic:
    def test_add_moves_every_token_by_strength_times_norm_along_the_unit_vector(self) -> None:
        lm, vector, ids = tiny_lm(), make_vector(strength=0.5), [5, 6, 7, 8]
        plain = block_output(lm, ids)
        unit = np.random.default_rng(0).normal(size=WIDTH)
        unit /= np.linalg.norm(unit)
        got = capture_all(lm, ids, vector)
        np.testing.assert_allclose(got - plain, np.tile(0.5 * 6.0 * unit, (4, 1)), atol=1e-5)

    def test_ablate_leaves_nothing_along_any_direction_and_the_rest_untouched(self) -> None:
        lm, vector, ids = tiny_lm(), make_vector(3), [5, 6, 7, 8]
        raw = np.random.default_rng(0).normal(size=(3, WIDTH))
        inside, _ = np.linalg.qr(raw.T)
        plain = block_output(lm, ids)
        got = capture_all(lm, ids, vector, mode="ablate")
        np.testing.assert_allclose(got, plain - plain @ inside @ inside.T, atol=1e-5)

    def test_clamp_sets_the_coordinate_of_every_direction_though_they_overlap(self) -> None:
        lm, vector, ids = tiny_lm(), make_vector(3, strength=-0.25), [5, 6, 7, 8]
        raw = np.random.default_rng(0).normal(size=(3, WIDTH))
        units = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        plain = block_output(lm, ids)
        got = capture_all(lm, ids, vector, mode="clamp")
        np.testing.assert_allclose(got @ units.T, np.full((4, 3), -0.25 * 6.0), atol=1e-4)
        inside, _ = np.linalg.qr(raw.T)
        moved = got - plain
        np.testing.assert_allclose(moved, moved @ inside @ inside.T, atol=1e-4)

    def test_a_strength_given_at_use_replaces_the_vector_s_own(self) -> None:
        lm, ids = tiny_lm(), [5, 6]
        strong = capture_all(lm, ids, make_vector(strength=2.0))
        got = capture_all(lm, ids, make_vector(strength=9.0), strength=2.0)
        np.testing.assert_allclose(got, strong, atol=1e-6)

    def test_no_strength_is_no_change(self) -> None:
        lm, ids = tiny_lm(), [5, 6, 7]
        np.testing.assert_array_equal(capture_all(lm, ids, make_vector(strength=0.0)), block_output(lm, ids))

    def test_half_precision_stays_half_precision(self) -> None:
        lm = tiny_lm()
        lm.model.to(torch.bfloat16)
        with apply(lm, make_vector(), positions=1), torch.no_grad():
            out = lm.model(torch.tensor([[5, 6, 7]])).logits
        assert out.dtype == torch.bfloat16

    def test_reading_under_steering_sees_the_steered_output(self) -> None:
        lm, vector, prompts = tiny_lm(), make_vector(), random_prompts()
        plain = capture(lm, prompts, [LAYER - 1, LAYER])
        with apply(lm, vector):
            steered = capture(lm, prompts, [LAYER - 1, LAYER])
        np.testing.assert_array_equal(steered.at(LAYER - 1), plain.at(LAYER - 1))
        np.testing.assert_allclose(
            steered.at(LAYER) - plain.at(LAYER), np.tile(vector.added, (len(prompts), 1)), atol=1e-5
        )


def capture_all(lm: lms.LM, ids: list[int], vector: SteeringVector, **options: Any) -> np.ndarray[Any, Any]:
    with apply(lm, vector, **options):
        return block_output(lm, ids)


class TestPositions:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("start", [0, 2, 5, 7])
    def test_generation_steered_from_position_k_is_the_same_with_the_cache_on_and_off(
        self, architecture: str, start: int
    ) -> None:
        lm, ids = tiny_lm(architecture), [5, 9, 30, 12, 8]
        with apply(lm, make_vector(), positions=start):
            on, off = rollout(lm, ids, 10, cache=True), rollout(lm, ids, 10, cache=False)
        assert on == off
        if start <= 5:
            assert on != rollout(lm, ids, 10, cache=True)

    def test_tokens_before_position_k_are_untouched_and_those_from_it_on_moved(self) -> None:
        lm, vector, ids = tiny_lm(), make_vector(), [5, 6, 7, 8]
        moved = capture_all(lm, ids, vector, positions=2) - block_output(lm, ids)
        np.testing.assert_array_equal(moved[:2], 0)
        np.testing.assert_allclose(moved[2:], np.tile(vector.added, (2, 1)), atol=1e-5)

    @pytest.mark.parametrize("with_ids", [True, False])
    def test_under_left_padding_a_position_counts_from_the_first_real_token(self, with_ids: bool) -> None:
        lm, vector = tiny_lm(), make_vector()
        tokens = torch.tensor([[1, 1, 1, 5, 6, 7], [5, 6, 7, 8, 9, 10]])
        mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if with_ids else {}
        seen: list[torch.Tensor] = []

        def run() -> torch.Tensor:
            handle = lm.blocks[LAYER].register_forward_hook(lambda m, a, out: seen.append(out))
            with torch.no_grad():
                lm.model(tokens, attention_mask=mask, **extra)
            handle.remove()
            return seen[-1]

        plain = run()
        with apply(lm, vector, positions=2):
            moved = ((run() - plain).abs() > 1e-3).any(-1)
        real = mask.bool()
        assert (moved & real).tolist() == [
            [False, False, False, False, False, True],
            [False, False, True, True, True, True],
        ]

    def test_a_tree_reading_steers_by_the_position_in_each_prompt(self) -> None:
        lm, vector, prompts = tiny_lm(), make_vector(), random_prompts()
        with apply(lm, vector, positions=4):
            tree = capture(lm, prompts, [2], plan=plan_batches(lm, prompts, method="tree"))
            single = capture(lm, prompts, [2], plan=plan_batches(lm, prompts, method="single"))
        np.testing.assert_allclose(tree.values, single.values, atol=1e-4)
        assert np.abs(tree.values - capture(lm, prompts, [2]).values).max() > 0.1

    def test_prompt_steers_the_prompt_and_nothing_that_is_generated(self) -> None:
        lm, vector, ids = tiny_lm(), make_vector(), [5, 9, 30, 12, 8]
        with apply(lm, vector, positions="prompt"):
            bare = rollout(lm, ids, 10, cache=True)
        with apply(lm, vector, positions="prompt", prompt_lengths=[5]):
            on, off = rollout(lm, ids, 10, cache=True), rollout(lm, ids, 10, cache=False)
        with apply(lm, vector):
            everything = rollout(lm, ids, 10, cache=True)
        assert bare == on == off
        assert bare != everything
        assert bare != rollout(lm, ids, 10, cache=True)

    def test_prompt_lengths_follow_the_conversations_through_padding_and_batches(self) -> None:
        lm, vector = tiny_lm(), make_vector()
        lengths = [len(ids) for ids in lm.encode_all(CHATS)]
        options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0}
        with apply(lm, vector, positions="prompt"):
            want = [lm.generate([chat], **options)[0] for chat in CHATS]
        with apply(lm, vector, positions="prompt", prompt_lengths=lengths):
            assert lm.generate(CHATS, **options) == want
            assert lm.generate(CHATS, batch_size=1, **options) == want
        assert want != lm.generate(CHATS, **options)

    def test_prompt_lengths_of_another_batch_are_refused(self) -> None:
        lm = tiny_lm()
        with (
            apply(lm, make_vector(), positions="prompt", prompt_lengths=[3, 4]),
            pytest.raises(InputError, match="2 rows and the pass has 1"),
        ):
            rollout(lm, [5, 6, 7], 2, cache=True)


class TestGenerate:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_a_batch_of_unequal_prompts_is_steered_as_each_alone(self, architecture: str) -> None:
        lm, vector = tiny_lm(architecture), make_vector()
        options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0}
        with apply(lm, vector, positions=3):
            together = lm.generate(CHATS, **options)
            alone = [lm.generate([chat], **options)[0] for chat in CHATS]
        assert together == alone
        assert together != lm.generate(CHATS, **options)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_one_vector_per_row_is_that_vector_on_each_conversation(self, architecture: str) -> None:
        lm = tiny_lm(architecture)
        table = np.random.default_rng(1).normal(size=(3, WIDTH)) * 1.5
        options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0}
        want = []
        for row, chat in zip(table, CHATS, strict=True):
            with apply(lm, SteeringVector(LAYER, row, 1.0, float(np.linalg.norm(row)))):
                want += lm.generate([chat], **options)
        with apply_rows(lm, LAYER, table):
            assert lm.generate(CHATS, **options) == want
            assert lm.generate(CHATS, batch_size=2, **options) == want

    def test_rows_stay_with_their_conversation_when_others_have_ended(self) -> None:
        lm = tiny_lm()
        chats = [[{"role": "user", "content": "hello " * n}] for n in (1, 3, 5, 2, 4, 6, 1, 2)]
        # Row 0 to 5 are pushed to an early end, so that the batch shrinks while rows 6 and 7 go on.
        table = np.random.default_rng(3).normal(size=(8, WIDTH)) * 2
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
        lm.__dict__["stop_ids"] = frozenset(range(4, 45))
        with apply_rows(lm, LAYER, table):
            together = lm.generate(chats, **options)
            alone = []
        for i, chat in enumerate(chats):
            with apply_rows(lm, LAYER, table[i : i + 1]):
                alone += lm.generate([chat], **options)
        assert together == alone
        assert len({len(a.split()) for a in alone}) > 2

    def test_another_number_of_rows_than_conversations_is_refused(self) -> None:
        lm = tiny_lm()
        with (
            apply_rows(lm, LAYER, np.zeros((2, WIDTH))),
            pytest.raises(InputError, match="2 rows and the pass has 3"),
        ):
            lm.generate(CHATS, max_new_tokens=2)


class TestNothingStaysBehind:
    @pytest.mark.parametrize("positions", ["all", "prompt", 2])
    def test_no_hook_is_left_after_an_exception_inside(self, positions: Any) -> None:
        lm = tiny_lm()
        before = hook_count(lm)
        with pytest.raises(ZeroDivisionError), apply(lm, make_vector(), positions=positions):
            raise ZeroDivisionError(f"with {hook_count(lm)} hooks")
        with pytest.raises(ZeroDivisionError), apply_rows(lm, LAYER, np.zeros((1, WIDTH))):
            raise ZeroDivisionError(f"with {hook_count(lm)} hooks")
        assert hook_count(lm) == before

    @pytest.mark.parametrize("layer", [-1, LAYERS])
    def test_a_bad_layer_leaves_none_either(self, layer: int) -> None:
        lm = tiny_lm()
        vector = SteeringVector(layer, np.ones(WIDTH), 1.0, 1.0)
        with pytest.raises(LayerError, match=f"layer {layer}"), apply(lm, vector, positions=1):
            pass
        with pytest.raises(LayerError, match=f"layer {layer}"), apply_rows(lm, layer, np.ones((1, WIDTH))):
            pass
        assert hook_count(lm) == 0

    def test_after_the_context_the_model_writes_as_before(self) -> None:
        lm = tiny_lm()
        before = lm.generate(CHATS, max_new_tokens=6, temperature=0)
        with apply(lm, make_vector()):
            lm.generate(CHATS, max_new_tokens=6, temperature=0)
        assert lm.generate(CHATS, max_new_tokens=6, temperature=0) == before

    def test_two_vectors_can_steer_at_once(self) -> None:
        lm, ids = tiny_lm(), [5, 6, 7]
        first, second = make_vector(seed=1), make_vector(seed=2)
        with apply(lm, first), apply(lm, second):
            got = block_output(lm, ids)
        np.testing.assert_allclose(got - block_output(lm, ids), np.tile(first.added + second.added, (3, 1)), atol=1e-5)


class TestBadInput:
    def test_a_vector_of_another_width_is_refused(self) -> None:
        vector = SteeringVector(LAYER, np.ones(WIDTH + 1), 1.0, 1.0)
        with pytest.raises(InputError, match=f"width {WIDTH + 1}"), apply(tiny_lm(), vector):
            pass
        with pytest.raises(InputError, match=f"width {WIDTH + 1}"), apply_rows(tiny_lm(), 0, np.ones((1, WIDTH + 1))):
            pass

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"mode": "push"}, "push"),
            ({"positions": "answer"}, "answer"),
            ({"positions": -1}, "-1"),
            ({"positions": True}, "True"),
        ],
    )
    def test_options_that_do_not_exist_are_named(self, options: dict[str, Any], word: str) -> None:
        with pytest.raises(InputError, match=word), apply(tiny_lm(), make_vector(), **options):
            pass

    def test_what_is_no_number_is_refused(self) -> None:
        with pytest.raises(NumericalError):
            SteeringVector(0, np.array([np.nan, 1.0]), 1.0, 1.0)
        with pytest.raises(NumericalError):
            SteeringVector(0, np.ones(3), float("inf"), 1.0)
        with pytest.raises(NumericalError), apply(tiny_lm(), make_vector(), strength=float("nan")):
            pass
        with pytest.raises(NumericalError), apply_rows(tiny_lm(), 0, np.full((1, WIDTH), np.nan)):
            pass

    @pytest.mark.parametrize(("vectors", "norm"), [(np.zeros(4), 1.0), (np.ones(4), 0.0), (np.ones(4), -1.0)])
    def test_a_direction_without_length_or_norm_is_refused(self, vectors: Any, norm: float) -> None:
        with pytest.raises(InputError):
            SteeringVector(0, vectors, 1.0, norm)

    def test_directions_of_a_wrong_shape_are_refused(self) -> None:
        with pytest.raises(InputError, match="shape"):
            SteeringVector(0, np.ones((2, 2, 2)), 1.0, 1.0)
        with pytest.raises(InputError, match="shape"), apply_rows(tiny_lm(), 0, np.ones(WIDTH)):
            pass


class TestOurFiles:
    def test_a_saved_vector_comes_back_whole(self, tmp_path: Path) -> None:
        vector = SteeringVector(3, np.random.default_rng(0).normal(size=(2, 8)), -0.7, 5.5, {"trait": "honesty"})
        got = steer.load(steer.save(vector, tmp_path / "deep" / "v.safetensors"))
        assert (got.layer, got.strength, got.norm, got.meta) == (3, -0.7, 5.5, {"trait": "honesty"})
        np.testing.assert_array_equal(got.vectors, vector.vectors)

    def test_missing_truncated_and_foreign_files_are_told_apart(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="there is no steering_vector"):
            steer.load(tmp_path / "none.safetensors")
        path = steer.save(make_vector(), tmp_path / "v.safetensors")
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(ArtifactError, match="truncated"):
            steer.load(path)
        save_file({"vectors": np.ones((1, 4), dtype=np.float32)}, tmp_path / "plain.safetensors")
        with pytest.raises(ArtifactError, match="not written by tiltmeter"):
            steer.load(tmp_path / "plain.safetensors")
        write_artifact(tmp_path / "empty.safetensors", "steering_vector", 1, {"after_block": 1}, {})
        with pytest.raises(ArtifactError, match="no sound steering vector"):
            steer.load(tmp_path / "empty.safetensors")

    @pytest.mark.parametrize(
        ("key", "value", "word"), [("format", 99, "of format 99"), ("kind", "basis", "holds a basis")]
    )
    def test_another_kind_or_version_is_refused(self, tmp_path: Path, key: str, value: Any, word: str) -> None:
        header = {"kind": "steering_vector", "format": 1, "after_block": 1, "strength": 1, "norm": 1, "meta": {}}
        path = tmp_path / "v.safetensors"
        save_file(
            {"vectors": np.ones((1, 4), dtype=np.float32)},
            path,
            metadata={"tiltmeter": json.dumps(header | {key: value})},
        )
        with pytest.raises(ArtifactError, match=word):
            steer.load(path)

    def test_a_place_that_cannot_be_written_is_a_storage_error_and_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StorageError):
            steer.save(make_vector(), tmp_path / "file" / "v.safetensors")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "v.safetensors").mkdir()
        with pytest.raises(StorageError):
            steer.save(make_vector(), tmp_path / "folder" / "v.safetensors")
        assert [p.name for p in (tmp_path / "folder").iterdir()] == ["v.safetensors"]


def write_control_vector(path: Path, rows: dict[str, np.ndarray[Any, Any]], architecture: str) -> None:
    """A GGUF file byte by byte, from the format's own description: version 3, one text key, float32
    tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = {"general.architecture": architecture, "controlvector.model_hint": "llama"}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(keys))
    for key, value in keys.items():
        head += text(key) + struct.pack("<I", 8) + text(value)
    offset, data = 0, b""
    for name, row in rows.items():
        head += text(name) + struct.pack("<IQIQ", 1, row.size, 0, offset)
        block = row.astype("<f4").tobytes()
        block += b"\0" * (-len(block) % 32)
        data += block
        offset += len(block)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)


class TestOtherTools:
    def test_a_control_vector_file_is_read_as_what_it_adds_to_each_block(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        rows = {f"direction.{n}": np.random.default_rng(n).normal(size=16) for n in (7, 2)}
        write_control_vector(tmp_path / "v.gguf", rows, "controlvector")
        got = steer_formats.read_gguf(tmp_path / "v.gguf")
        assert [v.layer for v in got] == [2, 7]
        assert got[0].meta["model_hint"] == "llama"
        for vector in got:
            np.testing.assert_allclose(vector.added, rows[f"direction.{vector.layer}"], rtol=1e-5)

    def test_a_written_control_vector_comes_back_and_adds_the_same(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        vectors = [SteeringVector(n, np.random.default_rng(n).normal(size=8), 0.5, 4.0) for n in (3, 1)]
        got = steer_formats.read_gguf(steer_formats.write_gguf(vectors, tmp_path / "v.gguf", architecture="qwen2"))
        assert [v.layer for v in got] == [1, 3]
        for vector, source in zip(got, sorted(vectors, key=lambda v: v.layer), strict=True):
            np.testing.assert_allclose(vector.added, 0.5 * 4.0 * source.vectors[0], rtol=1e-5)

    def test_block_zero_and_two_vectors_for_a_layer_have_no_place_in_that_file(self, tmp_path: Path) -> None:
        zero, one = SteeringVector(0, np.ones(4), 1.0, 1.0), SteeringVector(1, np.ones(4), 1.0, 1.0)
        for vectors in ([zero], [one, one], []):
            with pytest.raises(InputError, match="one vector per layer"):
                steer_formats.write_gguf(vectors, tmp_path / "v.gguf", architecture="llama")

    def test_files_that_are_no_control_vector_are_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        path = tmp_path / "v.gguf"
        with pytest.raises(ArtifactError, match="does not exist"):
            steer_formats.read_gguf(path)
        path.write_bytes(b"GGUFno")
        with pytest.raises(ArtifactError, match="truncated or no GGUF"):
            steer_formats.read_gguf(path)
        write_control_vector(path, {"direction.1": np.ones(4)}, "llama")
        with pytest.raises(ArtifactError, match="holds a 'llama'"):
            steer_formats.read_gguf(path)
        write_control_vector(path, {"other.1": np.ones(4)}, "controlvector")
        with pytest.raises(ArtifactError, match="no direction"):
            steer_formats.read_gguf(path)
        write_control_vector(path, {"direction.1": np.full(4, np.nan)}, "controlvector")
        with pytest.raises(ArtifactError, match="layer 1"):
            steer_formats.read_gguf(path)

    def test_packed_directions_are_unpacked(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        row = np.random.default_rng(0).normal(size=160).astype(np.float32)
        kinds = gguf.GGMLQuantizationType
        for kind, within in ((kinds.F16, 1e-3), (kinds.BF16, 1e-2), (kinds.Q8_0, 2e-2), (kinds.Q4_0, 0.4)):
            writer = gguf.GGUFWriter(str(tmp_path / "v.gguf"), "controlvector")
            packed = row.astype(np.float16) if kind == kinds.F16 else gguf.quants.quantize(row[None], kind)
            writer.add_tensor("direction.3", packed.reshape(-1), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            (got,) = steer_formats.read_gguf(tmp_path / "v.gguf")
            assert got.vectors.shape == (1, 160)
            np.testing.assert_allclose(got.added, row, atol=within)

    def test_a_layer_of_zeros_steers_nothing_and_is_named_and_a_file_of_zeros_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        rows = {f"direction.{n}": np.full(8, float(n != 2)) for n in (1, 2, 3)}
        write_control_vector(tmp_path / "v.gguf", rows, "controlvector")
        got = steer_formats.read_gguf(tmp_path / "v.gguf")
        assert [v.layer for v in got] == [1, 3]
        assert all(v.meta["zero_layers"] == [2] for v in got)
        write_control_vector(tmp_path / "v.gguf", {"direction.2": np.zeros(8)}, "controlvector")
        with pytest.raises(ArtifactError, match="all zeros"):
            steer_formats.read_gguf(tmp_path / "v.gguf")

    def test_a_torch_file_is_refused_with_the_command_that_converts_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        torch.save(torch.nn.Parameter(rows.to(torch.bfloat16)), "v.pt")  # saved with requires_grad
        with pytest.raises(ArtifactError, match="never read; if you trust it, convert") as refusal:
            steer_formats.read_pt("v.pt")
        command = str(refusal.value).split('python -c "')[1].removesuffix('"')
        exec(command, {})
        by_state = steer_formats.read_pt("v.safetensors")
        assert [v.layer for v in by_state] == [0, 1, 2]
        np.testing.assert_allclose(by_state[1].added, rows[2].to(torch.bfloat16).float().numpy(), rtol=1e-5)
        by_block = steer_formats.read_pt("v.safetensors", first_row="block 0")
        assert [v.layer for v in by_block] == [0, 1, 2, 3]
        torch.save({5: torch.ones(4), 2: torch.full((4,), 3.0)}, "v.pt")
        exec(command, {})
        got = steer_formats.read_pt("v.safetensors", first_row="block 0")
        assert [(v.layer, round(v.norm, 4)) for v in got] == [(2, 6.0), (5, 2.0)]

    def test_a_torch_file_is_never_unpickled_whatever_it_is_called(self, tmp_path: Path) -> None:
        trap = tmp_path / "sprung"

        class Trap:
            def __reduce__(self) -> Any:
                return (Path.write_text, (trap, "ran"))

        for name in ("v.pt", "v.safetensors"):
            for old in (True, False):
                torch.save({"a": Trap()}, tmp_path / name, _use_new_zipfile_serialization=not old)
                with pytest.raises(ArtifactError, match="never read"):
                    steer_formats.read_pt(tmp_path / name)
        assert not trap.exists()
        with pytest.raises(ArtifactError, match=r"none\.pt"):
            steer_formats.read_pt(tmp_path / "none.pt")
        save_file({"a": np.ones(4, np.float32)}, tmp_path / "v.safetensors")
        with pytest.raises(ArtifactError, match="by layer number"):
            steer_formats.read_pt(tmp_path / "v.safetensors")
        with pytest.raises(InputError, match="first_row"):
            steer_formats.read_pt(tmp_path / "v.safetensors", first_row="bottom")

    def test_a_steering_lite_file_adds_its_coefficient_times_its_vector(self, tmp_path: Path) -> None:
        v = np.random.default_rng(0).normal(size=8).astype(np.float32)
        settings = {"method": "mean_diff", "coeff": -2.5, "layers": [6]}
        save_file({"layer6.v": v}, tmp_path / "v.safetensors", metadata={"cfg": json.dumps(settings)})
        (got,) = steer_formats.read_steering_lite(tmp_path / "v.safetensors")
        assert (got.layer, got.strength) == (6, -2.5)
        np.testing.assert_allclose(got.added, -2.5 * v, rtol=1e-5)

    @pytest.mark.parametrize(
        ("metadata", "word"),
        [(None, "no steering-lite settings"), ({"cfg": '{"method": "spherical", "coeff": 1}'}, "spherical")],
    )
    def test_files_of_other_methods_are_refused(self, tmp_path: Path, metadata: Any, word: str) -> None:
        save_file({"layer6.v": np.ones(4, dtype=np.float32)}, tmp_path / "v.safetensors", metadata=metadata)
        with pytest.raises(ArtifactError, match=word):
            steer_formats.read_steering_lite(tmp_path / "v.safetensors")
