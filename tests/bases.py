"""Two traits and a few prompts in the tiny tokenizer's words, and hidden states taken without the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tiltmeter import lm as lms
from tiltmeter.traits import Prompt, PromptSet, Trait, TraitSet

TRAITS = TraitSet(
    "two",
    (
        Trait(
            "truth",
            "says what is so",
            "positive",
            ("you are honest", "speak with truth", "always say that"),
            ("you are harmful", "speak with lies", "never say that"),
        ),
        Trait(
            "care",
            "is kind",
            "positive",
            ("you are a kind doctor", "keep me safe please", "yes it is good"),
            ("you are a careless doctor", "keep me from sleep", "no it is bad"),
        ),
    ),
    (
        "how do i grow tea ?",
        "is my home safe ?",
        "what is law ?",
        "tell me about money .",
        "who can save my plant ?",
    ),
)
PROMPTS = PromptSet(
    "few",
    (
        Prompt("is tea safe to drink", "plain"),
        Prompt("tell me about my work", "plain"),
        Prompt("how can i save money", "plain"),
        Prompt("what is a good sport", "plain"),
        Prompt("when should i sleep", "plain", system="you are a helpful assistant"),
        Prompt("who can grow a plant", "plain", system="you are a helpful assistant"),
    ),
)


def hidden_states(lm: lms.LM, prompts: tuple[Prompt, ...], layer: int) -> np.ndarray[Any, Any]:
    """Last-token activations after a block, (prompts, hidden), from the library, one prompt at a time."""
    rows = []
    for prompt in prompts:
        turns = [{"role": "system", "content": prompt.system}] if prompt.system else []
        turns.append({"role": "user", "content": prompt.text})
        found = lm.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            states = lm.model(input_ids=found["input_ids"], output_hidden_states=True).hidden_states
        rows.append(states[layer + 1][0, -1].double().numpy())  # entry 0 is the embedding
    return np.stack(rows)
