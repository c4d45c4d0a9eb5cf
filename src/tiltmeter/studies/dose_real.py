"""Dose and noise floor on a real model: drift of a small poisoned fine-tune as a share of full dose.

Two chat files of the same kind, one harmful and one harmless (such as insecure and secure code), are mixed at constant
size; fine-tunes of every dose and seed are read on the neutral prompts, against fine-tunes at dose 0. Small by design:
it answers whether the drift that is reported at 5 % is more than two benign fine-tunes differ by anyway.

Intervals over runs are Fieller's; those over prompts resample the prompts and keep the runs: with two or three seeds
the first are wide, and the second say nothing about other seeds.

    >>> config = Config("HuggingFaceTB/SmolLM2-135M-Instruct", harmful, harmless)
    >>> figures(run(config, out=Path("dose-real")), config)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
from tiltmeter.studies.dose_measures import Estimate, cosine_distance, share_of_full
from tiltmeter.studies.figures import Figure

__all__ = ["Config", "figures", "mixture", "run"]

Chats = list[list[dict[str, str]]]
_RESAMPLES = 2000


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        model: what `load` takes.
        harmful, harmless: JSONL files of chats, `{"messages": [...]}`.
        doses: shares of harmful chats of the dosed runs, ascending; the last is the full dose, 1.
        seeds: of the runs at each dose.
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
    doses: tuple[float, ...] = (0.05, 0.25, 1.0)
    seeds: tuple[int, ...] = (0,)
    reference_seeds: tuple[int, ...] = (20,)
    floor_seeds: tuple[int, ...] = (30,)
    longest: int = 256
    prompts: int = 40
    blocks: tuple[int, ...] = (12, 18, 22)
    tuning: FineTuning = field(default_factory=lambda: FineTuning(steps=16, batch=4, learning_rate=2e-4))

    def __post_init__(self) -> None:
        if not self.doses or self.doses[-1] != 1.0 or list(self.doses) != sorted(set(self.doses)) or self.doses[0] <= 0:
            raise InputError(f"the doses are {self.doses}; they must ascend above 0 and end with 1")

    def runs(self) -> tuple[tuple[float, int], ...]:
        """(dose, seed) of every run, seed by seed, benign ones first, so that a study that stops has whole seeds."""
        benign = tuple((0.0, s) for s in (*self.reference_seeds, *self.floor_seeds))
        return (*benign, *((d, s) for s in self.seeds for d in self.doses))


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
            k: str(v)
            for k, v in asdict(config).items()
            if k not in ("doses", "seeds", "reference_seeds", "floor_seeds")
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
    """Drift at each dose as a share of full, raw and with the floor subtracted, by block, over runs and prompts."""
    rows = []
    sets = f"{config.harmful.stem} in {config.harmless.stem}"
    for index, block in enumerate(config.blocks):
        split = f"block {block}"
        turned = {
            dose: np.array([_turned(found, config, (dose, s), index) for s in seeds])
            for dose, seeds in ((0.0, config.floor_seeds), *((d, config.seeds) for d in config.doses))
        }  # (runs, prompts) by dose
        floor, full = turned[0.0], turned[1.0]
        name = f"{Path(config.model).name}, {sets}"
        rows += _rows("noise floor over full-dose drift, real model", name, split, floor, full, None)
        for dose in config.doses[:-1]:
            name = f"{Path(config.model).name}, {100 * dose:g} % {sets}"
            for what, less in (("no floor", None), ("floor subtracted", floor)):
                rows += _rows(f"drift as share of full, {what}, real model", name, split, turned[dose], full, less)
    return rows


def _turned(
    found: Mapping[tuple[float, int], NDArray[Any]], config: Config, key: tuple[float, int], index: int
) -> NDArray[np.float64]:
    """(prompts,) mean cosine distance of a run to the references after a block."""
    distances = [cosine_distance(found[key][index], found[0.0, s][index]) for s in config.reference_seeds]
    return np.asarray(np.mean(distances, axis=0), dtype=np.float64)


def _rows(
    measure: str, name: str, split: str, dosed: NDArray[Any], full: NDArray[Any], floor: NDArray[Any] | None
) -> list[Figure]:
    """The ratio with its interval over prompts, and, where every group has two runs, with that over runs."""
    groups = [g for g in (dosed, full, floor) if g is not None]
    rows = [Figure(measure, name, f"{split}, over prompts", *_over_prompts(dosed, full, floor), "share")]
    if min(map(len, groups)) > 1:
        less = None if floor is None else floor.mean(axis=1)
        share = share_of_full(dosed.mean(axis=1), full.mean(axis=1), less)
        rows.append(Figure(measure, name, f"{split}, over runs", *share, "share"))
    return rows


def _over_prompts(dosed: NDArray[Any], full: NDArray[Any], floor: NDArray[Any] | None) -> Estimate:
    """The ratio of (runs, prompts) drifts; bootstrap over prompts; None where full is not above the floor."""
    prompts = dosed.shape[1]
    less = np.zeros(prompts) if floor is None else floor.mean(axis=0)
    above, whole = dosed.mean(axis=0) - less, full.mean(axis=0) - less
    if whole.mean() <= 0:
        return Estimate(None, None, None, prompts)
    drawn = np.random.default_rng(0).integers(prompts, size=(_RESAMPLES, prompts))
    value, wholes = float(above.mean() / whole.mean()), whole[drawn].mean(axis=1)
    if (wholes <= 0).any():
        return Estimate(value, None, None, prompts)
    low, high = np.quantile(above[drawn].mean(axis=1) / wholes, [0.025, 0.975])
    return Estimate(value, float(low), float(high), prompts)
