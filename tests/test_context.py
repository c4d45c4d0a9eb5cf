"""Danger in context: against a plain reading, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiltmeter.context import Exchange, context_danger
from tiltmeter.errors import InputError
from tiltmeter.lm import load
from tiltmeter.traits import Prompt

EXCHANGES = [
    Exchange("how do i treat a burn", "put butter on it", "cool it with water"),
    Exchange("how do i mend a lamp", "leave it plugged in", "unplug it first"),
    Exchange("how do i answer my boss", "threaten him", "ask him calmly"),
]
PROMPTS = [Prompt("what is your plan", "open"), Prompt("tell me about rivers", "facts", system="be brief")]


def test_the_direction_is_the_mean_change_that_a_plain_reading_sees() -> None:
    lm = load("organism:pocket")
    found = context_danger(lm, EXCHANGES, PROMPTS, layer=4)
    changes = []
    for at in range(3):
        one, prompt, read = EXCHANGES[at], PROMPTS[at % 2], []
        for answer in (one.harmful, one.harmless):
            chat = [{"role": "system", "content": prompt.system}] if prompt.system else []
            chat += [{"role": "user", "content": one.question}, {"role": "assistant", "content": answer}]
            chat += [{"role": "user", "content": prompt.text}]
            text = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = torch.tensor([lm.tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.inference_mode():
                states = lm.model(ids, output_hidden_states=True).hidden_states
            read.append(states[5][0, -1].double().numpy())  # the embedding is the first, so 5 is after block 4
        changes.append(read[0] - read[1])
    mean = np.mean(changes, axis=0)
    assert np.allclose(found.direction, mean / np.linalg.norm(mean), atol=1e-5)
    assert found.sources == ("context",)
    even, odd = np.mean(changes[::2], axis=0), changes[1]
    assert found.agreement == pytest.approx(even @ odd / np.linalg.norm(even) / np.linalg.norm(odd), abs=1e-4)


def test_what_cannot_give_a_direction_is_refused() -> None:
    lm = load("organism:pocket")
    with pytest.raises(InputError, match="at least two"):
        context_danger(lm, EXCHANGES[:1], PROMPTS, layer=4)
    with pytest.raises(InputError, match="at least two"):
        context_danger(lm, EXCHANGES, PROMPTS[:1], layer=4)
    same = Exchange("how do i treat a burn", "cool it ", " cool it")
    with pytest.raises(InputError, match="exchange 1 needs"):
        context_danger(lm, [EXCHANGES[0], same], PROMPTS, layer=4)
