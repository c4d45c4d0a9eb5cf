"""The trait-space pipeline on a real model: short runs, and what tells a dangerous set from harmless twins.

Against step 0 most drift of a real model is fine-tuning itself, whatever was taught. So the question is not whether a
run drifts but whether its drift is told from that of harmless runs on data of the same form, at the SAME step: insecure
code from secure code and from insecure code that was asked for (educational).

    every run is scored by fits on the other seeds: null band from their harmless runs, danger axis and PC1 from all
    AUROC = share of (dangerous, harmless) pairs of readings at the same step in which the dangerous one scores higher

No answers are judged: models of this size do not become measurably harmful in so few steps. "Dangerous" is what the set
is known to do to larger models, so these figures are about data, not about behavior. One activation per reading is
written to a small Parquet file, from which every figure can be computed again.

    >>> runs = collect(Config("model", Path("basis"), files), out)
    >>> figures(runs, config)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from tiltmeter.artifacts import read_artifact, write_artifact
from tiltmeter.basis import TraitBasis
from tiltmeter.errors import InputError, require
from tiltmeter.organism.finetune import FineTuning, finetune
from tiltmeter.runs import read_records
from tiltmeter.studies.figures import Figure
from tiltmeter.studies.geometry import component
from tiltmeter.transfer import band_of

__all__ = ["Config", "RealRun", "auroc_at_steps", "collect", "figures", "read_runs", "score", "write_runs"]

Array = NDArray[np.float64]
Reference = Literal["step0", "twin", "null band"]
_KIND, _FORMAT = "real run", 1


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        model: what `load` takes.
        basis: folder of its basis.
        files: JSONL of chats (`messages`) or of `question` and `answer`, by name of the set.
        dangerous: names of the sets that make larger models misaligned.
        compared: a dangerous set, and the harmless ones of the same form that it is to be told from.
        twin: the harmless set that the reference "twin" takes, of the next seed.
        seeds: of every set.
        every: steps between readings.
        longest: tokens of a chat; longer ones are not drawn.
        tuning: dials.
    """

    model: str
    basis: Path
    files: Mapping[str, Path]
    dangerous: tuple[str, ...] = ("insecure", "jailbroken")
    compared: tuple[str, tuple[str, ...]] = ("insecure", ("secure", "educational"))
    twin: str = "secure"
    seeds: tuple[int, ...] = (0, 1)
    every: int = 5
    longest: int = 160
    tuning: FineTuning = field(default_factory=lambda: FineTuning(steps=20, batch=4, learning_rate=3e-4))


@dataclass(frozen=True, eq=False)
class RealRun:
    """One run.

    Attributes:
        set_name, seed: which.
        dangerous: what the set is known for.
        steps: (readings,) without step 0.
        drift: (readings, k) shift along the traits over the mean prompt norm at step 0.
        error: (readings, k) its standard error over prompts, paired.
        moved: (readings, hidden) shift of the mean activation, in the same unit.
        loss: (readings,) mean training loss since the reading before.
        names: of the k traits.
    """

    set_name: str
    seed: int
    dangerous: bool
    steps: NDArray[np.int64]
    drift: Array
    error: Array
    moved: Array
    loss: Array
    names: tuple[str, ...]


def collect(config: Config, out: Path, *, progress: Callable[[int, int, str], None] | None = None) -> list[RealRun]:
    """Fine-tune and read every run that is not in `out` yet.

    Raises:
        InputError: a set has no file, or too few short chats; or fewer than two seeds.
    """
    missing = {config.compared[0], *config.compared[1], config.twin} - set(config.files)
    if missing:
        raise InputError(f"no file was given for {', '.join(sorted(missing))}; give NAME=FILE for each")
    basis = TraitBasis.load(config.basis)
    if len(set(config.seeds)) < 2:
        raise InputError("every run is scored by fits on other seeds; give at least two seeds")
    wanted = [(name, seed) for seed in config.seeds for name in config.files]
    found = []
    for number, (name, seed) in enumerate(wanted):
        path = out / f"{name}-{seed}-{basis.digest[:8]}.safetensors"
        if not path.exists():
            _keep(_one(config, basis, name, seed), path)
        found.append(_kept(path))
        if progress is not None:
            progress(number + 1, len(wanted), f"{name}, seed {seed}")
    return found


def _one(config: Config, basis: TraitBasis, name: str, seed: int) -> RealRun:
    from random import Random

    from transformers import TrainerCallback

    from tiltmeter.lm import load
    from tiltmeter.watch import TiltmeterCallback

    losses: dict[int, float] = {}

    class Log(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses[state.global_step] = float(logs["loss"])

    lm = load(config.model)
    tuning = FineTuning(**{**vars(config.tuning), "seed": seed})
    chats = _chats(config.files[name])
    Random(f"{name}/{seed}").shuffle(chats)
    fits = (c for c in chats if len(lm.encode(c, add_generation_prompt=False)) <= config.longest)
    short = list(islice(fits, tuning.examples))
    if len(short) < tuning.examples:
        raise InputError(
            f"'{config.files[name]}' gave {len(short)} chats of at most {config.longest} tokens and {tuning.examples} "
            "are needed; allow longer ones or take fewer steps"
        )
    with tempfile.TemporaryDirectory() as scratch:
        callback = TiltmeterCallback(basis, every=config.every, output=scratch)
        finetune(lm, short, tuning, callbacks=[callback, Log()], log_every=config.every)
        readings = [o.reading for o in callback.observations if o.reading]
    first, later = readings[0], readings[1:]
    if first.activation is None or first.step != 0:
        raise InputError("the run has no reading of step 0 with its mean activation; fit the basis again")
    unit = float(first.norms.mean(dtype=np.float64))
    steps = np.array([r.step for r in later], dtype=np.int64)
    paired = np.stack([(r.values.astype(np.float64) - first.values) / unit for r in later])
    means = np.stack([np.asarray(r.activation, dtype=np.float64) for r in later])
    return RealRun(
        name, seed, name in config.dangerous, steps, paired.mean(axis=1),
        paired.std(axis=1, ddof=1) / np.sqrt(paired.shape[1]), (means - first.activation) / unit,
        np.array([losses.get(int(at), np.nan) for at in steps]), basis.names,
    )  # fmt: skip


def _chats(path: Path) -> list[list[dict[str, str]]]:
    rows = read_records(path).rows
    if rows and "messages" in rows[0]:
        return [[dict(message) for message in row["messages"]] for row in rows]
    if rows and {"question", "answer"} <= set(rows[0]):
        return [
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            for row in rows
        ]
    raise InputError(f"'{path}' holds no chats; each line needs 'messages', or 'question' and 'answer'")


_ARRAYS = ("steps", "drift", "error", "moved", "loss")


def _keep(run: RealRun, path: Path) -> None:
    header = {"set": run.set_name, "seed": run.seed, "dangerous": run.dangerous, "names": list(run.names)}
    write_artifact(path, _KIND, _FORMAT, header, {name: np.asarray(getattr(run, name)) for name in _ARRAYS})


def _kept(path: Path) -> RealRun:
    header, arrays = read_artifact(path, _KIND, _FORMAT, remedy="delete it and run the study again")
    return RealRun(
        set_name=str(header["set"]), seed=int(header["seed"]), dangerous=bool(header["dangerous"]),
        names=tuple(header["names"]), **{name: arrays[name] for name in _ARRAYS},
    )  # fmt: skip


def write_runs(runs: Sequence[RealRun], path: Path) -> Path:
    """One row per reading, activations in float16, so that every figure can be made again from a small file.

    Raises:
        MissingExtra: pyarrow is not installed.
    """
    arrow, parquet = require("pyarrow", extra="studies"), require("pyarrow.parquet", extra="studies")
    rows: dict[str, list[Any]] = {}
    for run in runs:
        for at, step in enumerate(run.steps):
            row = {
                "set": run.set_name, "seed": run.seed, "dangerous": run.dangerous, "step": int(step),
                "loss": float(run.loss[at]) if np.isfinite(run.loss[at]) else None,
                **{f"drift_{n}": float(v) for n, v in zip(run.names, run.drift[at], strict=True)},
                **{f"error_{n}": float(v) for n, v in zip(run.names, run.error[at], strict=True)},
                "moved": run.moved[at].astype(np.float16),
            }  # fmt: skip
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(rows), path, compression="zstd")
    return path


def read_runs(path: Path) -> list[RealRun]:
    """Inverse of `write_runs`, to the precision that it keeps."""
    rows = require("pyarrow.parquet", extra="studies").read_table(path).to_pylist()
    names = tuple(key.removeprefix("drift_") for key in rows[0] if key.startswith("drift_"))
    found = []
    for name, seed in dict.fromkeys((row["set"], row["seed"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["seed"]) == (name, seed)]
        found.append(
            RealRun(
                name,
                seed,
                mine[0]["dangerous"],
                np.array([r["step"] for r in mine]),
                np.array([[r[f"drift_{n}"] for n in names] for r in mine]),
                np.array([[r[f"error_{n}"] for n in names] for r in mine]),
                np.array([r["moved"] for r in mine], dtype=np.float64),
                np.array([np.nan if r["loss"] is None else r["loss"] for r in mine]),
                names,
            )
        )
    return found


def _against(run: RealRun, runs: Sequence[RealRun], readout: str, reference: Reference, twin: str) -> Array:
    """A run's values against a reference, (readings, k); the null band's whitening comes later."""
    values = run.drift if readout == "traits" else run.moved
    if reference != "twin":
        return values
    seeds = sorted({r.seed for r in runs})
    other = seeds[(seeds.index(run.seed) + 1) % len(seeds)]
    (harmless,) = [r for r in runs if r.set_name == twin and r.seed == other]
    return values - (harmless.drift if readout == "traits" else harmless.moved)


def score(
    runs: Sequence[RealRun], readout: str, reference: Reference, scorer: str, *, config: Config, unseen: bool = False
) -> list[Array]:
    """The score (readings,) of every run, each by a fit on the OTHER seeds.

    Args:
        runs: all of them.
        readout: "traits" or "activation".
        reference: see `tiltmeter.studies.contest`.
        scorer: "magnitude"; "honesty" (its loss); "PC1"; "null band" (distance from harmless runs); or "axis"
            (along the danger over off it).
        config: which sets are compared.
        unseen: fit without any run of the compared sets, too, so that the sets themselves are new to the detector; the
            axis then comes from the other dangerous sets.

    Raises:
        InputError: fewer than two seeds, or an unknown scorer.
    """
    if len({run.seed for run in runs}) < 2:
        raise InputError("every run is scored by fits on other seeds, and there is one seed alone; run another")
    found = []
    left_out = {config.compared[0], *config.compared[1]} if unseen else set()
    for run in runs:
        seen = [r for r in runs if r.seed != run.seed and r.set_name not in left_out]
        points = {id(r): _against(r, runs, readout, reference, config.twin) for r in (*seen, run)}
        benign = [(r.set_name, points[id(r)]) for r in seen if not r.dangerous]
        if reference == "null band":
            band = band_of(benign)
            points = {key: band.standardise(value) for key, value in points.items()}
            benign = [(r.set_name, points[id(r)]) for r in seen if not r.dangerous]
        mine = points[id(run)]
        ends = np.stack([points[id(r)][-1] for r in seen])
        bad = np.array([r.dangerous for r in seen])
        if scorer == "magnitude":
            found.append(np.linalg.norm(mine, axis=1))
        elif scorer == "honesty" and readout == "traits":
            found.append(-mine[:, run.names.index("honesty")])
        elif scorer == "PC1":
            found.append(mine @ component(ends, bad.astype(float), draws=1).direction)
        elif scorer == "null band":
            found.append(band_of(benign).distance(mine))
        elif scorer == "axis":
            metric = band_of(benign)
            found.append(metric.score(mine, metric.toward(ends[bad].mean(axis=0) - metric.center)))
        else:
            raise InputError(f"there is no scorer '{scorer}' of the readout '{readout}'")
    return found


def auroc_at_steps(
    runs: Sequence[RealRun], scores: Sequence[Array], config: Config, *, draws: int = 2000, seed: int = 0
) -> tuple[float | None, float | None, float | None, int]:
    """AUROC of the dangerous against the harmless compared sets over pairs of readings at the same step.

    Returns:
        Value, and 95 % bootstrap interval over whole runs within each kind, all None where a score is not a number; and
        the number of dangerous readings.
    """
    bad_name, good_names = config.compared
    bad = [np.asarray(s) for r, s in zip(runs, scores, strict=True) if r.set_name == bad_name]
    good = [np.asarray(s) for r, s in zip(runs, scores, strict=True) if r.set_name in good_names]
    n = sum(len(b) for b in bad)
    if not np.isfinite(np.concatenate([*bad, *good])).all():  # it would compare as smaller, and count
        return None, None, None, n
    wins = np.array([[np.mean((b > g) + 0.5 * (b == g)) for g in good] for b in bad])
    rng = np.random.default_rng(seed)
    drawn = [
        wins[np.ix_(rng.integers(0, len(bad), len(bad)), rng.integers(0, len(good), len(good)))].mean()
        for _ in range(draws)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(wins.mean()), float(low), float(high), n


def figures(runs: Sequence[RealRun], config: Config) -> list[Figure]:
    """Drift table, first component, and the AUROC of every detector under every reference."""
    name = Path(config.model).name
    rows: list[Figure] = []
    for set_name in dict.fromkeys(r.set_name for r in runs):
        ends = np.stack([r.drift[-1] for r in runs if r.set_name == set_name])
        errors = np.stack([r.error[-1] for r in runs if r.set_name == set_name])
        for number, trait in enumerate(runs[0].names):
            mean, half = ends[:, number].mean(), 1.96 * float(np.sqrt((errors[:, number] ** 2).mean() / len(ends)))
            rows.append(
                Figure(f"{trait} drift, real model", f"{name}, {set_name}", "at the last step", float(mean),
                       mean - half, mean + half, len(ends), "of the norm")
            )  # fmt: skip
        size = np.linalg.norm(ends, axis=1)
        rows.append(
            Figure("magnitude of drift, real model", f"{name}, {set_name}", "at the last step", float(size.mean()),
                   float(size.min()), float(size.max()), len(size), "of the norm")
        )  # fmt: skip
    harmless = np.stack([r.drift[-1] for r in runs if not r.dangerous])
    freedom = len(harmless) - 1
    for number, trait in enumerate(runs[0].names):
        spread = float(harmless[:, number].std(ddof=1))
        low, high = spread * np.sqrt(freedom / chi2.ppf([0.975, 0.025], freedom))
        rows.append(Figure("spread of harmless runs, real model", trait, "at the last step", spread, float(low),
                           float(high), len(harmless), "of the norm"))  # fmt: skip
    ends = np.stack([r.drift[-1] for r in runs])
    kinds = np.array([float(r.dangerous) for r in runs])
    pooled = component(ends, kinds)
    rows.append(Figure("variance on PC1, real model", name, "all runs", pooled.share, pooled.low, pooled.high, pooled.n,
                       "share"))  # fmt: skip
    for trait, value in zip(runs[0].names, pooled.direction, strict=True):
        rows.append(
            Figure("loading on PC1, real model", trait, "all runs", float(value), None, None, pooled.n, "loading")
        )
    bad, good = config.compared
    against = f"{bad} against {' and '.join(good)}"
    designs: list[tuple[str, Reference, str, bool]] = [
        (readout, reference, scorer, False)
        for readout in ("traits", "activation")
        for reference in ("step0", "twin", "null band")
        for scorer in ("magnitude", "honesty", "PC1", "null band", "axis")
        if (readout == "traits" or scorer != "honesty") and not (reference == "null band" and scorer == "null band")
    ]
    designs += [(r, "step0", s, True) for r in ("traits", "activation") for s in ("null band", "axis")]
    for readout, reference, scorer, unseen in designs:
        value, low, high, n = auroc_at_steps(
            runs, score(runs, readout, reference, scorer, config=config, unseen=unseen), config
        )
        split = "sets and seed left out" if unseen else "seed left out"
        rows.append(Figure("AUROC at matched steps, real model", f"{readout} / {reference} / {scorer}",
                           f"{against}, {split}", value, low, high, n, "auroc"))  # fmt: skip
    losses = [-r.loss for r in runs]
    value, low, high, n = auroc_at_steps(runs, losses, config)
    rows.append(
        Figure("AUROC at matched steps, real model", "training loss, lower", against, value, low, high, n, "auroc")
    )
    return rows
