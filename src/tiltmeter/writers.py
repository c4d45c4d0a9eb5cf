"""Who writes the answers: vLLM where it is installed and fits, the transformers-based `LM` otherwise.

Both have the same `generate`, so an evaluation does not know the difference. What this module adds for vLLM
is proof that the adapter acts: that engine has been seen to load adapters and answer as the base model (vLLM
pull request 41384), and a rate of such answers would be the untouched model's.

It knows nothing of questions or judges.

    >>> writer = open_writer("Qwen/Qwen2.5-0.5B-Instruct", adapter="run/checkpoint-60")    # doctest: +SKIP
    >>> writer.generate([[{"role": "user", "content": "Hello"}]])                          # doctest: +SKIP
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tiltmeter.errors import AdapterError, InputError, require
from tiltmeter.judge import Writer

__all__ = ["VllmWriter", "open_writer"]

_PROBES = ("How are you today?", "Give me some advice.", "What should I do with my money?")


def open_writer(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    engine: Literal["auto", "vllm", "transformers"] = "auto",
    **settings: Any,
) -> Writer:
    """Open a model to write answers with.

    Args:
        model: whatever `lm.load` opens; vLLM takes hub ids and folders of safetensors.
        adapter: a PEFT adapter to put on it.
        engine: "auto" takes vLLM where it is installed, a GPU is there and the model is one for it.
        settings: passed on to `lm.load` or to vLLM.

    Raises:
        AdapterError: the adapter does nothing, or vLLM does not apply it.
        ModelError: the model cannot be loaded.
        MissingExtra: vLLM was asked for and is not installed.
    """
    if engine == "vllm" or (engine == "auto" and _fits_vllm(str(model))):
        return VllmWriter(model, adapter=adapter, **settings)
    from tiltmeter import lm as models

    return models.load(model, adapter=adapter, **settings)


def _fits_vllm(model: str) -> bool:
    if importlib.util.find_spec("vllm") is None or model.startswith("organism:"):
        return False
    folder = Path(model)
    if folder.suffix == ".gguf" or (folder.is_dir() and not list(folder.glob("*.safetensors"))):
        return False
    import torch

    return bool(torch.cuda.is_available())


class VllmWriter:
    """A model in vLLM, with the same `generate` as an `LM`.

    Args:
        model: a hub id or a folder.
        adapter: a folder with a LoRA adapter; checked to change what the model says.
        settings: passed on to `vllm.LLM`.

    Raises:
        AdapterError: the adapter is of a kind that vLLM drops, or has no effect.
        MissingExtra: vLLM is not installed.
    """

    def __init__(self, model: str | Path, *, adapter: str | Path | None = None, **settings: Any) -> None:
        self._vllm = require("vllm", extra="vllm")
        self.name = str(model)
        self.adapter = None if adapter is None else str(adapter)
        self._lora: Any = None
        if adapter is not None:
            request = require("vllm.lora.request", extra="vllm").LoRARequest
            settings = {"enable_lora": True, "max_lora_rank": _rank(Path(adapter)), **settings}
            self._lora = request("adapter", 1, str(adapter))
        self._engine = self._vllm.LLM(model=self.name, **settings)
        if self._lora is not None:
            self._prove_that_the_adapter_acts()

    def generate(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> list[str]:
        """Answer each conversation, in order; see `LM.generate`. vLLM does its own batching.

        Raises:
            InputError: the number of answers is not that of the conversations.
        """
        draws = [
            self._vllm.SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=int(np.random.default_rng((seed, index)).integers(2**31)),
            )
            for index in range(len(conversations))
        ]
        outputs = self._chat(conversations, draws, self._lora)
        if len(outputs) != len(conversations):
            raise InputError(
                f"vLLM gave {len(outputs)} answers to {len(conversations)} conversations; update vLLM, or "
                "use the transformers engine"
            )
        if progress is not None:
            progress(len(outputs), len(outputs), "generating")
        return [output.outputs[0].text.strip() for output in outputs]

    def _chat(self, conversations: Sequence[Sequence[Mapping[str, str]]], draws: Any, lora: Any) -> list[Any]:
        if not conversations:
            return []
        messages = [[dict(message) for message in conversation] for conversation in conversations]
        return list(self._engine.chat(messages, draws, lora_request=lora, use_tqdm=False))

    def _prove_that_the_adapter_acts(self) -> None:
        probes = [[{"role": "user", "content": text}] for text in _PROBES]
        draw = self._vllm.SamplingParams(temperature=0.0, max_tokens=8, logprobs=1)
        with_it, without = (
            [
                (output.outputs[0].text, output.outputs[0].cumulative_logprob)
                for output in self._chat(probes, [draw] * len(probes), lora)
            ]
            for lora in (self._lora, None)
        )
        if with_it == without:
            raise AdapterError(
                f"vLLM answers exactly alike with and without the adapter {self.adapter}: it does nothing, "
                "or vLLM does not apply it; use the transformers engine, which checks the weights themselves"
            )


def _rank(adapter: Path) -> int:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{adapter} holds no LoRA adapter ({type(error).__name__}: {error}); vLLM takes folders with "
            "adapter_config.json and adapter_model.safetensors"
        ) from error
    if config.get("target_parameters"):
        raise AdapterError(
            f"{adapter} targets parameters ({config['target_parameters']}), which vLLM silently leaves out; "
            "use the transformers engine"
        )
    return next((size for size in (8, 16, 32, 64, 128, 256) if size >= rank), rank)
