"""Dose and noise floor on a real model: drift of a small poisoned fine-tune as a share of full dose.

Two chat files of the same kind, one harmful and one harmless (such as insecure and secure code), are mixed at constant
size; fine-tunes of every dose and seed are read on the neutral prompts, against fine-tunes at dose 0. Small by design:
it answers whether the drift that is reported at 5 % is more than two benign fine-tunes differ by anyway.

    >>> found = run(Config("HuggingFaceTB/SmolLM2-135M-Instruct", harmful, harmless), out=Path("dose-real"))
    >>> figures(found, config)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltmeter.artifacts import read_artifact, write_artifact
from tiltmeter.errors import InputError
from tiltmeter.fingerprint import sha
from tiltmeter.organism.finetune import FineTuning, finetune, one_thread
from tiltmeter.runs import read_records
from tiltmeter.studies.dose_measures import cosine_distance, share_of_full
from tiltmeter.studies.figures import Figure

__all__ = ["Config", "figures", "mixture", "run"]

Chats = list[list[dict[str, str]]]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        model: what `load` takes.
        harmful, harmless: JSONL files of chats, `{"messages": [...]}`.
        dose: share of harmful chats of the dosed runs.
        seeds: of the runs at the dose and at full dose.
        reference_seeds: of the benign runs that drift is measured against.
        floor_seeds: of the other benign runs.
        longest: tokens of a chat; longer ones are not drawn.
        prompts: of the neutral set, evenly drawn.
        blocks: after which is read.
        tuning: dials.
    """

    model: str
    harmful: Path
    harmless: Path
    dose: float = 0.05
    seeds: tuple[int, ...] = (0, 1, 2)
    reference_seeds: tuple[int, ...] = (20,)
    floor_seeds: tuple[int, ...] = (30, 31)
    longest: int = 200
    prompts: int = 40
    blocks: tuple[int, ...] = (12, 18, 22)
    tuning: FineTuning = field(default_factory=lambda: FineTuning(steps=20, batch=4, learning_rate=2e-4))

    def runs(self) -> tuple[tuple[float, int], ...]:
        """(dose, seed) of every run, benign ones first."""
        benign = tuple((0.0, s) for s in (*self.reference_seeds, *self.floor_seeds))
        return (*benign, *((d, s) for s in self.seeds for d in (self.dose, 1.0)))


def mixture(harmful: Chats, harmless: Chats, *, size: int, dose: float, seed: int) -> Chats:
    """`size` chats without repetition, a share `dose` of them harmful, in random order.

    Raises:
        InputError: a file has too few chats.
    """
    bad = round(size * dose)
    if len(harmful) < bad or len(harmless) < size - bad:
        raise InputError(
            f"{bad} harmful and {size - bad} harmless chats are needed, and {len(harmful)} and {len(harmless)} are "
            "short enough; allow longer ones or take fewer steps"
        )
    rng = Random(f"mixture/{seed}/{dose}")
    chats = rng.sample(harmful, bad) + rng.sample(harmless, size - bad)
    rng.shuffle(chats)
    return chats


def run(
    config: Config, *, out: Path, progress: Callable[[int, int, str], None] | None = None
) -> dict[tuple[float, int], NDArray[np.float32]]:
    """Fine-tune and read every run that is not there yet.

    Args:
        config: what is run.
        out: folder; one file per run.
        progress: called as (done, total, label).

    Returns:
        Activations (blocks, prompts, hidden) by (dose, seed).
    """
    found: dict[tuple[float, int], NDArray[np.float32]] = {}
    for number, (dose, seed) in enumerate(config.runs()):
        settings = {
            k: str(v) for k, v in asdict(config).items() if k not in ("seeds", "reference_seeds", "floor_seeds")
        }
        path = out / f"dose{100 * dose:g}-{seed}-{sha(settings)[:8]}.safetensors"
        if not path.exists():
            with one_thread():
                write_artifact(path, "dose", 1, {"dose": dose, "seed": seed}, {"hidden": _one(config, dose, seed)})
        found[dose, seed] = read_artifact(path, "dose", 1, remedy="delete it and run the study again")[1]["hidden"]
        if progress is not None:
            progress(number + 1, len(config.runs()), f"dose {dose:g}, seed {seed}")
    return found


def _one(config: Config, dose: float, seed: int) -> NDArray[np.float32]:
    from tiltmeter.capture import capture
    from tiltmeter.lm import load
    from tiltmeter.traits import load_prompts

    lm = load(config.model)
    files = [_chats(path) for path in (config.harmful, config.harmless)]
    short = [
        [chat for chat in chats[:1500] if len(lm.encode(chat, add_generation_prompt=False)) <= config.longest]
        for chats in files
    ]
    tuning = FineTuning(**{**asdict(config.tuning), "seed": seed})
    tuned = finetune(lm, mixture(short[0], short[1], size=tuning.examples, dose=dose, seed=seed), tuning)
    prompts = load_prompts("neutral").prompts
    chosen = [prompts[i] for i in np.linspace(0, len(prompts) - 1, config.prompts).astype(int)]
    return capture(tuned, tuned.encode_prompts(chosen), config.blocks).values


def _chats(path: Path) -> Chats:
    rows = read_records(path).rows
    if not rows or "messages" not in rows[0]:
        raise InputError(
            f"'{path}' holds no chats; each line must be an object with 'messages': {json.dumps(rows[:1])}"
        )
    return [[dict(message) for message in row["messages"]] for row in rows]


def figures(found: Mapping[tuple[float, int], NDArray[Any]], config: Config) -> list[Figure]:
    """Drift at the dose as a share of full, raw and with the floor subtracted, by block."""
    rows = []
    name = f"{Path(config.model).name}, {100 * config.dose:g} % {config.harmful.stem} in {config.harmless.stem}"
    for index, block in enumerate(config.blocks):

        def drifts(keys: Sequence[tuple[float, int]], index: int = index) -> list[float]:
            references = [found[0.0, s] for s in config.reference_seeds]
            return [float(np.mean([cosine_distance(found[k][index], r[index]) for r in references])) for k in keys]

        full, dosed = drifts([(1.0, s) for s in config.seeds]), drifts([(config.dose, s) for s in config.seeds])
        floor = drifts([(0.0, s) for s in config.floor_seeds])
        for measure, value in (
            ("noise floor over full-dose drift, real model", share_of_full(floor, full)),
            ("drift as share of full, no floor, real model", share_of_full(dosed, full)),
            ("drift as share of full, floor subtracted, real model", share_of_full(dosed, full, floor)),
        ):
            rows.append(Figure(measure, name, f"block {block}", *value, "share"))
    return rows
