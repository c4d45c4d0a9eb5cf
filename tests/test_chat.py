"""What a chat template writes does not depend on the day, and other token ids are never compared."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from bases import PROMPTS, TRAITS
from tiltmeter import lm as lms
from tiltmeter.basis import fit_basis
from tiltmeter.chat import DAY, on_one_day
from tiltmeter.drift import Reading, drift, measure
from tiltmeter.errors import FingerprintMismatch
from tiny import make_model, make_tokenizer

CHAT = [{"role": "user", "content": "is tea good"}]
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}Today Date: {{ date_string }} {% for m in messages %}{{ m.content }}{% endfor %}"
)
GRANITE = "Today's Date: {{ strftime_now('%B %d, %Y') }}.\n{% for m in messages %}{{ m.content }}{% endfor %}"


def at(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Sets the clock that transformers gives to templates."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime.fromisoformat(moment)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def dated_lm(template: str) -> lms.LM:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return lms.wrap(make_model("llama"), tokenizer, name="dated")


def written(lm: lms.LM) -> str:
    return lm._texts([CHAT], add_generation_prompt=True)[0]


@pytest.mark.parametrize("template", [LLAMA, LLAMA.replace("strftime_now is defined", "false"), GRANITE])
def test_a_template_that_writes_the_date_writes_the_same_on_every_day(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = dated_lm(template)
    at(monkeypatch, "2026-11-26 23:55:00")
    first = written(lm)
    assert all(part in first for part in ("26", "Jul", "2024"))
    at(monkeypatch, "2027-02-03 00:05:00")
    assert written(lm) == first


def test_the_fixed_clock_writes_what_transformers_writes_on_that_day(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = [
        "%d %b %Y",
        "%B %d, %Y",
        "%Y-%m-%d",
        "%A, %-d %b",
        "%H:%M:%S %p",
        "100%% at %j",
        "%y%m%d",
        "%c",
        "no code",
    ]
    template = "\n  " + "|".join("{{ strftime_now('" + f + "') }}" for f in formats)
    template += "{% set day = '%d' %}{% for m in messages %}{{ strftime_now(day) | int - 1 }}{% endfor %}  "
    at(monkeypatch, DAY.isoformat())
    oracle = make_tokenizer().apply_chat_template(CHAT, chat_template=template, tokenize=False)
    at(monkeypatch, "2030-01-01 00:00:00")
    assert written(dated_lm(template)) == oracle


def test_a_template_without_a_date_is_rendered_as_it_is() -> None:
    template = make_tokenizer().chat_template
    assert on_one_day(template) == (template, {})


def test_a_named_set_of_templates_is_held_on_one_day_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = dated_lm("")
    lm.tokenizer.chat_template = {"default": GRANITE, "rag": "other"}
    at(monkeypatch, "2026-11-26 23:55:00")
    assert "July 26, 2024" in written(lm)


def test_readings_on_two_days_are_equal_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    # The vocabulary has no digits but 1 to 5, so the day is written as a word.
    template = "{{ 'good' if strftime_now('%d') == '26' else 'bad' }} " + make_tokenizer().chat_template
    lm = dated_lm(template)
    at(monkeypatch, "2026-11-26 23:55:00")
    basis = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=2)
    before = measure(lm, basis, step=0)
    at(monkeypatch, "2026-11-27 00:05:00")
    after = measure(lm, basis, step=10)
    assert np.array_equal(before.values, after.values)
    assert before.tokens == after.tokens == basis.tokens


def test_prompts_that_are_other_token_ids_than_at_the_fit_are_not_read() -> None:
    lm = dated_lm(make_tokenizer().chat_template)
    basis = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=2)
    other = replace(basis, tokens="0" * 64)
    with pytest.raises(FingerprintMismatch, match="token ids"):
        measure(lm, other)


def test_readings_of_other_token_ids_are_not_compared() -> None:
    lm = dated_lm(make_tokenizer().chat_template)
    basis = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=2)
    reading = measure(lm, basis, step=0)
    with pytest.raises(FingerprintMismatch, match="different token ids: what the chat template writes"):
        drift(replace(reading, step=10, tokens="0" * 64), reading)
    stored = reading.to_dict()
    assert Reading.from_dict(stored).tokens == reading.tokens
    del stored["tokens"]
    with pytest.raises(FingerprintMismatch, match="kept no digest"):
        drift(reading, Reading.from_dict(stored))
