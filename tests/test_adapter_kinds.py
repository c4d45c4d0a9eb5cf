"""Every kind of adapter that PEFT offers, untrained and trained: read as PEFT computes it, or refused by name; and the
base keeps its bytes.

What is expected comes from the live model that was trained: its own pass, one prompt per row, and its own generation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel

from adapter_recipes import KINDS, RECIPES, Made, activations, base_model, build, make, offered_kinds, train
from monitoring import detector_for, projections_by_hand, tiny_basis, trainer
from tiltmeter import lm as lms
from tiltmeter.adapters import Seat, base_parameters, conduct
from tiltmeter.capture import capture, plan_batches, read_below
from tiltmeter.detector import State
from tiltmeter.errors import AdapterError, InactiveAdapter, InputError
from tiltmeter.lm import LM, adapter_state, attach, wrap
from tiltmeter.scan import scan
from tiltmeter.vectors import answer_log_likelihoods
from tiltmeter.watch import TiltmeterCallback
from tiny import make_model, make_tokenizer, put_adapter, random_prompts, tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of FRoD's own forward pass
PROMPTS = [*random_prompts(), [9, 20, 21, 30], [9, 20, 21, 30, 31, 4], [9, 6, 5, 20, 21], [4, 5, 6]]
BLOCKS = (0, 1, 2)
READ = sorted(name for name, recipe in RECIPES.items() if not recipe.words)
REFUSED = sorted(name for name, recipe in RECIPES.items() if recipe.words)
CHATS = [[{"role": "user", "content": text}] for text in ("how do i grow tea ?", "hello", "tea is good for sleep and")]


@dataclass(frozen=True)
class Shelf:
    """Adapters that are made once."""

    folder: Path

    @cache  # noqa: B019  (lives as long as the session's shelf)
    def made(self, name: str) -> Made:
        return make(RECIPES[name], self.folder / name.replace(" ", "_"), PROMPTS)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("adapters"))


def plain(name: str) -> LM:
    return wrap(base_model(RECIPES[name]), make_tokenizer(), name="tiny")


def bytes_of(model: torch.nn.Module) -> str:
    """Of all parameters and buffers, with their names and addresses."""
    digest = hashlib.sha256()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{key}{tensor.data_ptr()}{tensor.requires_grad}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def effect(name: str, made: Made, what: str) -> float:
    """How far the live model's activations lie from the base's, by PEFT's own pass; relative."""
    if what == "fresh" and RECIPES[name].kind == "TRAINABLE_TOKENS":
        return 0.0
    before = activations(base_model(RECIPES[name]), PROMPTS)
    return float((made.activations[what] - before).abs().max() / before.abs().max())


def test_every_kind_that_peft_offers_is_made_here() -> None:
    assert offered_kinds() == set(KINDS)
    assert all(KINDS[name].kind == name for name in KINDS)


@pytest.mark.parametrize("name", READ)
def test_a_trained_adapter_reads_as_peft_computes_it_and_leaves_the_base_alone(shelf: Shelf, name: str) -> None:
    made, lm = shelf.made(name), plain(name)
    before, numbers = bytes_of(lm.model), capture(lm, PROMPTS, BLOCKS).values
    tuned = attach(lm, made.trained)
    scale = float(made.activations["trained"].abs().max())
    got = capture(tuned, PROMPTS, BLOCKS).values
    np.testing.assert_allclose(got, made.activations["trained"].numpy(), atol=3e-6 * scale)
    assert adapter_state(tuned) == "active"
    assert tuned.fingerprint() == lm.fingerprint()
    with tuned.base() as base:
        np.testing.assert_array_equal(capture(base, PROMPTS, BLOCKS).values, numbers)
    assert bytes_of(lm.model) == before
    tuned.generate(CHATS[:1], max_new_tokens=2, temperature=0)
    del tuned
    assert bytes_of(lm.model) == before


@pytest.mark.parametrize("name", READ)
def test_an_untrained_adapter_is_inactive_unless_it_begins_with_an_effect(shelf: Shelf, name: str) -> None:
    made, lm = shelf.made(name), plain(name)
    before = bytes_of(lm.model)
    if effect(name, made, "fresh") > 3e-5:
        scale = float(made.activations["fresh"].abs().max())
        got = capture(attach(lm, made.fresh), PROMPTS, BLOCKS).values
        np.testing.assert_allclose(got, made.activations["fresh"].numpy(), atol=3e-6 * scale)
    else:
        with pytest.raises(InactiveAdapter, match="the same with it as without"):
            attach(lm, made.fresh)
    assert bytes_of(lm.model) == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_and_leaves_the_base_alone(shelf: Shelf, name: str) -> None:
    made, lm = shelf.made(name), plain(name)
    before = bytes_of(lm.model)
    for folder in (made.fresh, made.trained):
        with pytest.raises(AdapterError, match=RECIPES[name].words) as caught:
            attach(lm, folder)
        assert "\n" not in str(caught.value)
    assert bytes_of(lm.model) == before


def test_an_invocation_token_that_the_model_lacks_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    name = "LoRA, activated"
    folder = tmp_path / "adapter"
    shutil.copytree(shelf.made(name).trained, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    size = plain(name).config.vocab_size
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": [20, size]}))
    with pytest.raises(AdapterError, match=f"invocation token {size} is none of {size}"):
        attach(plain(name), folder)


def test_the_same_adapter_reads_the_same_whatever_was_on_the_base_before(shelf: Shelf) -> None:
    lm = plain("LORA")
    alone = capture(attach(lm, shelf.made("LORA").trained), PROMPTS, BLOCKS).values
    seat = Seat(lm)
    for name in ("LoRA, PiSSA", "LoRA, OLoRA", "LoRA, KaSA", "LoRA, embeddings", "LoRA, enlarged vocabulary"):
        seat.put(shelf.made(name).trained)
        with pytest.raises(AdapterError):
            seat.put(shelf.made("POLY").trained)
        got = capture(seat.put(shelf.made("LORA").trained), PROMPTS, BLOCKS).values
        np.testing.assert_array_equal(got, alone)


def test_a_seat_never_writes_into_base_rows_that_an_adapter_shares(shelf: Shelf, tmp_path: Path) -> None:
    lm = plain("LoRA, all biases")
    before = bytes_of(lm.model)
    seat = Seat(lm)
    for what in ("trained", "fresh", "trained"):
        made = shelf.made("LoRA, all biases")
        try:
            seat.put(getattr(made, what))
        except InactiveAdapter:
            assert what == "fresh"
        assert bytes_of(lm.model) == before


def test_copies_that_came_out_as_they_were_are_given_back(shelf: Shelf) -> None:
    lm = plain("LoRA, PiSSA")
    tuned = attach(lm, shelf.made("LoRA, PiSSA").trained)
    own = {name for (name, p), (_, q) in zip(base_parameters(tuned.model), base_parameters(lm.model), strict=True)
           if p.data_ptr() != q.data_ptr()}  # fmt: skip
    assert own == {n for n, _ in lm.model.named_parameters() if "q_proj" in n or "v_proj" in n}


def test_base_rows_of_another_model_are_refused(shelf: Shelf) -> None:
    made = shelf.made("LoRA, embeddings")
    other = wrap(make_model("llama", seed=1), make_tokenizer(), name="other")
    with pytest.raises(AdapterError, match=r"base weights \('model.embed_tokens.weight'\) that are not this model's"):
        attach(other, made.trained)


def test_several_adapters_act_together(shelf: Shelf) -> None:
    lm = plain("LORA")
    folders = [shelf.made(name).trained for name in ("LORA", "LoRA, some blocks")]
    tuned = attach(lm, folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want: Any = PeftModel.from_pretrained(base_model(RECIPES["LORA"]), str(folders[0]))
        want.load_adapter(str(folders[1]), adapter_name="second")
        want.base_model.set_adapter(["default", "second"])
    np.testing.assert_allclose(
        capture(tuned, PROMPTS, BLOCKS).values, activations(want.eval(), PROMPTS).numpy(), atol=1e-4
    )
    assert tuned.adapter == " + ".join(map(str, folders))
    with pytest.raises(AdapterError, match="does not fit"):
        attach(lm, [folders[0], shelf.made("VERA").trained])
    with pytest.raises(AdapterError, match="no adapter"):
        attach(lm, [])


class TestRows:
    """Adapters that act by what stands where in the row."""

    @pytest.mark.parametrize("name", ["LORA", "LILY", "LoRA, activated by what opens every answer", "LoRA, PiSSA"])
    def test_answers_are_those_of_peft_s_own_generation(self, shelf: Shelf, name: str) -> None:
        made = shelf.made(name)
        tuned = attach(plain(name), made.trained)
        want = []
        for chat in CHATS:
            ids = torch.tensor([tuned.encode(chat)])
            out = made.live.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                eos_token_id=sorted(tuned.stop_ids),
            )  # fmt: skip
            want.append(tuned.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        assert tuned.generate(CHATS, max_new_tokens=12, temperature=0) == want
        assert want != tiny_lm().generate(CHATS, max_new_tokens=12, temperature=0)

    @pytest.mark.parametrize("name", ["LILY", "LoRA, activated by what opens every answer"])
    def test_likelihoods_are_those_of_one_row_alone(self, shelf: Shelf, name: str) -> None:
        tuned = attach(plain(name), shelf.made(name).trained)
        chats = [[*chat, {"role": "assistant", "content": "yes , more tea"}] for chat in CHATS]
        together = answer_log_likelihoods(tuned, chats, total=True)
        want = []
        for ids, start in (tuned.encode_answer(chat) for chat in chats):
            with torch.no_grad():
                logits = shelf.made(name).live(input_ids=torch.tensor([ids])).logits[0]
            each = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            want.append(float(each[start - 1 :].sum()))
        np.testing.assert_allclose(together, want, rtol=1e-4)

    def test_nothing_is_kept_of_their_rows(self, shelf: Shelf) -> None:
        tuned = attach(plain("LILY"), shelf.made("LILY").trained)
        with pytest.raises(InputError, match="what stands where"):
            read_below(tuned, PROMPTS, 2, plan=plan_batches(tuned, PROMPTS))

    def test_a_kind_that_is_not_known_is_compared_and_shares_rows_where_it_may(self) -> None:
        model = put_adapter(make_model("llama"), _OfTheFuture(r=2, target_modules=["q_proj"], init_lora_weights=False))
        lm = wrap(model.eval(), make_tokenizer())
        assert conduct(model) == "unknown"
        np.testing.assert_allclose(capture(lm, PROMPTS, BLOCKS).values, activations(model, PROMPTS).numpy(), atol=1e-4)
        assert lm.generate(CHATS, max_new_tokens=6, temperature=0)

    def test_a_kind_that_is_not_known_and_mixes_rows_is_read_row_by_row(self) -> None:
        model = put_adapter(make_model("llama"), _OfTheFuture(r=2, target_modules=["q_proj"], init_lora_weights=False))
        _disturb(model, lambda x: 0.5 * x.mean(dim=(0, 1), keepdim=True))
        lm = wrap(model.eval(), make_tokenizer())
        np.testing.assert_allclose(capture(lm, PROMPTS, BLOCKS).values, activations(model, PROMPTS).numpy(), atol=1e-5)

    def test_a_kind_that_is_not_known_and_draws_at_random_is_refused(self) -> None:
        model = put_adapter(make_model("llama"), _OfTheFuture(r=2, target_modules=["q_proj"]))
        draw = torch.Generator().manual_seed(0)
        _disturb(model, lambda x: 2 * torch.randn(x.shape, generator=draw))
        with pytest.raises(AdapterError, match="two readings of the same prompts differ"):
            capture(wrap(model.eval(), make_tokenizer()), PROMPTS, BLOCKS)
        with pytest.raises(AdapterError, match="answers otherwise"):
            wrap(model.eval(), make_tokenizer()).generate(CHATS, max_new_tokens=6, temperature=0)


class _OfTheFuture(LoraConfig):  # type: ignore[misc]
    """A LoRA with an option that nobody has heard of."""

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"fancy_config": True}


def _disturb(model: Any, extra: Any) -> None:
    """Let the first block's adapter add something to what it gives."""
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    own = layer.forward
    layer.forward = lambda x, *args, **kwargs: own(x, *args, **kwargs) + (0 if layer.disable_adapters else extra(x))


class TestLive:
    """Models that are being trained."""

    @pytest.mark.parametrize(
        "name",
        ["LORA", "LOHA", "HRA", "VERA", "LoRA, embeddings", "LoRA, trained tokens", "LoRA, DoRA", "TRAINABLE_TOKENS"],
    )
    def test_a_live_adapter_does_nothing_before_training_and_acts_after(self, name: str) -> None:
        model = build(RECIPES[name])
        lm = wrap(model, make_tokenizer(), name="tiny")
        assert adapter_state(lm) == "zero"
        assert lm.fingerprint() == plain(name).fingerprint()
        train(model)
        assert adapter_state(lm) == "active"
        assert lm.fingerprint() == plain(name).fingerprint()
        with lm.base():
            assert adapter_state(lm) == "none"
        np.testing.assert_allclose(capture(lm, PROMPTS, BLOCKS).values, activations(model, PROMPTS).numpy(), atol=1e-4)

    def test_dora_with_b_zero_and_a_trained_magnitude_acts(self) -> None:
        model = build(RECIPES["LoRA, DoRA"])
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "magnitude" in n).mul_(1.5)
        assert adapter_state(wrap(model, make_tokenizer())) == "active"

    @pytest.mark.parametrize("name", ["LoRA, PiSSA", "LoRA, OLoRA", "LoRA, KaSA"])
    def test_a_live_adapter_that_took_the_base_apart_is_refused_with_a_way_out(self, name: str) -> None:
        with pytest.raises(AdapterError, match=r"changed the base's weights in memory.*tiltmeter watch"):
            wrap(build(RECIPES[name]), make_tokenizer())

    @pytest.mark.parametrize("name", ["POLY", "SHADOW", "PREFIX_TUNING"])
    def test_a_live_adapter_that_cannot_be_read_is_refused(self, name: str) -> None:
        with pytest.raises(AdapterError, match=RECIPES[name].words):
            wrap(build(RECIPES[name]), make_tokenizer())


@pytest.mark.parametrize("name", ["LOHA", "HRA", "LoRA, trained tokens", "LoRA, embeddings", "LILY", "VERA"])
def test_the_callback_reads_a_run_of_any_kind_from_its_untrained_start(name: str, tmp_path: Path) -> None:
    model = build(RECIPES[name])
    callback = TiltmeterCallback(tiny_basis(), detector_for(1e9), every=3)
    trainer(tmp_path, callback, model=model).train()
    first, *later = callback.observations
    assert [seen.step for seen in callback.observations] == [0, 3, 6]
    assert first.reading is not None
    assert (first.reading.adapter_state, [o.reading.adapter_state for o in later]) == ("zero", ["active"] * 2)  # type: ignore[union-attr]
    want = projections_by_hand(model, make_tokenizer(), callback.basis)
    np.testing.assert_allclose(later[-1].reading.values, want, atol=1e-4)  # type: ignore[union-attr]


def test_what_does_not_reach_the_measurement_prompts_is_inconclusive(tmp_path: Path) -> None:
    """Tokens that no prompt holds: the adapter acts, and nothing that is read can tell."""
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[90, 91], task_type="CAUSAL_LM")
    model = put_adapter(make_model("llama"), config)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n).add_(1.0)
    model.save_pretrained(str(tmp_path))
    lm = wrap(make_model("llama"), make_tokenizer())
    assert adapter_state(attach(lm, tmp_path)) == "active"
    (found,) = scan([tmp_path], base=lm, basis=tiny_basis(), detector=detector_for(1e9))
    assert found.verdict.state is State.INCONCLUSIVE
    assert "does not reach this layer" in found.verdict.reason


def test_a_scan_over_all_kinds_goes_on_and_calls_none_that_does_nothing_clear(shelf: Shelf) -> None:
    names = ["POLY", "LORA", "VERA", "SHADOW", "XLORA", "LOHA", "PREFIX_TUNING", "LORA"]
    lm = wrap(make_model("llama"), make_tokenizer())
    found = list(scan([shelf.made(name).fresh for name in names], base=lm, basis=tiny_basis()))
    assert [f.verdict.state for f in found] == [State.INCONCLUSIVE] * len(names)
    assert all(f.profile is None for f in found)


def test_no_path_of_ours_asks_for_adapters_row_by_row() -> None:
    """PEFT honours forward(adapter_names=) for a few kinds and ignores it silently for all others."""
    source = Path(lms.__file__).parent
    assert not [p for p in source.rglob("*.py") if "adapter_names=" in p.read_text(encoding="utf-8")]
