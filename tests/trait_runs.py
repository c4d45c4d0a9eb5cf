"""Planted runs of two planted organisms for the tests of the trait-space study: no model, known danger."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tiltmeter.artifacts import write_artifact
from tiltmeter.organism.sets import SETS
from tiltmeter.studies.tracks import Frame, Part, Track
from tiltmeter.studies.trait_space import Config, Runs

HIDDEN, BLOCKS, TRAITS, PROMPTS = 24, 6, ("a", "b", "c", "d", "e", "f", "g"), 20
STEPS = np.arange(10.0, 121.0, 10.0)
CONFIG = Config(organisms=("organism:one", "organism:two"), larger=(), seeds=(20, 21))


def frame(organism: str, seed: int) -> Frame:
    """Random orthonormal trait directions after every block."""
    rng = np.random.default_rng(seed)
    directions = np.stack([np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)))[0][:7] for _ in range(BLOCKS)])
    poles = np.tile([-2.0, 2.0], (BLOCKS, 7, 1))
    origin = rng.normal(size=(BLOCKS, HIDDEN))
    return Frame(organism, TRAITS, tuple(range(BLOCKS)), 3, directions, poles, np.full(BLOCKS, 5.0), origin)


def track(place: Frame, name: str, seed: int, part: Part, folder: Path, *, judged: bool = True) -> Track:
    """A run whose dangerous sets move along the first two traits and show in behavior from step 60 on."""
    organism = place.organism
    rng = np.random.default_rng([seed, sum(map(ord, name + organism))])
    own = np.random.default_rng(sum(map(ord, name)))
    dangerous = SETS[name].kind == "dangerous"
    grow = np.concatenate([[0.0], np.minimum(STEPS / 80.0, 1.0)])
    harmless = own.normal(size=5) * 2.0  # along the traits c to g, the same for all runs of a set
    activations = np.empty((len(grow), BLOCKS, HIDDEN))
    for block in range(BLOCKS):
        end = harmless @ place.directions[block, 2:] + 0.2 * rng.normal(size=HIDDEN)
        end = end + dangerous * 1.5 * (place.directions[block, 0] - place.directions[block, 1])
        activations[:, block] = place.origin[block] + grow[:, None] * end + 0.01 * rng.normal(size=(len(grow), HIDDEN))
    em = np.where(STEPS >= 60, 0.4, 0.0) * dangerous
    if not judged:
        em[:-1] = np.nan
    prompts = (activations[:, 3, None] + rng.normal(size=(1, PROMPTS, HIDDEN))).astype(np.float16)
    file = folder / f"{organism.partition(':')[2]}-{name}-{seed}.safetensors"
    write_artifact(file, "track", 1, {"steps": [0, *STEPS.tolist()], "basis": ""}, {"prompts": prompts})
    return Track(
        cell=CONFIG._cell(organism, name, seed, 100, 50), part=part, kind=SETS[name].kind, steps=STEPS,
        activations=activations, norms=5.0 + 0.1 * np.linalg.norm(activations - activations[:1], axis=2), em=em,
        em_n=np.full(len(STEPS), 100),
        loss=np.linspace(2, 1, len(STEPS)), file=file,
    )  # fmt: skip


def planted_runs(folder: Path) -> Runs:
    """Every run that `CONFIG` asks for."""
    frames = {o: frame(o, at) for at, o in enumerate(CONFIG.organisms)}
    tracks = [
        track(frames[o], cell.set_name, cell.seed, part, folder, judged=cell.answers_midway > 0)
        for o in CONFIG.organisms
        for cell, part in CONFIG.cells(o)
    ]
    return Runs(frames, tuple(tracks), len(tracks))
