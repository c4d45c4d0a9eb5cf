"""Keeping a danger direction out of a model: while it is fine-tuned, or when it answers.

    preventative steering     during training the direction is added after a block (persona vectors, arXiv 2507.21509,
                              Sec. 6), or projected out of it (concept ablation fine-tuning, arXiv 2507.16795): with the
                              first the weights need not learn the direction, with the second they cannot use it.
                              Nothing is added or taken away when the trained model answers.
                              "clamp" holds it where benign answers have it: nothing can be told by it, and nothing
                              looks other than it does when the model answers
    anchoring                 no steering, but regularisation: beside it or instead of it, the model is kept near its
                              untouched self on benign chats of other domains
    ablation at inference     the direction is projected out of a block's output while the model answers (Soligo et
                              al., arXiv 2506.11618)

Both take the vectors as they are and know nothing of where they come from.

    trainer = SFTTrainer(..., callbacks=[PreventativeSteering(vectors, mode="ablate"), TiltmeterCallback(basis)])
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from tiltmeter.errors import InputError
from tiltmeter.lm import LM, Message, wrap
from tiltmeter.steer import Mode, SteeringVector, apply
from tiltmeter.vectors import anchor_gradient

__all__ = ["Anchor", "PreventativeSteering", "steered"]


@contextlib.contextmanager
def steered(lm: LM, vectors: Sequence[SteeringVector], *, mode: Mode) -> Iterator[None]:
    """Several vectors at once, each after its own block.

    Raises:
        InputError: two vectors for one block, where the order would matter: give one with more rows.
    """
    layers = [vector.layer for vector in vectors]
    if len(set(layers)) < len(layers):
        raise InputError(f"got vectors for blocks {layers}; give at most one a block, with more rows if need be")
    with contextlib.ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(apply(lm, vector, mode=mode))
        yield


class PreventativeSteering(TrainerCallback):  # type: ignore[misc]
    """Steers a model in the forward and backward passes of its training steps, and nowhere else.

    The hooks come off before the optimizer steps, so evaluation, generation and the readings of `TiltmeterCallback`
    see the model as it will be used. With gradient accumulation they stay on for all passes of a step.
    """

    def __init__(self, vectors: Sequence[SteeringVector], *, mode: Mode = "ablate", tokenizer: Any = None) -> None:
        """Set up; nothing is hooked before the first step.

        Args:
            vectors: at most one for a block; "add" uses each one's own strength, positive toward the danger.
            mode: "add", "ablate" or "clamp".
            tokenizer: where the trainer was given no `processing_class`.

        Raises:
            InputError: no vectors.
        """
        if not vectors:
            raise InputError("preventative steering needs at least one vector; give the danger direction of a block")
        self.vectors = tuple(vectors)
        self.mode: Mode = mode
        self.tokenizer = tokenizer
        self._hooks = contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the hooks on.

        Raises:
            LayerError, InputError: the vectors do not fit the model.
        """
        self._hooks.close()
        lm = wrap(kwargs["model"], kwargs.get("processing_class") or self.tokenizer)
        self._hooks.enter_context(steered(lm, self.vectors, mode=self.mode))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take them off."""
        self._hooks.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take them off, for trainers that do not announce the optimizer's step."""
        self._hooks.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take them off."""
        self._hooks.close()


class Anchor(TrainerCallback):  # type: ignore[misc]
    """Keeps a LoRA fine-tune near its untouched self elsewhere: adds the gradient of KL(untouched || tuned) on a batch
    of benign chats before each optimizer step. Regularisation, which needs benign chats; `PreventativeSteering` needs
    none."""

    def __init__(
        self, chats: Sequence[Sequence[Message]], *, weight: float = 1.0, batch: int = 16, seed: int = 0,
        tokenizer: Any = None,
    ) -> None:  # fmt: skip
        """Set up.

        Args:
            chats: benign ones, each ending with its answer, of all that the model should go on doing as before.
            weight: of the divergence, in nats per token, beside the trainer's own loss.
            batch: chats drawn for each step.
            seed: of the draw.
            tokenizer: where the trainer was given no `processing_class`.

        Raises:
            InputError: no chats.
        """
        if not chats:
            raise InputError("an anchor needs chats on which the model should stay as it is; give at least one")
        self.chats = tuple(chats)
        self.weight = weight
        self.batch = batch
        self.tokenizer = tokenizer
        self._rng = np.random.default_rng(seed)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient.

        Raises:
            InputError: the model has no adapter that can be switched off.
        """
        lm = wrap(kwargs["model"], kwargs.get("processing_class") or self.tokenizer)
        chosen = [self.chats[i] for i in self._rng.integers(len(self.chats), size=self.batch)]
        anchor_gradient(lm, chosen, self.weight)
