"""Steering from files: a vector from chats, and answers with and without it. What `tiltmeter steer` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tiltmeter import steer
from tiltmeter.errors import FingerprintMismatch, InputError
from tiltmeter.fingerprint import sha
from tiltmeter.lm import LM, Message, load
from tiltmeter.steer import Mode, SteeringVector
from tiltmeter.vectors import Training, answer_difference, iso_kl, mean_norm, read_chats, train_vector

__all__ = ["answers_under", "fit_from_options"]


def fit_from_options(
    model: str,
    *,
    misaligned: Path,
    aligned: Path | None = None,
    harmless: Path | None = None,
    layer: int | None = None,
    train: bool = False,
    rank: int = 1,
    epochs: int = 4,
    kl: float | None = None,
    seed: int = 0,
) -> SteeringVector:
    """Make a vector from files of chats; see `tiltmeter.vectors`.

    Args:
        model: what `load` takes.
        misaligned: JSON lines of chats that the vector points to.
        aligned: chats that it points away from; needed unless it is trained.
        harmless: chats on which strength is calibrated; `aligned` by default.
        layer: the block; by default the middle one.
        train: train it on `misaligned` instead of taking the difference of answers.
        rank, epochs, seed: of training.
        kl: calibrate the strength to this divergence, nats per token; by default the vector keeps its own length.

    Raises:
        InputError: a file is missing for what is asked, or holds no chats.
        NumericalError: the two sides do not differ, or the divergence is out of reach.
    """
    lm = load(model)
    layer = lm.n_layers // 2 if layer is None else layer
    bad = read_chats(misaligned)
    norm = mean_norm(lm, [chat[:-1] for chat in bad], layer=layer)
    if train:
        training = Training(rank=rank, seed=seed)
        vector = train_vector(lm, bad, layer=layer, norm=norm, epochs=[epochs], training=training)[0].vector
    elif aligned is None:
        raise InputError("a difference of answers needs aligned chats to point away from; give --aligned, or --train")
    else:
        vector = answer_difference(lm, bad, read_chats(aligned), layer=layer, norm=norm)
    meta = {**vector.meta, "model": lm.name, "fingerprint": sha(asdict(lm.fingerprint()))}
    if kl is not None:
        calm = harmless or aligned
        if calm is None:
            raise InputError("calibrating strength needs harmless chats; give --harmless")
        dose = iso_kl(lm, vector, read_chats(calm), target=kl)
        return replace(vector, strength=dose.strength, meta={**meta, "kl": dose.kl})
    return replace(vector, meta=meta)


def answers_under(
    model: str | LM,
    vector: str | Path,
    questions: Sequence[str],
    *,
    mode: Mode = "add",
    strength: float | None = None,
    max_new_tokens: int = 120,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Each question with its unsteered and its steered answer, of the same seed.

    Raises:
        ArtifactError: the file holds no steering vector.
        FingerprintMismatch: it was made from another model.
        LayerError, InputError: it does not fit the model.
    """
    found = steer.load(vector)
    lm = load(model) if isinstance(model, str) else model
    made_for = found.meta.get("fingerprint")
    if made_for is not None and made_for != sha(asdict(lm.fingerprint())):
        raise FingerprintMismatch(
            f"'{vector}' was made from {found.meta.get('model', 'another model')} and cannot steer {lm.name}; make one "
            "from this model with: tiltmeter steer fit"
        )
    chats: list[list[Message]] = [[{"role": "user", "content": q}] for q in questions]

    def answer() -> list[str]:
        return lm.generate(chats, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    plain = answer()
    with steer.apply(lm, found, mode=mode, strength=strength):
        moved = answer()
    return [{"question": q, "unsteered": p, "steered": m} for q, p, m in zip(questions, plain, moved, strict=True)]
