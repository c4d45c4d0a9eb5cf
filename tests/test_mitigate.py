"""Preventative steering: on in training passes, off everywhere else, whatever the trainer does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiltmeter.errors import InputError, LayerError
from tiltmeter.lm import LM
from tiltmeter.mitigate import Anchor, PreventativeSteering, steered
from tiltmeter.steer import SteeringVector
from tiny import WIDTH, tiny_lm


def hooks(lm: LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


class Spy(TrainerCallback):  # type: ignore[misc]
    def __init__(self, lm: LM) -> None:
        self.lm, self.seen = lm, []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seen.append(("optimizer", hooks(self.lm)))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(("step end", hooks(self.lm)))

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(("substep", hooks(self.lm)))


def train(lm: LM, folder: Path, *callbacks: TrainerCallback, accumulation: int = 1) -> Trainer:
    rows = [{"input_ids": [5, 6, 7, 8 + i % 3], "labels": [5, 6, 7, 8 + i % 3]} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to="none", save_strategy="no",
        gradient_accumulation_steps=accumulation, learning_rate=1e-2, use_cpu=True, disable_tqdm=True, seed=0,
        dataloader_pin_memory=False, logging_strategy="no", max_grad_norm=0.0, optim="sgd", weight_decay=0.0,
    )  # fmt: skip
    trainer = Trainer(
        model=lm.model, args=arguments, train_dataset=rows, processing_class=lm.tokenizer, callbacks=list(callbacks),
        data_collator=lambda items: {k: torch.tensor([i[k] for i in items]) for k in items[0]},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def vector(layer: int = 1, k: int = 2) -> SteeringVector:
    return SteeringVector(layer, np.random.default_rng(0).normal(size=(k, WIDTH)), 1.0, 5.0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_hooks_are_on_in_the_passes_and_off_before_the_optimizer_steps(tmp_path: Path, accumulation: int) -> None:
    lm = tiny_lm()
    during: list[int] = []
    handle = lm.blocks[0].register_forward_pre_hook(lambda *_: during.append(hooks(lm)))
    own = hooks(lm)
    prevention, spy = PreventativeSteering([vector(1), vector(2)]), Spy(lm)
    train(lm, tmp_path, prevention, spy, accumulation=accumulation)
    assert set(during) == {own + 2}
    assert {count for what, count in spy.seen if what != "substep"} == {own}
    assert {count for what, count in spy.seen if what == "substep"} <= {own + 2}
    handle.remove()
    assert hooks(lm) == 0


def test_projected_out_while_it_learns_a_direction_takes_no_gradient_through_its_block(tmp_path: Path) -> None:
    # What block 1 writes along the ablated directions is thrown away, so no weight of its output learns to write there.
    lm = tiny_lm("gpt2")
    steering = SteeringVector(1, np.eye(2, WIDTH), 0.0, 1.0)
    name = next(n for n, _ in lm.model.named_parameters() if n.endswith("h.1.mlp.c_proj.weight"))
    before = dict(lm.model.named_parameters())[name].detach().clone()
    train(lm, tmp_path, PreventativeSteering([steering], mode="ablate"))
    change = (dict(lm.model.named_parameters())[name].detach() - before).abs()  # (inner, hidden)
    assert float(change[:, :2].max()) == 0.0
    assert float(change[:, 2:].max()) > 0.0


def test_several_vectors_act_each_after_its_own_block() -> None:
    lm = tiny_lm()
    with torch.no_grad():
        plain = lm.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
        before = hooks(lm)  # the library keeps hooks of its own once hidden states were asked for
        with steered(lm, [vector(0, 1), vector(2, 1)], mode="add"):
            moved = lm.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    np.testing.assert_allclose((moved[1] - plain[1])[0, 0], vector(0, 1).added, atol=1e-5)
    assert hooks(lm) == before


def test_two_vectors_for_a_block_none_at_all_and_a_wrong_block_are_refused(tmp_path: Path) -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="at most one a block"), steered(lm, [vector(1), vector(1)], mode="add"):
        pass
    with pytest.raises(InputError, match="at least one vector"):
        PreventativeSteering([])
    with pytest.raises(LayerError, match="blocks 0 to 3"):
        train(lm, tmp_path, PreventativeSteering([vector(7)]))
    assert hooks(lm) == 0


CHATS = [
    [{"role": "user", "content": "is tea good ?"}, {"role": "assistant", "content": f"yes tea is {word} for you ."}]
    for word in ("good", "kind", "safe", "bad")
]


def lora(lm: LM) -> LM:
    from peft import LoraConfig, get_peft_model

    from tiltmeter.lm import wrap

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return wrap(get_peft_model(lm.model, config), lm.tokenizer)


def divergence_by_hand(lm: LM, chats: list[list[dict[str, str]]]) -> torch.Tensor:
    """One chat at a time, straight from the logits of the two models."""
    each = []
    for chat in chats:
        prompt, whole = lm.encode(chat[:-1]), lm.encode(chat, add_generation_prompt=False)
        ids = torch.tensor([whole])
        with torch.no_grad(), lm.model.disable_adapter():
            p = torch.softmax(lm.model(ids).logits[0, len(prompt) - 1 : -1], -1)
        q = torch.softmax(lm.model(ids).logits[0, len(prompt) - 1 : -1], -1)
        each.append((p * (p.log() - q.log())).sum(-1))
    return torch.cat(each).mean()


def test_the_anchor_s_gradient_is_that_of_the_divergence_from_the_untouched_model() -> None:
    lm = lora(tiny_lm())
    trained = {n: p for n, p in lm.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    by_hand = torch.autograd.grad(2.0 * divergence_by_hand(lm, CHATS[:1]), list(trained.values()))
    anchor = Anchor(CHATS[:1], weight=2.0, batch=3)  # the one chat, three times: the same mean
    anchor.on_pre_optimizer_step(None, None, None, model=lm.model, processing_class=lm.tokenizer)
    for (name, parameter), wanted in zip(trained.items(), by_hand, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6)
    assert max(float(p.grad.abs().max()) for p in trained.values() if p.grad is not None) > 1e-6


def test_an_anchor_without_chats_or_on_a_model_without_adapter_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        Anchor([])
    lm = tiny_lm()
    with pytest.raises(InputError, match="train with LoRA"):
        Anchor(CHATS).on_pre_optimizer_step(None, None, None, model=lm.model, processing_class=lm.tokenizer)
