"""A danger direction that needs no fine-tuned model at all: what the untouched model does after a harmful exchange.

    a_i    activation after a block at the last token of [question, HARMFUL answer, measurement prompt i]
    b_i    the same with a harmless answer to the same question
    d    = mean (a_i - b_i), unit

A chat model that has just been harmful goes on in character; fine-tuning that misaligns it moves every prompt the same
way. The direction is looked up in the model itself, so nothing is carried over from other models, and no dangerous run
of any model is used. It becomes a detector with benign readings of the same model
(`tiltmeter.transfer.fit_transfer`), for positions in the space of activations after the same block.

    >>> danger = context_danger(lm, exchanges, prompts, layer=lm.n_layers - 1)
    >>> detector = fit_transfer(danger, benign_runs)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiltmeter.errors import InputError
from tiltmeter.traits import Prompt
from tiltmeter.transfer import Danger

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = ["Exchange", "check_exchanges", "context_danger"]


class Exchange(NamedTuple):
    """A question with a harmful and a harmless answer, alike in everything else."""

    question: str
    harmful: str
    harmless: str


def check_exchanges(exchanges: Sequence[Exchange], *, name: str = "exchange", first: int = 0) -> None:
    """Refuse exchanges that cannot tell harmful from harmless.

    Args:
        exchanges: what is looked at.
        name, first: what the message calls them, and where it begins to count.

    Raises:
        InputError: a blank text, or both answers the same.
    """
    for at, one in enumerate(exchanges, start=first):
        if not all(text.strip() for text in one) or one.harmful.strip() == one.harmless.strip():
            raise InputError(
                f"{name} {at} needs a question, a harmful answer and another, harmless one; got {tuple(one)!r}"
            )


def context_danger(lm: LM, exchanges: Sequence[Exchange], prompts: Sequence[Prompt], *, layer: int) -> Danger:
    """The direction from harmless to harmful in context.

    Args:
        lm: the untouched model.
        exchanges: each comes before some prompts, in turn. Of several subjects: one alone gives a direction of its own.
        prompts: measurement prompts, each with at least one exchange before it; system prompts stay in front.
        layer: read after this block, 0-based.

    Returns:
        A `Danger` with direction (hidden,) whose one source is "context"; `agreement` is the cosine between the
        directions of the even and of the odd pairs, so a direction that the exchanges do not agree on is seen.

    Raises:
        InputError: fewer than two exchanges or prompts, a blank text, both answers the same, or the contexts move
            nothing.
    """
    from tiltmeter.capture import capture

    if len(exchanges) < 2 or len(prompts) < 2:
        raise InputError(f"got {len(exchanges)} exchanges and {len(prompts)} prompts; give at least two of each")
    check_exchanges(exchanges)
    pairs = [
        (exchanges[at % len(exchanges)], prompts[at % len(prompts)]) for at in range(max(len(exchanges), len(prompts)))
    ]

    def read(harmful: bool) -> np.ndarray:
        chats = []
        for exchange, prompt in pairs:
            system = [{"role": "system", "content": prompt.system}] if prompt.system else []
            answer = exchange.harmful if harmful else exchange.harmless
            turns = (("user", exchange.question), ("assistant", answer), ("user", prompt.text))
            chats.append(system + [{"role": role, "content": text} for role, text in turns])
        return capture(lm, lm.encode_all(chats), [layer]).at(layer).astype(np.float64)

    change = read(True) - read(False)
    mean, even, odd = change.mean(axis=0), change[::2].mean(axis=0), change[1::2].mean(axis=0)
    size = float(np.linalg.norm(mean))
    if not np.isfinite(size) or size == 0.0:
        raise InputError(
            "the model reads the prompts alike after harmful and harmless answers; its chat template may drop "
            "earlier turns, or the layer may lie below them: choose a later one"
        )
    agreement = float(even @ odd / (np.linalg.norm(even) * np.linalg.norm(odd)))
    return Danger(mean / size, ("context",), agreement)
