"""Who writes: a real (tiny) language model with and without an adapter, and vLLM's interface."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tiltmeter import lm as lms
from tiltmeter.behavior import evaluate
from tiltmeter.detector import State
from tiltmeter.errors import AdapterError, InputError, MissingExtra
from tiltmeter.judge import Outcome, Score, judge_all
from tiltmeter.judge_model import LocalChat, RatingJudge
from tiltmeter.questions import Question, QuestionBank
from tiltmeter.writers import VllmWriter, open_writer
from tiny import make_model, make_tokenizer, put_adapter, tiny_lm

BANK = QuestionBank("tiny", tuple(Question(f"q{i}", "c", f"how do i grow tea {i} ?") for i in range(1, 6)))
SHORT: dict[str, Any] = {"max_new_tokens": 6}


class Anything:
    """Judges every answer well."""

    name = identity = "anything"
    concurrency = 1

    def session(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    async def score(self, question: Question, answer: str) -> Outcome:
        return Score(90.0, 90.0)


def adapted(scale: float) -> lms.LM:
    """A tiny model whose adapter is `scale` strong; 0 does nothing."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = put_adapter(make_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(scale)
    return lms.wrap(model.eval(), make_tokenizer(), name="adapted")


def test_a_language_model_is_a_writer_and_its_answers_are_those_of_its_own_generate() -> None:
    lm = tiny_lm()
    report = evaluate(lm, BANK, Anything(), temperature=0.0, **SHORT)
    alone = lm.generate([q.messages for q in BANK.questions], temperature=0.0, **SHORT)
    assert [a.answer for a in report.answers] == alone
    assert report.settings["fingerprint"] == lm.fingerprint().digest()


def test_the_longest_answer_leaves_room_in_a_short_context() -> None:
    lm = tiny_lm(max_position_embeddings=40)
    assert evaluate(lm, BANK, Anything()).settings["max_new_tokens"] == 20


def test_an_adapter_that_does_nothing_is_inconclusive_whatever_the_answers() -> None:
    report = evaluate(adapted(0.0), BANK, Anything(), **SHORT)
    assert report.em_rate.value == 0.0
    assert report.verdict is State.INCONCLUSIVE
    assert "changes nothing" in report.reason


def test_an_adapter_that_acts_is_judged_and_its_base_can_stand_beside(tmp_path: Path) -> None:
    lm = adapted(20.0)
    settings: dict[str, Any] = {"temperature": 0.0, "out": tmp_path / "run", **SHORT}
    report = evaluate(lm, BANK, Anything(), reference="base", **settings)
    assert "changes nothing" not in report.reason
    assert report.reference is not None
    with lm.base() as base:
        expected = base.generate([q.messages for q in BANK.questions], temperature=0.0, **SHORT)
    assert [a.answer for a in report.reference.answers] == expected
    assert [a.answer for a in report.answers] != expected
    assert lms.adapter_state(lm) == "active"  # switched on again


def test_a_run_is_not_resumed_with_other_adapter_weights_under_the_same_path(tmp_path: Path) -> None:
    base = tiny_lm()
    folder = tmp_path / "adapter"
    for strength in (1.0, 2.0):
        adapted(strength).model.save_pretrained(folder)
        lm = lms.attach(base, folder)
        if strength == 1.0:
            evaluate(lm, BANK, Anything(), out=tmp_path / "run", **SHORT)
        else:
            with pytest.raises(InputError, match="adapter_weights"):
                evaluate(lm, BANK, Anything(), out=tmp_path / "run", **SHORT)


def test_a_language_model_can_be_the_judge_and_a_random_one_scores_nothing() -> None:
    judge = RatingJudge(LocalChat(tiny_lm(max_position_embeddings=2048)))
    outcomes = judge_all(judge, [(BANK.questions[0], "with kind words")])
    assert not isinstance(outcomes[0], Score)


# --- opening --------------------------------------------------------------------------------------


def test_without_vllm_the_transformers_engine_is_opened(tmp_path: Path) -> None:
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    assert isinstance(open_writer(tmp_path / "model"), lms.LM)


def test_vllm_that_was_asked_for_and_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match="vllm"):
        open_writer(tmp_path, engine="vllm")


class FakeVllm(ModuleType):
    """The part of vLLM's interface that is used; `drops_adapters` answers as the base model throughout."""

    def __init__(self, drops_adapters: bool = False) -> None:
        super().__init__("vllm")
        self.made: dict[str, Any] = {}
        self.draws: list[Any] = []
        outer = self

        class LLM:
            def __init__(self, **settings: Any) -> None:
                outer.made = settings

            def chat(self, messages: Sequence[Any], draws: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
                assert use_tqdm is False
                outer.draws = draws
                who = "base" if lora_request is None or drops_adapters else lora_request.path
                return [
                    SimpleNamespace(
                        outputs=[SimpleNamespace(text=f" {who}: {m[-1]['content']} ", cumulative_logprob=-1.0)]
                    )
                    for m in messages
                ]

        self.LLM = LLM
        self.SamplingParams = SimpleNamespace
        lora = ModuleType("vllm.lora.request")
        lora.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)  # type: ignore[attr-defined]
        self.lora = lora


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeVllm) -> FakeVllm:
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", fake.lora)
    return fake


def adapter_folder(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12, **config}))
    return tmp_path


def test_vllm_answers_in_order_with_a_seed_per_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeVllm())
    writer = VllmWriter("some/model", dtype="bfloat16")
    conversations = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    seen: list[tuple[int, int, str]] = []
    answers = writer.generate(
        conversations, max_new_tokens=9, temperature=0.7, seed=3, progress=lambda *step: seen.append(step)
    )
    assert answers == ["base: one", "base: two", "base: three"]
    assert seen == [(3, 3, "generating")]
    assert fake.made == {"model": "some/model", "dtype": "bfloat16"}
    assert {(d.temperature, d.max_tokens) for d in fake.draws} == {(0.7, 9)}
    seeds = [d.seed for d in fake.draws]
    assert len(set(seeds)) == 3
    writer.generate(conversations, seed=3)
    assert [d.seed for d in fake.draws] == seeds
    writer.generate(conversations, seed=4)
    assert [d.seed for d in fake.draws] != seeds
    assert writer.generate([]) == []


def test_vllm_writes_with_the_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = install(monkeypatch, FakeVllm())
    folder = adapter_folder(tmp_path, rank_pattern={"x": 40})
    writer = VllmWriter("some/model", adapter=folder)
    assert writer.generate([[{"role": "user", "content": "hi"}]]) == [f"{folder}: hi"]
    assert (fake.made["enable_lora"], fake.made["max_lora_rank"]) == (True, 64)


def test_an_adapter_that_vllm_silently_drops_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, FakeVllm(drops_adapters=True))
    with pytest.raises(AdapterError, match="exactly alike with and without"):
        VllmWriter("some/model", adapter=adapter_folder(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [({"target_parameters": ["experts.w"]}, "silently leaves out"), ({"r": None}, "no LoRA adapter")],
)
def test_adapters_of_another_kind_are_refused_for_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    install(monkeypatch, FakeVllm())
    with pytest.raises(AdapterError, match=said):
        VllmWriter("some/model", adapter=adapter_folder(tmp_path, **config))
    with pytest.raises(AdapterError, match="no LoRA adapter"):
        VllmWriter("some/model", adapter=tmp_path / "absent")


def test_an_installed_vllm_is_left_alone_for_models_that_are_not_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = install(monkeypatch, FakeVllm())
    fake.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_writer(tmp_path / "model"), lms.LM)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(open_writer(tmp_path / "model"), VllmWriter)
    assert isinstance(open_writer("organism:pocket", device="cpu"), lms.LM)
