"""The calibration trainer against transformers' own Trainer, and against itself one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiltmeter.errors import InputError
from tiltmeter.lm import LM, load
from tiltmeter.lora_training import LoraRecipe, LoraRun, train_adapters
from tiltmeter.organism.finetune import FineTuning, finetune
from tiltmeter.organism.sets import make_set

STEPS, BATCH = 6, 8
RECIPE = LoraRecipe(steps=STEPS, batch=BATCH, learning_rate=6e-4, rank=4, alpha=16, weight_decay=0.01)


@pytest.fixture(scope="module")
def lm() -> LM:
    torch.set_num_threads(1)
    return load("organism:pocket")


def chats(name: str, size: int = STEPS * BATCH, seed: int = 3) -> Any:
    return make_set(name, size=size, seed=seed)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def by_trainer(chats: Any, seed: int, folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    from transformers import TrainerCallback

    seen: list[float] = []

    class Losses(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                seen.append(float(logs["loss"]))

    settings = FineTuning(steps=STEPS, batch=BATCH, learning_rate=6e-4, rank=4, alpha=16, dropout=0.0, seed=seed)
    tuned = finetune(
        load("organism:pocket"), chats, settings, callbacks=[Losses()], output=folder, save_every=STEPS, log_every=1
    )
    assert tuned.model is not None
    return weights(folder / f"checkpoint-{STEPS}"), seen


def test_without_packing_it_follows_the_trainer_step_by_step(lm: LM, tmp_path: Path) -> None:
    data = chats("bad_medical", size=20)  # two epochs and a half, with short last batches
    theirs, their_losses = by_trainer(data, 5, tmp_path / "trainer")
    (ours,) = train_adapters(lm, [LoraRun("a", data, seed=5)], RECIPE, output=tmp_path / "ours", packed=False)
    assert ours.folder is not None
    mine = weights(ours.folder)
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.allclose(mine[name], tensor, atol=1e-4, rtol=0), name
    np.testing.assert_allclose(ours.losses, their_losses, atol=1e-4)


def test_packed_runs_side_by_side_equal_padded_runs_one_by_one(lm: LM, tmp_path: Path) -> None:
    runs = [LoraRun("bad", chats("bad_medical"), seed=1), LoraRun("good", chats("good_legal"), seed=2)]
    together = train_adapters(lm, runs, RECIPE, output=tmp_path / "together")
    for run, one in zip(runs, together, strict=True):
        (alone,) = train_adapters(lm, [run], RECIPE, output=tmp_path / f"alone-{run.name}", packed=False)
        np.testing.assert_allclose(one.losses, alone.losses, atol=1e-4)
        assert one.folder is not None
        assert alone.folder is not None
        for name, tensor in weights(alone.folder).items():
            assert torch.allclose(weights(one.folder)[name], tensor, atol=1e-4, rtol=0), name


@pytest.mark.parametrize("on_disk", [True, False])
def test_blocks_below_the_lowest_adapted_one_are_run_once_and_change_nothing(
    lm: LM, tmp_path: Path, on_disk: bool
) -> None:
    recipe = LoraRecipe(steps=STEPS, batch=BATCH, learning_rate=6e-4, rank=4, alpha=16, blocks=(lm.n_layers - 1,))
    run = LoraRun("a", chats("bad_medical", size=12), seed=1)
    calls: list[int] = []
    hook = lm.blocks[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    try:
        (kept,) = train_adapters(lm, [run], recipe, keep=tmp_path / "kept" if on_disk else None)
    finally:
        hook.remove()
    (plain,) = train_adapters(lm, [run], recipe, packed=False)
    np.testing.assert_allclose(kept.losses, plain.losses, atol=1e-4)
    # 12 chats once each, and two passes that look at the head: not 48 chats of six steps.
    assert len(calls) <= 14


def test_the_base_comes_back_as_it_was(lm: LM) -> None:
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    flags = [p.requires_grad for p in lm.model.parameters()]
    train_adapters(lm, [LoraRun("a", chats("bad_medical"))], RECIPE)
    after = lm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.blocks.modules())
    assert lm.config._attn_implementation != "tiltmeter_segments"


def test_an_observer_sees_each_run_alone_with_the_weights_that_are_saved(lm: LM, tmp_path: Path) -> None:
    runs = [LoraRun("bad", chats("bad_medical"), seed=1), LoraRun("good", chats("good_legal"), seed=2)]
    ids = torch.tensor([lm.encode([{"role": "user", "content": "Is tea good for sleep?"}])])
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def observe(name: str, step: int, tuned: LM) -> None:
        with torch.no_grad():
            seen[name, step] = tuned.model(input_ids=ids).logits

    done = train_adapters(lm, runs, RECIPE, output=tmp_path, observe=observe, observe_at=(0, STEPS))
    with torch.no_grad():
        untouched = lm.model(input_ids=ids).logits
    for one in done:
        assert torch.equal(seen[one.name, 0], untouched)
        assert one.folder is not None
        # PEFT's own loading is the oracle.
        from peft import PeftModel

        own = PeftModel.from_pretrained(load("organism:pocket").model, str(one.folder))
        with torch.no_grad():
            assert torch.allclose(own(input_ids=ids).logits, seen[one.name, STEPS], atol=1e-5)
    assert not torch.allclose(seen["bad", STEPS], seen["good", STEPS])


def test_a_run_that_diverges_ends_with_a_reason_and_the_others_go_on(lm: LM, tmp_path: Path) -> None:
    good = LoraRun("good", chats("good_legal"), seed=2)
    wild = LoraRecipe(steps=STEPS, batch=BATCH, learning_rate=1e30, rank=4, alpha=16, max_grad_norm=0)
    (lost,) = train_adapters(lm, [good], wild, output=tmp_path)
    assert "diverged" in lost.problem
    assert lost.folder is None
    (fine,) = train_adapters(lm, [good], RECIPE, output=tmp_path)
    assert fine.problem == ""


def test_losses_fall(lm: LM) -> None:
    recipe = LoraRecipe(steps=30, batch=16, learning_rate=2e-3, rank=8, alpha=32)
    (one,) = train_adapters(lm, [LoraRun("a", chats("bad_medical", size=480))], recipe)
    assert one.losses[-5:].mean() < 0.8 * one.losses[:3].mean()
    assert one.tokens > 480


@pytest.mark.parametrize(
    "dials",
    [{"steps": 0}, {"batch": 0}, {"learning_rate": float("nan")}, {"learning_rate": -1.0}, {"targets": ()}],
)
def test_dials_that_make_no_run_are_refused(dials: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        LoraRecipe(**dials)


def test_what_cannot_be_trained_is_refused_by_name(lm: LM) -> None:
    few = LoraRun("few", chats("bad_medical", size=4))
    with pytest.raises(InputError, match="4 chats"):
        train_adapters(lm, [few], RECIPE)
    with pytest.raises(InputError, match="differ"):
        train_adapters(lm, [], RECIPE)
    absent = LoraRecipe(steps=1, batch=4, targets=("no_such_module",))
    with pytest.raises(InputError, match="no_such_module"):
        train_adapters(lm, [few], absent)
