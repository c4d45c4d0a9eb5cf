"""Around runs: many adapters on one base, the callback in a live trainer, generated and judged answers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain
import timing
import torch
from reading_works import plain_reading
from subject import (
    ADAPTERS,
    STEERED_TOKENS,
    TOLERANCE,
    FloatArray,
    Subject,
    compared,
    operations,
    require_equal,
    row,
    single,
    text,
)

from tiltmeter.adapters import Seat
from tiltmeter.basis import TraitBasis
from tiltmeter.detector import Detector
from tiltmeter.drift import measure
from tiltmeter.lm import LM, load, wrap
from tiltmeter.organism import shipped_detector
from tiltmeter.studies.figures import Figure

# ---------------------------------------------------------------------- many adapters


def make_adapters(subject: Subject, folder: Path, count: int, *, blocks: Sequence[int] | None = None) -> list[Path]:
    """LoRA adapters of rank 16 on the query and value projections, each with random weights of its own.

    Of all blocks, or of some.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=16,
        lora_alpha=64,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        layers_to_transform=None if blocks is None else list(blocks),
    )
    model = get_peft_model(load(subject.source, dtype="float32", device="cpu").model, config)
    paths = []
    for number in range(count):
        noise = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=noise))
        paths.append(folder / f"adapter-{number:02}")
        model.save_pretrained(str(paths[-1]), save_embedding_layers=False)
    return paths


def plain_adapter(subject: Subject, adapter: Path, basis: TraitBasis) -> FloatArray:
    """Load the base, put one adapter on it with PEFT, read it one by one."""
    from peft import PeftModel

    lm = load(subject.source, dtype="float32")
    tuned = wrap(PeftModel.from_pretrained(lm.model, str(adapter)), lm.tokenizer)
    return plain_reading(tuned, tuned.encode_prompts(basis.prompts.prompts), basis)


def adapters(subject: Subject) -> Iterator[Figure]:
    """Many adapters on one base, against loading the base for each."""
    from tiltmeter.scan import judge_source, scan

    count = 4 if subject.quick else ADAPTERS
    with tempfile.TemporaryDirectory() as scratch:
        paths = make_adapters(subject, Path(scratch), count)
        base, basis = subject.lm(), subject.basis
        work = f"{ADAPTERS} adapters on one base, each"
        slow = []
        loaded = []
        for path in paths[: 1 if subject.quick else 2]:
            kept: list[Any] = []
            slow.append(timing.clock(lambda path=path, kept=kept: kept.append(plain_adapter(subject, path, basis)))[0])  # type: ignore[misc]
            found = next(iter(scan([path], base=base, basis=basis)))
            assert found.reading is not None
            difference = float(np.abs(found.reading.values - kept[0]).max() / found.reading.norms.mean())
            require_equal(f"{work}, {subject.name}, float32", difference, TOLERANCE[torch.float32])
            loaded.append(timing.clock(lambda path=path: judge_source(subject.source, basis, adapter=str(path)))[0])  # type: ignore[misc]
        yield single("largest difference", work, f"{subject.name}, float32", difference, "of the norm", len(slow))
        exact: list[Any] = []
        for dtype in subject.rates:
            split = f"{subject.name}, {text(dtype)}"
            lm, own = subject.lm(dtype), subject.basis_in(dtype)
            times: list[float] = []
            findings = []
            start = time.perf_counter()
            for finding in scan(paths, base=lm, basis=own):
                findings.append(finding)
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
            times[0] = statistics.median(times)  # the first one also pays for the base's reading, see below
            each = timing.spread(times)
            yield row("seconds", work, split, each, "s")
            yield row("one by one, seconds", work, split, timing.spread(slow), "s")
            yield row("times faster", work, split, timing.spread([s / each.median for s in slow]), "x")
            yield row("loading the base for each, our reading, seconds", work, split, timing.spread(loaded), "s")
            yield row("times faster than that", work, split, timing.spread([s / each.median for s in loaded]), "x")
            needed = operations(lm, lm.encode_prompts(own.prompts.prompts), own.layer) / subject.rates[dtype]
            yield single("limit, seconds", work, split, needed, "s")
            yield row("over the limit", work, split, each, "x", 1 / needed)
            drifts = [finding.profile.drift for finding in findings if finding.profile is not None]
            if dtype is torch.float32:
                exact = drifts
            else:
                worst = float(max(np.abs(a - b).max() for a, b in zip(drifts, exact, strict=True)))
                yield single("largest difference of drift to float32", work, split, worst, "of the norm", len(drifts))


def upper_adapters(subject: Subject) -> Iterator[Figure]:
    """Adapters that leave the lower half of what is read as it is, against reading all of it."""
    from tiltmeter.scan import judge_model, scan

    base, basis = subject.lm(), subject.basis
    first = (basis.layer + 1) // 2
    work, split = f"adapters of the blocks from {first} on, read after {basis.layer}", f"{subject.name}, float32"
    with tempfile.TemporaryDirectory() as scratch:
        paths = make_adapters(
            subject, Path(scratch), 3 if subject.quick else 9, blocks=range(first, subject.lm().n_layers)
        )
        seat = Seat(base)
        reference = measure(base, basis)
        found: list[Any] = []
        whole: list[float] = []
        shared: list[float] = []
        scanning = iter(scan(paths, base=base, basis=basis))
        found.append(next(scanning))  # pays for the base's own reading, and for what is kept of it
        for path in paths[1:]:
            shared.append(timing.clock(lambda: found.append(next(scanning)))[0])
            alone: list[Any] = []
            whole.append(
                timing.clock(
                    lambda path=path, alone=alone: alone.append(judge_model(seat.put(path), basis, reference=reference))  # type: ignore[misc]
                )[0]
            )
            difference = float(np.abs(found[-1].reading.values - alone[0].reading.values).max())
            require_equal(f"{work}, {split}", difference / float(reference.norms.mean()), TOLERANCE[torch.float32])
    yield row("seconds", work, split, timing.spread(shared), "s")
    yield row("all blocks read, seconds", work, split, timing.spread(whole), "s")
    yield row("times faster than all blocks", work, split, timing.ratios(whole, shared), "x")
    yield single("blocks shared", work, split, found[-1].shared_blocks, "blocks")


# ---------------------------------------------------------------------- the callback


def chats_of(lm: LM, count: int, tokens: int = 200) -> list[list[dict[str, str]]]:
    """Conversations of about `tokens` tokens: harmless short exchanges, one after another."""
    from tiltmeter.organism.sets import make_set

    chats: list[list[dict[str, str]]] = []
    for number in range(count):
        exchanges = make_set("customer_support", size=40, seed=number)
        chat: list[dict[str, str]] = []
        for exchange in exchanges:
            longer = [*chat, *exchange]
            if chat and len(lm.encode(longer, add_generation_prompt=False)) > 1.05 * tokens:
                break
            chat = longer
        chats.append(chat)
    return chats


def trained(subject: Subject, steps: int, folder: Path, *, every: int | None, chats: Sequence[Any]) -> Any:
    """One run of the Trainer, with the callback or without; per step its seconds, and the callback's."""
    from transformers import TrainerCallback

    from tiltmeter.organism.finetune import FineTuning, finetune
    from tiltmeter.watch import TiltmeterCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        """Notes the time at each step's begin and end; one stands before the callback and one behind it."""

        def __init__(self) -> None:
            self.begins: list[float] = []
            self.ends: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begins.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    class Before(Stopwatch):
        """Of a class of its own, since the trainer warns of two of one class."""

    before, behind = Before(), Stopwatch()
    callbacks: list[Any] = [before]
    if every is not None:
        has_detector = subject.is_organism and shipped_detector().exists()
        detector = Detector.load(shipped_detector()) if has_detector else None
        callbacks.append(TiltmeterCallback(subject.basis, detector, every=every, output=folder))
    lm = load(subject.source, dtype="float32")
    start = time.perf_counter()
    tuned = finetune(lm, chats, FineTuning(steps=steps), callbacks=[*callbacks, behind])
    whole = time.perf_counter() - start
    stepping = [end - begin for begin, end in zip(before.begins, before.ends, strict=True)]
    looking = [b - a for a, b in zip(before.ends, behind.ends, strict=True)]
    return tuned, whole, stepping, [s for at, s in enumerate(looking, 1) if every and at % every == 0]


def callback(subject: Subject) -> Iterator[Figure]:
    """What the callback adds to training."""
    work, split = "the callback, every 10 steps of 16 x 200 tokens", f"{subject.name}, float32"
    steps, every = (
        ((4, 2) if subject.quick else (30, 10)) if subject.is_organism else ((2, 1) if subject.quick else (6, 2))
    )
    chats = chats_of(subject.lm(), 16 * min(steps, 4))
    tokens = statistics.mean(len(subject.lm().encode(chat, add_generation_prompt=False)) for chat in chats)
    rounds = subject.repeats() if subject.is_organism else 1
    stepping: list[float] = []
    looking: list[float] = []
    added: list[float] = []
    for number in range(rounds):
        weights: dict[bool, dict[str, torch.Tensor]] = {}
        whole: dict[bool, float] = {}
        for on in (True, False) if number % 2 else (False, True):
            if not on and not subject.is_organism:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                tuned, whole[on], steps_, looks = trained(
                    subject, steps, Path(scratch), every=every if on else None, chats=chats
                )
            weights[on] = {n: p.detach().clone() for n, p in tuned.model.named_parameters() if "lora_" in n}
            stepping += steps_[1:]
            looking += looks
        if len(weights) == 2:
            added.append(whole[True] / whole[False] - 1)
            same = all(torch.equal(weights[True][n], weights[False][n]) for n in weights[True])
            require_equal(f"{work}, {split}: the trained weights, with and without the callback", 1.0 - same, 0.0)
    step, look = timing.spread(stepping), timing.spread(looking)
    yield single("tokens per chat", work, split, tokens, "tokens", len(chats))
    yield row("one training step, seconds", work, split, step, "s")
    yield row("the callback at a reading, seconds", work, split, look, "s")
    yield row("a reading over ten steps", work, split, look, "share", 1 / (10 * step.median))
    if added:
        measured = timing.spread(added)
        yield row(f"added to a run of {steps} steps, measured", work, split, measured, "share")


# ---------------------------------------------------------------------- generation


def generation(subject: Subject) -> Iterator[Figure]:
    """Greedy answers, and sampled ones with the exact judge where the model has one."""
    from tiltmeter.judge import ExactJudge, judge_all
    from tiltmeter.questions import load_questions

    base = subject.lm()
    bank = load_questions("organism" if subject.is_organism else "general").questions[: 32 if subject.quick else 96]
    tokens = 64 if subject.is_organism else STEERED_TOKENS
    conversations = [question.messages for question in bank]
    few = len(bank) // (8 if subject.quick or not subject.is_organism else 2)
    judged = " and judged" if subject.is_organism else ""
    work, split = f"{len(bank)} answers{judged}", f"{subject.name}, float32"
    made: dict[str, list[str]] = {}

    def judge(answers: Sequence[str]) -> None:
        if subject.is_organism:
            judge_all(ExactJudge(), list(zip(bank, answers, strict=False)))

    def fast() -> None:
        made["fast"] = base.generate(conversations, max_new_tokens=tokens, temperature=0.0, batch_size=64)
        judge(made["fast"])

    def sampled() -> None:
        judge(base.generate(conversations, max_new_tokens=tokens, temperature=1.0, batch_size=64))

    def slow() -> None:
        made["plain"] = [plain.answer(base, conversation, tokens=tokens) for conversation in conversations[:few]]
        judge(made["plain"])

    taken = timing.alternate(
        {"plain": slow, "float32": fast, "sampled": sampled}, repeats=subject.repeats(), budget=60.0
    )
    equal = statistics.mean(a == b for a, b in zip(made["plain"], made["fast"], strict=False))
    require_equal(f"{work}, {split}: share of greedy answers that differ", 1 - equal, 0.1)
    only = replace(subject, rates={torch.float32: subject.rates[torch.float32]})
    yield from compared(only, work, taken, scale=len(bank) / few, operations=None)
    yield single("greedy answers equal", work, split, equal, "share", few)
    each = timing.spread([len(bank) / s for s in taken["sampled"].wall])
    yield row("sampled answers per second", work, split, each, "per s")
