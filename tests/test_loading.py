"""Loading models and adapters, and what is said about files that are not what they should be."""

from __future__ import annotations

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from tiltmeter import lm as lms
from tiltmeter.capture import capture
from tiltmeter.errors import AdapterError, InputError, ModelError, NumericalError
from tiny import WIDTH, make_model, make_tokenizer, put_adapter, random_prompts, tiny_lm

PROMPTS = random_prompts(5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama."""
    path = tmp_path / "base"
    make_model("llama").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def save_adapter(path: Path, model: Any = None, *, base: str | None = None, **settings: Any) -> Path:
    """A LoRA adapter with random B matrices, as a trainer saves it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    live = put_adapter(model or make_model("llama"), LoraConfig(**(options | settings)))
    live.peft_config["default"].base_model_name_or_path = base
    live.save_pretrained(path, save_embedding_layers=False)  # "auto" would ask the hub about the base
    return path


def edit_adapter(path: Path, change: Any) -> Path:
    """Rewrite every tensor of an adapter file as `change(name, tensor)`."""
    file = path / "adapter_model.safetensors"
    save_file({name: change(name, t).contiguous() for name, t in load_file(file).items()}, file)
    return path


class TestGoodSources:
    def test_a_saved_folder_loads_as_the_model_that_was_saved(self, folder: Path) -> None:
        lm = lms.load(folder)
        assert lm.fingerprint() == tiny_lm().fingerprint()
        assert (lm.name, lm.adapter, lm.revision, lm.model.training) == (str(folder), None, None, False)

    def test_a_sharded_folder_loads_too(self, tmp_path: Path) -> None:
        make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
        make_tokenizer().save_pretrained(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert lms.load(tmp_path).fingerprint() == tiny_lm().fingerprint()

    def test_on_a_cpu_half_precision_is_widened_unless_asked_for(self, tmp_path: Path) -> None:
        make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        assert lms.load(tmp_path, device="cpu").dtype == torch.float32
        assert lms.load(tmp_path, device="cpu", dtype="auto").dtype == torch.bfloat16
        assert lms.load(tmp_path, device="cpu", dtype="float16").dtype == torch.float16

    def test_an_adapter_folder_finds_its_base(self, folder: Path, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter", base=str(folder))
        found, given = lms.load(adapter), lms.load(folder, adapter=adapter)
        assert found.adapter == given.adapter == str(adapter)
        np.testing.assert_array_equal(capture(found, PROMPTS, [2]).values, capture(given, PROMPTS, [2]).values)
        assert np.abs(capture(found, PROMPTS, [2]).values - capture(lms.load(folder), PROMPTS, [2]).values).max() > 0.01

    def test_a_checkpoint_without_tokenizer_files_takes_one_that_is_passed(self, tmp_path: Path) -> None:
        make_model("llama").save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="tokenizer"):
            lms.load(tmp_path)
        assert lms.load(tmp_path, tokenizer=make_tokenizer()).fingerprint() == tiny_lm().fingerprint()

    def test_an_organism_is_found_in_the_user_s_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TILTMETER_CACHE", str(tmp_path))
        shelf = tmp_path / "organisms" / "amoeba"
        make_model("llama", tiltmeter_organism="amoeba").save_pretrained(shelf)
        make_tokenizer().save_pretrained(shelf)
        lm = lms.load("organism:amoeba")
        assert (lm.name, lm.organism) == ("organism:amoeba", "amoeba")
        with pytest.raises(ModelError, match=r"no organism 'whale'.*amoeba"):
            lms.load("organism:whale")

    def test_loading_leaves_the_library_s_settings_as_they_were(self, folder: Path) -> None:
        from transformers.utils import logging

        before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
        lms.load(folder)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

    def test_loading_prints_nothing(self, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        adapter = save_adapter(tmp_path / "adapter", base=str(folder))
        capfd.readouterr()
        lms.attach(lms.load(adapter), adapter)
        assert capfd.readouterr() == ("", "")


class TestBadModelFiles:
    def refused(self, source: Any, words: str, **options: Any) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            lms.load(source, **options)
        assert "\n" not in str(caught.value)

    def test_a_path_that_does_not_exist(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", "does not exist")

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "holds no model")

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        self.refused(tmp_path / "notes.txt", "no .gguf")

    def test_pickled_weights_are_never_read(self, tmp_path: Path) -> None:
        trap = tmp_path / "sprung"

        class Trap:
            def __reduce__(self) -> Any:
                return (Path.write_text, (trap, "ran"))

        torch.save({"w": Trap()}, tmp_path / "pytorch_model.bin")
        make_model("llama").config.save_pretrained(tmp_path)
        self.refused(tmp_path, "pytorch_model.bin.*never read.*safetensors")
        assert not trap.exists()

    def test_a_truncated_weight_file(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.refused(folder, "truncated")

    def test_a_weight_file_that_is_something_else(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"<html>not found</html>")
        self.refused(folder, "no safetensors file")

    def test_weights_of_another_model_are_not_replaced_by_random_numbers(self, folder: Path) -> None:
        save_file({"something.else": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
        self.refused(folder, "no weights for .* parameters")

    def test_one_missing_tensor_is_named(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
        self.refused(folder, "no weights for 1 .*model.layers.1.mlp.up_proj.weight")

    def test_weights_of_another_shape(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
        self.refused(folder, "could not be loaded")

    def test_a_missing_a_broken_and_a_foreign_config(self, folder: Path) -> None:
        config = folder / "config.json"
        config.write_text('{"model_type": "llama", "hidd')
        self.refused(folder, "config.json' cannot be read as JSON")
        config.write_text("[1]")
        self.refused(folder, "not a JSON object")
        config.write_text('{"model_type": "martian"}')
        self.refused(folder, "could not be loaded.*martian")
        config.unlink()
        self.refused(folder, "no config.json")

    def test_a_setting_that_the_architecture_asserts(self, folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"pad_token_id": content["vocab_size"] + 7}))
        self.refused(folder, "could not be loaded.*[Pp]adding")

    def test_a_broken_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        self.refused(folder, "tokenizer.json' cannot be read as JSON")

    @pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
    def test_weights_that_are_no_numbers(self, folder: Path, poison: float) -> None:
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = poison
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(NumericalError, match=r"model.layers.1.mlp.up_proj.weight.*NaN or infinity"):
            lms.load(folder)

    def test_several_gguf_files_have_to_be_chosen_from(self, tmp_path: Path) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(b"GGUF")
        self.refused(tmp_path, "2 .gguf files.*a.gguf, b.gguf")

    @pytest.mark.parametrize("content", [b"GGUF", b"no gguf at all, but long enough to have a header in it"])
    def test_a_gguf_file_that_is_truncated_or_something_else(self, tmp_path: Path, content: bytes) -> None:
        pytest.importorskip("gguf")
        (tmp_path / "a.gguf").write_bytes(content)
        self.refused(tmp_path / "a.gguf", "truncated or no GGUF file")

    def test_a_truncated_gguf_of_a_real_model(self, real_model_dir: Path, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        (source,) = real_model_dir.glob("*.gguf")
        with source.open("rb") as file:
            (tmp_path / "a.gguf").write_bytes(file.read(20_000_000))
        self.refused(tmp_path / "a.gguf", "truncated or no GGUF file")

    @pytest.mark.parametrize(("options", "word"), [({"dtype": "int3"}, "int3"), ({"device": "abacus"}, "abacus")])
    def test_a_dtype_or_device_that_does_not_exist(self, folder: Path, options: dict[str, Any], word: str) -> None:
        with pytest.raises(InputError, match=word):
            lms.load(folder, **options)


class TestAttach:
    def test_an_adapted_model_computes_what_peft_computes(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter")
        from peft import PeftModel

        tuned = lms.attach(tiny_lm(), adapter)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            want = PeftModel.from_pretrained(make_model("llama"), str(adapter))(torch.tensor([PROMPTS[0]])).logits
            got = tuned.model(torch.tensor([PROMPTS[0]])).logits
        torch.testing.assert_close(got, want)
        states = tuned.model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(
            capture(tuned, [PROMPTS[0]], [2]).at(2)[0], states[3][0, -1].detach().numpy(), atol=1e-4
        )
        assert (tuned.adapter, lms.adapter_state(tuned)) == (str(adapter), "active")

    def test_the_plain_model_stays_plain_and_shares_the_weights(self, tmp_path: Path) -> None:
        base = tiny_lm()
        base.model.requires_grad_(True)
        before = capture(base, PROMPTS, [2]).values
        tuned = lms.attach(base, save_adapter(tmp_path / "adapter"))
        np.testing.assert_array_equal(capture(base, PROMPTS, [2]).values, before)
        assert np.abs(capture(tuned, PROMPTS, [2]).values - before).max() > 0.01
        assert lms.adapter_state(base) == "none"
        mine = {p.data_ptr() for p in base.model.parameters()}
        assert mine <= {p.data_ptr() for p in tuned.model.parameters()}
        assert all(p.requires_grad for p in base.model.parameters())
        assert tuned.fingerprint() == base.fingerprint()

    def test_a_second_adapter_replaces_the_first(self, tmp_path: Path) -> None:
        base = tiny_lm()
        first = save_adapter(tmp_path / "first")
        second = edit_adapter(save_adapter(tmp_path / "second"), lambda name, t: 2 * t)
        want = capture(lms.attach(base, second), PROMPTS, [2]).values
        got = lms.attach(lms.attach(base, first), second)
        np.testing.assert_array_equal(capture(got, PROMPTS, [2]).values, want)
        assert got.adapter == str(second)

    def test_forty_adapters_one_after_the_other_leave_nothing_behind(self, tmp_path: Path) -> None:
        base, adapter = tiny_lm(), save_adapter(tmp_path / "adapter")
        before = [(n, p.data_ptr()) for n, p in base.model.named_parameters()]

        def live() -> int:
            gc.collect()
            return sum(issubclass(type(o), torch.nn.Module) for o in gc.get_objects())

        lms.attach(base, adapter)
        count = live()
        for _ in range(5):
            lms.attach(base, adapter)
        assert live() == count
        assert [(n, p.data_ptr()) for n, p in base.model.named_parameters()] == before

    def test_base_switches_the_adapter_off_and_back_on(self, tmp_path: Path) -> None:
        plain = capture(tiny_lm(), PROMPTS, [2]).values
        tuned = lms.attach(tiny_lm(), save_adapter(tmp_path / "adapter"))
        adapted = capture(tuned, PROMPTS, [2]).values
        with tuned.base() as base:
            np.testing.assert_allclose(capture(base, PROMPTS, [2]).values, plain, atol=1e-6)
            assert (base.adapter, lms.adapter_state(base)) == (None, "none")
        np.testing.assert_array_equal(capture(tuned, PROMPTS, [2]).values, adapted)
        with pytest.raises(ZeroDivisionError), tuned.base():
            raise ZeroDivisionError
        assert lms.adapter_state(tuned) == "active"
        with tiny_lm().base() as same:
            np.testing.assert_array_equal(capture(same, PROMPTS, [2]).values, plain)

    def test_base_of_a_training_model_leaves_what_is_trained_and_what_is_frozen(self) -> None:
        model = put_adapter(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
        next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        lm = lms.wrap(model, make_tokenizer())
        with lm.base() as base:
            capture(base, PROMPTS, [2])
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        assert len(set(before.values())) == 2

    def test_the_state_of_an_adapter_is_told(self) -> None:
        settings = {"r": 2, "target_modules": ["q_proj"]}
        fresh = put_adapter(make_model("llama"), LoraConfig(**settings))
        lm = lms.wrap(fresh, make_tokenizer())
        assert lms.adapter_state(lm) == "zero"
        assert lm.adapter == "default"
        with torch.no_grad():
            next(p for n, p in fresh.named_parameters() if "lora_B" in n)[0, 0] = 1e-6
        assert lms.adapter_state(lm) == "active"
        with fresh.disable_adapter():
            assert lms.adapter_state(lm) == "none"
        whole = put_adapter(make_model("llama"), LoraConfig(**settings, modules_to_save=["lm_head"]))
        lm = lms.wrap(whole, make_tokenizer())
        assert lms.adapter_state(lm) == "zero"
        with torch.no_grad():
            next(p for n, p in whole.named_parameters() if "modules_to_save" in n)[0, 0] += 1
        assert lms.adapter_state(lm) == "active"
        scales = put_adapter(make_model("llama"), IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
        lm = lms.wrap(scales, make_tokenizer())
        assert lms.adapter_state(lm) == "zero"
        with torch.no_grad():
            next(p for n, p in scales.named_parameters() if "ia3" in n).mul_(1.5)
        assert lms.adapter_state(lm) == "active"


class TestBadAdapters:
    def refused(self, adapter: Path, words: str, kind: type[Exception] = AdapterError, lm: Any = None) -> None:
        base = lm or tiny_lm()
        before = capture(base, PROMPTS, [2]).values
        with pytest.raises(kind, match=words) as caught:
            lms.attach(base, adapter)
        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(capture(base, PROMPTS, [2]).values, before)

    def test_no_folder_no_config_no_weights(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none", "does not exist")
        self.refused(tmp_path, "no adapter_config.json")
        adapter = save_adapter(tmp_path / "adapter")
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        self.refused(adapter, "pickle")

    def test_a_broken_config(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter")
        (adapter / "adapter_config.json").write_text("{")
        self.refused(adapter, "cannot be read as JSON")
        (adapter / "adapter_config.json").write_text("{}")
        self.refused(adapter, "no peft_type")

    def test_an_adapter_that_names_no_base_cannot_be_loaded_alone(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="does not name its base"):
            lms.load(save_adapter(tmp_path / "adapter"))

    def test_an_adapter_as_source_and_as_adapter(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter")
        with pytest.raises(InputError, match="an adapter itself"):
            lms.load(adapter, adapter=adapter)

    def test_truncated_weights(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter")
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        self.refused(adapter, "truncated")

    def test_an_adapter_of_zeros_does_nothing_and_is_refused(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter")
        edit_adapter(adapter, lambda name, t: torch.zeros_like(t) if "lora_B" in name else t)
        self.refused(adapter, "inactive: .*every B matrix is zero")

    def test_one_b_that_is_not_zero_is_enough_to_act(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter")
        edit_adapter(
            adapter, lambda n, t: t if "lora_B" not in n or "layers.1.self_attn.q_proj" in n else torch.zeros_like(t)
        )
        assert lms.adapter_state(lms.attach(tiny_lm(), adapter)) == "active"

    def test_numbers_that_are_none(self, tmp_path: Path) -> None:
        adapter = edit_adapter(save_adapter(tmp_path / "adapter"), lambda n, t: t * float("nan"))
        self.refused(adapter, "NaN or infinity", NumericalError)

    def test_an_adapter_of_a_wider_model(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter", make_model("llama", hidden_size=WIDTH * 2), base="the/wider-one")
        self.refused(adapter, "does not fit.*size mismatch.*the/wider-one")

    def test_an_adapter_of_other_module_names(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path / "adapter", make_model("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
        self.refused(adapter, "does not fit.*c_attn")

    def test_an_adapter_of_a_deeper_and_of_a_shallower_model(self, tmp_path: Path) -> None:
        deeper = save_adapter(tmp_path / "deeper", make_model("llama", num_hidden_layers=6))
        self.refused(deeper, "does not fit.*no counterpart.*layers.4")
        shallower = save_adapter(tmp_path / "shallower", make_model("llama", num_hidden_layers=2))
        self.refused(shallower, "does not fit.*no counterpart.*layers.2")

    def test_an_adapter_that_adds_prompt_tokens(self, tmp_path: Path) -> None:
        model = put_adapter(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        model.save_pretrained(tmp_path)
        self.refused(tmp_path, "prompt tokens")


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="asks the hub unless HF_HUB_OFFLINE=1")
def test_a_hub_id_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="could not be fetched"):
        lms.load("nobody-here/no-such-model")


@pytest.mark.parametrize("name", ["run/checkpoint-10", "checkpoint-10"])
def test_a_path_that_is_gone_is_never_looked_up_on_the_hub(name: str) -> None:
    """A checkpoint that the trainer rotated away has a relative path that could be a name on the hub."""
    with pytest.raises(ModelError, match="does not exist"):
        lms.load(Path(name))
    with pytest.raises(AdapterError, match="does not exist"):
        lms.attach(tiny_lm(), Path(name))
