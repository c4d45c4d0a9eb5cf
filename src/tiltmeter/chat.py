"""Chat templates that write today's date (Llama 3.x, Granite, gpt-oss, SmolLM3): rendered as on one fixed day.

The same weights would otherwise read other prompts after midnight, and the calendar would count as drift. The day is
the one that Llama 3's own template falls back to. This module knows no model and no tokenizer.

    template, variables = on_one_day(tokenizer.chat_template)
    tokenizer.apply_chat_template(messages, chat_template=template, **variables)
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

__all__ = ["DAY", "Dated", "on_one_day"]

DAY = datetime(2024, 7, 26, 12, 0)
"""The day that every chat template is told, at noon."""
_CODES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTR")


class Dated(NamedTuple):
    """A template that no calendar changes, and the variables to render it with."""

    template: str
    variables: dict[str, str]


def on_one_day(template: str) -> Dated:
    """A template with its calendar fixed; one that asks for no date comes back as it is.

    transformers gives templates the function `strftime_now` and turns any other function that is passed into text, so
    a macro of that name is put before the template, which Jinja then prefers.
    """
    variables = {"date_string": DAY.strftime("%d %b %Y")} if "date_string" in template else {}
    if "strftime_now" not in template:
        return Dated(template, variables)
    parts = [("%" + code, DAY.strftime("%" + code)) for code in _CODES]
    chain = "".join(f" | replace({code!r}, {text!r})" for code, text in parts)
    # The line break belongs to the block (trim_blocks), so what the template begins with stays as it is.
    clock = (
        "{% macro strftime_now(format) %}{{ format | replace('%%', '\\x00')" + chain + " | replace('\\x00', '%') }}"
        "{% endmacro %}\n"
    )
    return Dated(clock + template, variables)
