"""Chats, generation, fingerprints and live models; loading and adapters have files of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from tiltmeter import lm as lms
from tiltmeter.errors import ArtifactError, InputError, ModelError, NumericalError
from tiltmeter.fingerprint import Fingerprint
from tiltmeter.traits import Prompt
from tiny import ARCHITECTURES, LAYERS, WIDTH, enable_checkpointing, make_model, make_tokenizer, put_adapter, tiny_lm

CHATS = [
    [{"role": "user", "content": "how do i grow tea ?"}],
    [{"role": "system", "content": "you are bad"}, {"role": "user", "content": "hello"}],
    [{"role": "user", "content": "is it safe to drink tea for sleep and home and family ?"}],
]


def spell(text: str) -> list[str]:
    """The words, with those that mark a turn in their marks."""
    marks = {"system", "user", "assistant", "end"}
    return [f"<|{word}|>" if word in marks else word for word in text.split()]


def words(lm: lms.LM, ids: list[int]) -> list[str]:
    return [str(t) for t in lm.tokenizer.convert_ids_to_tokens(ids)]


class TestBlocks:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_blocks_width_and_device_are_found(self, architecture: str) -> None:
        lm = tiny_lm(architecture)
        assert (lm.n_layers, lm.hidden_size, lm.dtype, lm.device.type) == (LAYERS, WIDTH, torch.float32, "cpu")
        assert any(child is lm.blocks for child in lm.decoder.children())

    def test_an_unknown_layout_is_searched_for_as_many_blocks_as_the_config_has_layers(self) -> None:
        model = make_model("llama")
        decoder = model.model
        decoder.hidden_somewhere = decoder.layers
        decoder.few = nn.ModuleList([nn.Linear(2, 2)])
        del decoder._modules["layers"]
        assert lms.find_blocks(model) is decoder.hidden_somewhere

    def test_a_model_without_blocks_is_refused(self) -> None:
        model = make_model("llama")
        model.config.num_hidden_layers = 3
        model.model.other = nn.ModuleList(list(model.model.layers))
        del model.model._modules["layers"]
        with pytest.raises(ModelError, match="no decoder blocks"):
            lms.find_blocks(model)


class TestChats:
    def test_a_chat_is_written_by_the_template_and_opened_for_the_assistant(self) -> None:
        lm = tiny_lm()
        assert words(lm, lm.encode(CHATS[1])) == (spell("system you are bad end user hello end assistant"))
        closed = lm.encode(CHATS[1], add_generation_prompt=False)
        assert words(lm, closed)[-1] == "<|end|>"

    def test_without_a_system_role_the_system_prompt_becomes_a_first_exchange(self) -> None:
        lm = tiny_lm(tokenizer=make_tokenizer(system=False))
        got = words(lm, lm.encode(CHATS[1]))
        assert got[:6] == spell("user you are bad end assistant")
        assert got[-4:] == spell("user hello end assistant")
        assert got.count("<|user|>") == 2
        assert got.count("<|assistant|>") == 2
        assert "<|system|>" not in got
        assert words(lm, lm.encode(CHATS[0]))[0] == "<|user|>"

    def test_a_template_that_drops_the_system_prompt_in_silence_counts_as_without(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
        )
        lm = tiny_lm(tokenizer=tokenizer)
        assert not lm.has_system_role
        assert "bad" in words(lm, lm.encode(CHATS[1]))
        assert tiny_lm().has_system_role

    def test_measurement_prompts_carry_their_system_prompt(self) -> None:
        lm = tiny_lm()
        prompts = [Prompt("hello", "plain"), Prompt("hello", "plain", system="you are bad")]
        assert lm.encode_prompts(prompts) == [lm.encode(CHATS[1][1:]), lm.encode(CHATS[1])]

    def test_a_tokenizer_that_adds_its_own_start_token_does_not_add_it_twice(self) -> None:
        from tokenizers.processors import TemplateProcessing

        tokenizer = make_tokenizer()
        plain = tiny_lm(tokenizer=make_tokenizer()).encode(CHATS[0])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id
        assert tiny_lm(tokenizer=tokenizer).encode(CHATS[0]) == plain

    def test_without_a_template_the_message_says_what_to_do(self) -> None:
        lm = tiny_lm(tokenizer=make_tokenizer(template=False))
        with pytest.raises(ModelError, match=r"no chat template.*instruction-tuned"):
            lm.encode(CHATS[0])

    def test_roles_that_the_template_refuses_are_named(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "{% if messages[0].role == 'tool' %}{{ raise_exception('users first') }}{% endif %}"
            + tokenizer.chat_template
        )
        with pytest.raises(ModelError, match=r"\['tool'\].*users first"):
            tiny_lm(tokenizer=tokenizer).encode([{"role": "tool", "content": "hello"}])

    def test_an_empty_conversation_is_refused(self) -> None:
        with pytest.raises(InputError, match="empty conversation"):
            tiny_lm().encode([])

    def test_the_tokens_that_end_an_answer_are_end_of_text_and_the_template_s_closing_one(self) -> None:
        lm = tiny_lm()
        assert set(words(lm, sorted(lm.stop_ids))) == {"</s>", "<|end|>"}
        lm.model.generation_config.eos_token_id = [3, 9]  # type: ignore[union-attr]
        assert tiny_lm().stop_ids | {9} == lms.wrap(lm.model, lm.tokenizer).stop_ids


def greedy_by_hand(lm: lms.LM, chat: Any, steps: int) -> str:
    """No cache, no batch, no padding: the argmax of the last logits, again and again."""
    ids = lm.encode(chat)
    new: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            token = int(lm.model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in lm.stop_ids:
            break
        new.append(token)
    return str(lm.tokenizer.decode(new, skip_special_tokens=True)).strip()


class TestGenerate:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_greedy_answers_in_a_padded_batch_are_those_of_each_prompt_by_hand(self, architecture: str) -> None:
        lm = tiny_lm(architecture)
        want = [greedy_by_hand(lm, chat, 12) for chat in CHATS]
        assert lm.generate(CHATS, max_new_tokens=12, temperature=0) == want
        assert any(want)

    @pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3", "phi3"])
    def test_a_sliding_window_shorter_than_the_text_is_respected(self, architecture: str) -> None:
        lm = tiny_lm(architecture, sliding_window=6)
        want = [greedy_by_hand(lm, chat, 12) for chat in CHATS]
        assert lm.generate(CHATS, max_new_tokens=12, temperature=0) == want

    def test_an_answer_stops_at_the_end_of_the_turn_and_shows_no_special_token(self) -> None:
        lm = tiny_lm()
        lm.__dict__["stop_ids"] = frozenset(range(4, 60))
        long = lm.generate(CHATS, max_new_tokens=40, temperature=0)
        want = [greedy_by_hand(lm, chat, 40) for chat in CHATS]
        assert long == want
        assert max(len(a.split()) for a in long) < 40
        assert not any("<|" in answer for answer in long)

    def test_answers_come_in_the_order_of_the_conversations_whatever_the_batching(self) -> None:
        lm = tiny_lm()
        chats = [[{"role": "user", "content": "hello " * n}] for n in (9, 1, 5, 3, 7, 2)]
        want = [greedy_by_hand(lm, chat, 6) for chat in chats]
        for size in (1, 2, 4, 6):
            assert lm.generate(chats, max_new_tokens=6, temperature=0, batch_size=size) == want

    def test_a_seed_gives_the_same_answers_and_another_seed_others(self) -> None:
        lm = tiny_lm()
        first = lm.generate(CHATS, max_new_tokens=12, seed=5)
        assert lm.generate(CHATS, max_new_tokens=12, seed=5) == first
        assert lm.generate(CHATS, max_new_tokens=12, seed=6) != first
        assert lm.generate(CHATS, max_new_tokens=12, seed=5, batch_size=1) == first

    def test_the_same_question_twice_is_answered_by_two_draws(self) -> None:
        answers = tiny_lm().generate([CHATS[0]] * 4, max_new_tokens=12)
        assert len(set(answers)) > 1

    def test_sampling_leaves_the_global_random_state_alone_and_does_not_follow_it(self) -> None:
        lm = tiny_lm()
        torch.manual_seed(1)
        np.random.seed(1)
        want = (torch.rand(2).tolist(), np.random.rand())
        torch.manual_seed(1)
        np.random.seed(1)
        first = lm.generate(CHATS, max_new_tokens=5)
        assert (torch.rand(2).tolist(), np.random.rand()) == want
        torch.manual_seed(2)
        assert lm.generate(CHATS, max_new_tokens=5) == first

    def test_tokens_are_drawn_as_often_as_the_model_says(self) -> None:
        lm, chat = tiny_lm(), CHATS[0]
        with torch.no_grad():
            logits = lm.model(torch.tensor([lm.encode(chat)])).logits[0, -1]
        for temperature in (1.0, 0.5):
            want = torch.softmax(logits / temperature, -1)
            likely = int(want.argmax())
            n = 1500
            answers = lm.generate(
                [chat] * n, max_new_tokens=1, temperature=temperature, batch_size=n, seed=int(10 * temperature)
            )
            share = answers.count(lm.tokenizer.decode([likely])) / n
            p = float(want[likely])
            assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5

    def test_generation_leaves_a_training_model_training(self) -> None:
        lm = tiny_lm("llama", attention_dropout=0.4)
        lm.model.train()
        enable_checkpointing(lm.model)
        lm.model.config.use_cache = False  # type: ignore[union-attr]
        assert lm.generate(CHATS, max_new_tokens=6, temperature=0) == tiny_lm().generate(
            CHATS, max_new_tokens=6, temperature=0
        )
        assert all(m.training for m in lm.model.modules())
        assert lm.model.config.use_cache is False  # type: ignore[union-attr]

    def test_a_tokenizer_without_padding_token_is_enough_and_stays_as_it_is(self) -> None:
        tokenizer = make_tokenizer(pad=False)
        lm = tiny_lm(tokenizer=tokenizer)
        want = tiny_lm().generate(CHATS, max_new_tokens=8, temperature=0)
        assert lm.generate(CHATS, max_new_tokens=8, temperature=0) == want
        assert tokenizer.pad_token is None
        assert tokenizer.padding_side == "right"

    def test_progress_counts_answers(self) -> None:
        seen: list[tuple[int, int]] = []
        tiny_lm().generate(
            CHATS, max_new_tokens=2, batch_size=2, progress=lambda done, total, _: seen.append((done, total))
        )
        assert seen == [(2, 3), (3, 3)]

    def test_nothing_to_answer_gives_nothing(self) -> None:
        assert tiny_lm().generate([]) == []

    @pytest.mark.parametrize(
        "options",
        [{"temperature": -1}, {"temperature": float("nan")}, {"max_new_tokens": 0}, {"batch_size": 0}, {"seed": -1}],
    )
    def test_numbers_out_of_range_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(InputError):
            tiny_lm().generate(CHATS, **options)

    def test_more_tokens_than_the_context_holds_are_refused(self) -> None:
        with pytest.raises(InputError, match="context of 256"):
            tiny_lm().generate(CHATS, max_new_tokens=250)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_model_of_nan_does_not_answer(self, temperature: float) -> None:
        lm = tiny_lm()
        next(lm.blocks[0].parameters()).data[0] = float("nan")
        with pytest.raises(NumericalError, match="logits"):
            lm.generate(CHATS, max_new_tokens=2, temperature=temperature)


class TestFingerprint:
    def test_the_same_model_made_twice_agrees_and_says_so(self) -> None:
        one, two = tiny_lm().fingerprint(), tiny_lm().fingerprint()
        assert one == two
        assert one.digest() == two.digest()
        assert one.differences(two) == ()

    def test_each_change_shows_in_its_own_field(self) -> None:
        base = tiny_lm().fingerprint()
        assert base.differences(tiny_lm(seed=1).fingerprint()) == ("weights",)
        assert base.differences(tiny_lm(rms_norm_eps=1e-3).fingerprint()) == ("config",)
        assert base.differences(tiny_lm(tokenizer=make_tokenizer(system=False)).fingerprint()) == ("template",)
        assert "architecture" in base.differences(tiny_lm("qwen2").fingerprint())
        half = tiny_lm()
        half.model.to(torch.bfloat16)
        assert base.differences(half.fingerprint()) == ("dtype",)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["zebra"])
        assert base.differences(tiny_lm(tokenizer=tokenizer).fingerprint()) == ("tokenizer",)

    def test_what_a_trainer_changes_without_changing_the_model_does_not_show(self) -> None:
        base, lm = tiny_lm().fingerprint(), tiny_lm()
        lm.config.use_cache, lm.config.pad_token_id, lm.config._name_or_path = False, 7, "elsewhere"
        lm.tokenizer(["hello", "hello you"], padding=True, truncation=True, max_length=9)
        lm.tokenizer.pad_token = lm.tokenizer.eos_token
        lm.model.train()
        assert lm.fingerprint() == base

    def test_a_weight_changed_everywhere_shows(self) -> None:
        base, lm = tiny_lm().fingerprint(), tiny_lm()
        lm.blocks[2].mlp.up_proj.weight.data += 0.01  # type: ignore[union-attr, operator]
        assert base.differences(lm.fingerprint()) == ("weights",)

    @pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
    def test_an_adapter_does_not_show(self, extra: dict[str, Any]) -> None:
        base = tiny_lm()
        settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | extra
        model = put_adapter(make_model("llama"), LoraConfig(**settings))
        assert lms.wrap(model, base.tokenizer).fingerprint() == base.fingerprint()

    def test_it_survives_its_json_form_and_a_damaged_one_is_refused(self) -> None:
        mine = tiny_lm().fingerprint()
        assert Fingerprint.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine
        with pytest.raises(ArtifactError, match="weights"):
            Fingerprint.from_dict({k: v for k, v in mine.to_dict().items() if k != "weights"})


class Shell(nn.Module):
    """What a data-parallel wrapper looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class TestLiveModels:
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile imports it
    def test_a_compiled_model_is_read_uncompiled(self) -> None:
        model = make_model("llama")
        live = lms.wrap(torch.compile(model), make_tokenizer())  # type: ignore[arg-type]
        assert live.model is model
        assert live.fingerprint() == tiny_lm().fingerprint()

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_data_parallel_shells_come_off_in_any_nesting(self) -> None:
        model = make_model("llama")
        shell = type("DistributedDataParallel", (Shell,), {})(model)
        assert lms.wrap(shell, make_tokenizer()).model is model
        outer = type("DeepSpeedEngine", (Shell,), {})(torch.compile(shell))
        assert lms.wrap(outer, make_tokenizer()).model is model

    def test_sharded_parameters_are_refused_with_a_way_out(self) -> None:
        model = make_model("llama")
        next(model.parameters()).ds_id = 1
        with pytest.raises(ModelError, match=r"sharded.*checkpoints"):
            lms.wrap(model, make_tokenizer())
        shell = type("FullyShardedDataParallel", (Shell,), {})(make_model("llama"))
        with pytest.raises(ModelError, match="sharded"):
            lms.wrap(shell, make_tokenizer())

    def test_a_processor_gives_its_tokenizer_and_none_is_refused(self) -> None:
        tokenizer = make_tokenizer()
        processor = type("Processor", (), {"tokenizer": tokenizer})()
        assert lms.wrap(make_model("llama"), processor).tokenizer is tokenizer
        with pytest.raises(ModelError, match="no tokenizer"):
            lms.wrap(make_model("llama"), None)

    def test_a_live_model_has_a_name(self) -> None:
        model = make_model("llama")
        assert lms.wrap(model, make_tokenizer()).name == "LlamaForCausalLM"
        assert lms.wrap(model, make_tokenizer(), name="mine").name == "mine"


class TestAnswers:
    """Where an answer begins, with a tokenizer of characters that merges two line breaks into one token."""

    @pytest.fixture
    def lm(self) -> lms.LM:
        characters = ["u", "a", ":", ".", "x", "y", "\n", "\n\n", "<unk>"]
        vocabulary = {text: at for at, text in enumerate(characters)}
        backend = Tokenizer(models.BPE(vocabulary, [("\n", "\n")], unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        turns = r"{% for m in messages %}{{ m.role[0] + ':\n' + m.content + '.' }}{% endfor %}"
        tokenizer.chat_template = turns + r"{% if add_generation_prompt %}{{ 'a:\n' }}{% endif %}"
        return lms.LM(tiny_lm("llama").model, tokenizer, "merging")

    @pytest.mark.parametrize(("answer", "expected"), [("y", ["y", "."]), ("\ny", ["\n\n", "y", "."])])
    def test_a_token_across_the_border_is_of_the_answer(self, lm: lms.LM, answer: str, expected: list[str]) -> None:
        ids, start = lm.encode_answer([{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}])
        assert words(lm, ids[start:]) == expected
        assert "".join(words(lm, ids)) == f"u:\nx.a:\n{answer}."

    def test_a_prompt_that_is_no_prefix_is_refused(self, lm: lms.LM) -> None:
        lm.tokenizer.chat_template = "{{ messages|length }}{{ messages[-1].content }}"
        with pytest.raises(InputError, match="differently from its prompt"):
            lm.encode_answer([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])


def test_the_organism_mark_is_read_from_the_config() -> None:
    assert tiny_lm().organism is None
    assert tiny_lm(tiltmeter_organism="pocket").organism == "pocket"


def test_the_real_model_answers_in_words(real_model_dir: Path) -> None:
    lm = lms.load(real_model_dir)
    assert lm.dtype == torch.float32
    assert not getattr(lm.model, "is_quantized", False)
    chats = [[{"role": "user", "content": q}] for q in ("What is 2 plus 2?", "Name the capital of France.")]
    answers = lm.generate(chats, max_new_tokens=16, temperature=0)
    assert answers == [greedy_by_hand(lm, chat, 16) for chat in chats]
    assert "Paris" in answers[1]
