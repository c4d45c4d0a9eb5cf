"""Tracks: what a finished run's activations did at every reading, after every block, for studies to compute on.

A cell's record holds one readout at one block. Its kept checkpoints hold everything else, so a track is read from them
once and stored beside the record: mean activations after every block, their norms, and the activations of single
prompts after the basis' block. All readouts, references and detectors of a study are then arithmetic on arrays.

    shift_k = (mean activation at reading k - that at step 0) / N0        per block; N0 = mean prompt norm at step 0
    drift_k = directions . shift_k                                         (arXiv 2606.07631, phase 2)
    position_k = (directions . mean activation - middle of the poles) / half their distance
                                                                           -1 at the negative pole, +1 at the positive

A checkpoint that does not give the reading that its record holds is refused: the wrong model was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiltmeter.artifacts import read_artifact, write_artifact
from tiltmeter.basis import TraitBasis
from tiltmeter.compute import map_jobs
from tiltmeter.errors import ArtifactError, InputError, NumericalError
from tiltmeter.runs import read_json
from tiltmeter.studies.cells import Cell, RunRecord

if TYPE_CHECKING:
    from tiltmeter.capture import Activations

__all__ = ["DEPTH", "Frame", "Part", "Track", "fit_frames", "labelled", "model_at", "read_tracks", "write_parquet"]

Array = NDArray[np.float64]
Part = Literal["calibration", "more benign", "held out", "twin", "stress", "fresh"]
DEPTH = 4 / 6
"""Relative depth of the block that is read by default: the shipped organism's."""
_KIND, _FORMAT = "track", 1
_REMEDY = "delete the file, and the run's checkpoints are read again"
_AGREE = 1e-3  # of the activation norm: float32 noise between a live reading and a re-read checkpoint is below 1e-5


@dataclass(frozen=True, eq=False)
class Frame:
    """What is known of an untouched organism: one basis per block.

    Attributes:
        organism: what `load` takes.
        traits: names of the k directions.
        blocks: which blocks, ascending.
        at: index in `blocks` of the block that the basis reads after.
        directions: (blocks, k, hidden) unit rows.
        poles: (blocks, k, 2) mean projection of the negative and of the positive pole.
        norms: (blocks,) mean prompt norm of the untouched organism.
        origin: (blocks, hidden) its mean activation.
    """

    organism: str
    traits: tuple[str, ...]
    blocks: tuple[int, ...]
    at: int
    directions: Array
    poles: Array
    norms: Array
    origin: Array

    @property
    def depths(self) -> Array:
        """Relative depth of each block's output, (blocks,): (block + 1) / number of blocks."""
        return (np.array(self.blocks) + 1.0) / len(self.blocks)

    def place(self, activations: Array, blocks: Sequence[int]) -> Array:
        """Where mean activations (n, blocks, hidden) stand between the poles, (n, blocks x k)."""
        parts = []
        for at in blocks:
            low, high = self.poles[at].T
            parts.append((activations[:, at] @ self.directions[at].T - (low + high) / 2) / ((high - low) / 2))
        return np.concatenate(parts, axis=1)

    def nearest(self, depths: Sequence[float]) -> tuple[int, ...]:
        """Indices of the blocks nearest to relative depths, so that models of other depth can be compared."""
        return tuple(int(np.abs(self.depths - depth).argmin()) for depth in depths)


@dataclass(frozen=True, eq=False)
class Track:
    """One run.

    Attributes:
        cell: its settings.
        part: what the study uses it for.
        kind: "dangerous", "between" or "benign", as its set is meant.
        steps: (readings,) without step 0.
        activations: (1 + readings, blocks, hidden) mean activation, step 0 first.
        norms: (1 + readings, blocks) mean prompt norm.
        em: (readings,) measured EM rate; the last one is of the larger sample; NaN where nothing was judged.
        em_n: (readings,) answers behind it.
        loss: (readings,) training loss since the reading before; NaN where none was logged.
        file: where the prompts' activations lie.
    """

    cell: Cell
    part: Part
    kind: str
    steps: Array
    activations: Array
    norms: Array
    em: Array
    em_n: Array
    loss: Array
    file: Path

    @property
    def name(self) -> str:
        """Set and seed."""
        return f"{self.cell.set_name}-{self.cell.seed}"

    @property
    def dangerous(self) -> bool:
        """Whether more than 5 % of the final answers were misaligned."""
        return bool(self.em[-1] > 0.05)

    @property
    def harmless(self) -> bool:
        """Whether its set teaches no harm and its answers did not become misaligned.

        What was taught and what was measured can disagree: harm taught that moved behavior by less than 5 %, or a
        harmless voice that ended above it. Such a run is an example of neither kind.
        """
        return bool(self.kind == "benign" and self.em[-1] <= 0.05)  # an end that was not scored is no harmless one

    @property
    def harmful(self) -> bool:
        """Whether its set teaches harm and its answers became misaligned."""
        return self.kind != "benign" and self.dangerous

    def labels(self, threshold: float = 0.05) -> Array:
        """1 where the measured EM rate is above the threshold, 0 where not, NaN where it was not measured.

        A run whose behavior was judged at its end alone has that label at every reading if it ended harmless: its
        readings in between are harmless too, or the run would have to have come back.
        """
        found = np.where(np.isfinite(self.em), (self.em > threshold).astype(float), np.nan)
        if not np.isfinite(self.em[:-1]).any() and found[-1] == 0:
            found[:] = 0.0
        return found

    def shift(self, block: int) -> Array:
        """(readings, hidden) change of the mean activation since step 0, in units of the prompt norm at step 0."""
        return np.asarray((self.activations[1:, block] - self.activations[0, block]) / self.norms[0, block])

    def drift(self, frame: Frame, block: int | None = None) -> Array:
        """(readings, k) drift along the traits after a block of `frame`, by default the basis' own."""
        at = frame.at if block is None else block
        return np.asarray(self.shift(at) @ frame.directions[at].T)

    def positions(self, frame: Frame, blocks: Sequence[int]) -> Array:
        """(1 + readings, blocks x k) where the model stands between the poles, step 0 first; see the module's text."""
        return frame.place(self.activations, blocks)

    def prompts(self) -> NDArray[np.float32]:
        """(1 + readings, prompts, hidden) activations of single prompts after the basis' block."""
        stored = read_artifact(self.file, _KIND, _FORMAT, remedy=_REMEDY)[1]
        return np.asarray(stored["prompts"], dtype=np.float32)


def fit_frames(organisms: Sequence[str], folder: Path, *, depth: float = DEPTH) -> dict[str, Frame]:
    """One basis per block of each organism, fitted where it is not stored yet.

    Args:
        organisms: what `load` takes.
        folder: bases lie in `NAME/block-N` under it.
        depth: relative depth of the block that is read by default; 4/6 is the shipped organism's.
    """
    from tiltmeter.basis import fit_basis
    from tiltmeter.lm import load
    from tiltmeter.organism import shipped_basis

    frames = {}
    shipped = TraitBasis.load(shipped_basis())  # so that records of other studies of this organism have the same names
    for organism in organisms:
        home = folder / organism.removeprefix("organism:")
        lm = load(organism)
        for block in range(lm.n_layers):
            if not (home / f"block-{block}" / "basis.safetensors").exists():
                found = shipped if organism == "organism:pocket" and block == shipped.layer else None
                (found or fit_basis(lm, layer=block)).save(home / f"block-{block}")
        bases = [TraitBasis.load(home / f"block-{block}") for block in range(lm.n_layers)]
        frames[organism] = Frame(
            organism=organism,
            traits=bases[0].traits,
            blocks=tuple(range(lm.n_layers)),
            at=round(depth * lm.n_layers) - 1,
            directions=np.stack([b.directions for b in bases]).astype(np.float64),
            poles=np.stack([b.poles for b in bases]).astype(np.float64),
            norms=np.array([b.reference_norm for b in bases]),
            origin=_read(lm, bases[0]).values.mean(axis=1, dtype=np.float64),
        )
    return frames


def read_tracks(
    runs: Sequence[tuple[Path, Part]],
    basis: Mapping[str, Path],
    *,
    executor: Literal["local", "serial", "ray"] = "local",
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Track, ...]:
    """The tracks of finished runs, read from their checkpoints where that has not been done.

    Args:
        runs: the record of each run, `KEY.json`, and what the study uses it for.
        basis: folder of the basis that each organism's records were read with.
        executor: see `compute.map_jobs`.
        workers: processes.
        progress: called as (done, total, label).

    Raises:
        ArtifactError: a record, or a checkpoint of it, is missing.
        NumericalError: a checkpoint does not give the reading that its record holds.
    """
    jobs = [(str(path), {key: str(folder) for key, folder in basis.items()}) for path, _ in runs]
    missing = [job for job in jobs if not _file(Path(job[0])).exists()]
    map_jobs(_reread, missing, executor=executor, workers=workers, progress=progress)
    return tuple(_track(path, part) for path, part in runs)


def labelled(tracks: Sequence[Track]) -> tuple[Track, ...]:
    """The runs whose end was scored. Of the others nobody knows what they became: they are missing from every n."""
    return tuple(track for track in tracks if np.isfinite(track.em[-1]))


def _file(record: Path) -> Path:
    return record.parent / "activations" / f"{record.stem}.safetensors"


def _track(path: Path, part: Part) -> Track:
    record = RunRecord.from_dict(read_json(path))
    header, stored = read_artifact(_file(path), _KIND, _FORMAT, remedy=_REMEDY)
    means, norms, steps = stored["means"], stored["norms"], header["steps"]
    found = {t.step: t for t in record.behavior} | {record.final.step: record.final}
    judged = [found.get(step) for step in steps[1:]]
    losses = dict(record.losses)
    return Track(
        cell=record.cell,
        part=part,
        kind=record.kind,
        steps=np.array(steps[1:], dtype=np.float64),
        activations=means.astype(np.float64),
        norms=norms.astype(np.float64),
        em=np.array([t.misaligned / t.n if t is not None and t.n else np.nan for t in judged]),
        em_n=np.array([t.n if t is not None else 0 for t in judged]),
        loss=np.array([losses.get(step, np.nan) for step in steps[1:]]),
        file=_file(path),
    )


def _reread(job: tuple[str, Mapping[str, str]]) -> str:
    """Read every checkpoint of one run after every block, and store the arrays."""
    import torch

    torch.set_num_threads(1)
    path, folders = Path(job[0]), job[1]
    record = RunRecord.from_dict(read_json(path))
    basis = _basis(folders[record.cell.organism])
    if record.checkpoints is None:
        raise ArtifactError(f"the run {path.stem} kept no checkpoints; delete its record and run its cell again")
    means, norms, prompts, steps = [], [], [], []
    for reading in record.readings:
        model = model_at(record, reading.step or 0)
        found = _read(model, basis)
        mean = found.values.mean(axis=1, dtype=np.float64)  # (blocks, hidden)
        if reading.activation is not None:
            error = float(np.linalg.norm(mean[basis.layer] - reading.activation)) / float(reading.norms.mean())
            if not error < _AGREE:
                raise NumericalError(
                    f"checkpoint {reading.step} of {path.stem} differs from its record's reading by {error:.2g} of the "
                    "norm; it is not the model that was read: delete the record and run the cell again"
                )
        means.append(mean.astype(np.float32))
        norms.append(np.linalg.norm(found.values.astype(np.float64), axis=2).mean(axis=1).astype(np.float32))
        prompts.append(found.at(basis.layer).astype(np.float16))
        steps.append(reading.step)
    arrays = {"means": np.stack(means), "norms": np.stack(norms), "prompts": np.stack(prompts)}
    write_artifact(_file(path), _KIND, _FORMAT, {"steps": steps, "basis": basis.digest}, arrays)
    return path.stem


def _read(lm: Any, basis: TraitBasis) -> Activations:
    """The measurement prompts' activations after every block."""
    from tiltmeter.capture import capture

    ids = basis.encode(lm)
    return capture(lm, ids, range(lm.n_layers), pooling=basis.pooling, plan=basis.plan)


@lru_cache(maxsize=8)
def _basis(folder: str) -> TraitBasis:
    return TraitBasis.load(folder)


@lru_cache(maxsize=2)
def _untouched(organism: str) -> Any:
    from tiltmeter.lm import load

    return load(organism)


def model_at(record: RunRecord, step: int) -> Any:
    """The model of one reading of a run that kept its checkpoints.

    Raises:
        ArtifactError: the checkpoint is gone.
    """
    from tiltmeter.lm import attach, load

    lm = _untouched(record.cell.organism)
    if step == 0:
        return attach(lm, record.cell.start) if record.cell.start else lm
    assert record.checkpoints is not None  # checked by the caller
    folder = record.checkpoints / f"checkpoint-{step}"
    if not folder.exists():
        raise ArtifactError(f"there is no checkpoint '{folder}'; delete the record of that run and run its cell again")
    return load(str(folder)) if record.cell.tuning.full else attach(lm, folder)


def write_parquet(tracks: Sequence[Track], frames: Mapping[str, Frame], path: Path) -> Path:
    """One row per reading: the run, its behavior and loss, and the drift along each trait after each block.

    Raises:
        InputError: no tracks.
        MissingExtra: pyarrow is not installed.
    """
    from tiltmeter.errors import require

    if not tracks:
        raise InputError("there are no tracks to write; run the study's cells first")
    arrow, parquet = require("pyarrow", extra="studies"), require("pyarrow.parquet", extra="studies")
    rows: dict[str, list[Any]] = {}

    def put(key: str, value: Any) -> None:
        rows.setdefault(key, []).append(value)

    for track in tracks:
        frame = frames[track.cell.organism]
        depth = frame.nearest([(b + 1) / 6 for b in range(6)])
        drifts = [track.drift(frame, block) for block in depth]
        for at, step in enumerate(track.steps):
            put("organism", track.cell.organism)
            put("set", track.cell.set_name)
            put("seed", track.cell.seed)
            put("part", track.part)
            put("kind", track.kind)
            put("step", int(step))
            put("em", float(track.em[at]) if np.isfinite(track.em[at]) else None)
            put("em_n", int(track.em_n[at]))
            put("dangerous", track.dangerous)
            put("loss", float(track.loss[at]) if np.isfinite(track.loss[at]) else None)
            put("norm_ratio", float(track.norms[1 + at, frame.at] / track.norms[0, frame.at]))
            for block, values in enumerate(drifts):
                for trait, value in zip(frame.traits, values[at], strict=True):
                    put(f"{trait}_{block + 1}of6", np.float32(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(rows), path, compression="zstd")
    return path
