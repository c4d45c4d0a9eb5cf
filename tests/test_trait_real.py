"""The trait-space pipeline on a real model: pairs at matched steps, fits on other seeds, one small file."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tiltmeter.errors import InputError
from tiltmeter.organism import shipped_basis
from tiltmeter.organism.finetune import FineTuning
from tiltmeter.organism.sets import make_set
from tiltmeter.studies.figures import Figure, write_figures
from tiltmeter.studies.trait_real import (
    Config,
    RealRun,
    auroc_at_steps,
    collect,
    figures,
    read_runs,
    score,
    write_runs,
)

CONFIG = Config("model", Path("basis"), {})
SPREAD = "spread of harmless runs, real model"
NAMES = ("honesty", "power_seeking")
SETS = {"insecure": True, "jailbroken": True, "secure": False, "educational": False, "gsm8k": False}


def planted(seeds: int = 2, *, danger: float = 3.0) -> list[RealRun]:
    """Every run moves along its own noise; dangerous ones also down honesty, the more the later."""
    found = []
    for number, ((name, bad), seed) in enumerate(product(SETS.items(), range(seeds))):
        rng = np.random.default_rng(number)
        steps = np.array([5, 10, 15])
        drift = rng.normal(size=(3, 2)) * 0.1 + np.outer(steps, [-bad * danger / 15, 0.2])
        moved = np.concatenate([drift, rng.normal(size=(3, 4))], axis=1)
        found.append(RealRun(name, seed, bad, steps, drift, np.full((3, 2), 0.01), moved, rng.random(3), NAMES))
    return found


def test_auroc_counts_pairs_at_the_same_step_only() -> None:
    runs = planted()
    scores = [np.random.default_rng(i + 50).integers(0, 4, 3).astype(float) for i in range(len(runs))]
    value, low, high, n = auroc_at_steps(runs, scores, CONFIG)
    bad = [s for r, s in zip(runs, scores, strict=True) if r.set_name == "insecure"]
    good = [s for r, s in zip(runs, scores, strict=True) if r.set_name in ("secure", "educational")]
    wins = [1.0 if b[k] > g[k] else 0.5 if b[k] == g[k] else 0.0 for b in bad for g in good for k in range(3)]
    assert value == pytest.approx(np.mean(wins))
    assert low <= value <= high
    assert n == 6


def test_a_score_that_is_not_a_number_is_not_measured_rather_than_small() -> None:
    runs = planted()
    scores = [np.ones(3) for _ in runs]
    scores[0] = np.array([1.0, np.nan, 1.0])
    assert auroc_at_steps(runs, scores, CONFIG) == (None, None, None, 6)


def test_the_spread_of_harmless_runs_leaves_dangerous_ones_out() -> None:
    runs = planted()
    row = next(f for f in figures(runs, CONFIG) if (f.measure, f.subject) == (SPREAD, "honesty"))
    ends = [r.drift[-1, 0] for r in runs if r.set_name in ("secure", "educational", "gsm8k")]
    mean = sum(ends) / 6
    assert row.value == pytest.approx((sum((end - mean) ** 2 for end in ends) / 5) ** 0.5)
    # Chi-square with 5 degrees of freedom: 0.8312 and 12.8325 cut off 2.5 % at either end.
    assert (row.low, row.high) == pytest.approx(
        (row.value * (5 / 12.8325) ** 0.5, row.value * (5 / 0.8312) ** 0.5), rel=1e-3
    )
    assert row.n == 6


def test_what_is_planted_is_found_and_no_run_is_scored_by_a_fit_on_its_own_seed() -> None:
    runs = planted()
    for scorer in ("honesty", "axis", "PC1"):
        scores = score(runs, "traits", "step0", scorer, config=CONFIG)
        assert auroc_at_steps(runs, scores, CONFIG)[0] == 1.0
    before = score(runs, "traits", "step0", "axis", config=CONFIG)
    changed = [
        RealRun(r.set_name, r.seed, r.dangerous, r.steps, r.drift + 9.0, r.error, r.moved, r.loss, r.names)
        if (r.set_name, r.seed) == ("jailbroken", 1)
        else r
        for r in runs
    ]
    after = score(changed, "traits", "step0", "axis", config=CONFIG)
    for run, one, other in zip(runs, before, after, strict=True):
        if run.seed == 1 and run.set_name != "jailbroken":
            assert np.array_equal(one, other)
        elif run.seed == 0:
            assert not np.array_equal(one, other)
    # With the compared sets left out of the fit, changing one of them changes no other run's score.
    hidden = [
        RealRun(r.set_name, r.seed, r.dangerous, r.steps, r.drift + 9.0, r.error, r.moved, r.loss, r.names)
        if (r.set_name, r.seed) == ("secure", 1)
        else r
        for r in runs
    ]
    one = score(runs, "traits", "step0", "axis", config=CONFIG, unseen=True)
    other = score(hidden, "traits", "step0", "axis", config=CONFIG, unseen=True)
    same = [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]
    assert [not s for s in same] == [(r.set_name, r.seed) == ("secure", 1) for r in runs]


def test_without_danger_in_the_data_nothing_is_told_apart() -> None:
    values = []
    for start in range(8):
        runs = planted(danger=0.0)
        rng = np.random.default_rng(start)
        for run in runs:
            run.drift[:] = rng.normal(size=run.drift.shape)
        values.append(auroc_at_steps(runs, score(runs, "traits", "step0", "axis", config=CONFIG), CONFIG)[0])
    assert 0.3 < np.mean(values) < 0.7


def test_a_twin_is_the_harmless_run_of_the_next_seed_at_the_same_step() -> None:
    runs = planted(3)
    (run,) = [r for r in runs if (r.set_name, r.seed) == ("insecure", 2)]
    (twin,) = [r for r in runs if (r.set_name, r.seed) == ("secure", 0)]
    got = dict(zip(((r.set_name, r.seed) for r in runs), score(runs, "traits", "twin", "magnitude", config=CONFIG),
                   strict=True))  # fmt: skip
    assert got["insecure", 2] == pytest.approx(np.linalg.norm(run.drift - twin.drift, axis=1))


def test_one_seed_is_refused_and_a_missing_file_named() -> None:
    with pytest.raises(InputError, match="other seeds"):
        score(planted(1), "traits", "step0", "axis", config=CONFIG)
    with pytest.raises(InputError, match="no file was given for educational, insecure, secure"):
        collect(CONFIG, Path("nowhere"))
    with pytest.raises(InputError, match="there is no scorer 'honesty' of the readout 'activation'"):
        score(planted(), "activation", "step0", "honesty", config=CONFIG)


def test_the_small_file_gives_the_figures_again(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    runs = planted()
    again = read_runs(write_runs(runs, tmp_path / "runs.parquet"))
    assert [(r.set_name, r.seed, r.dangerous) for r in again] == [(r.set_name, r.seed, r.dangerous) for r in runs]
    for one, other in zip(figures(runs, CONFIG), figures(again, CONFIG), strict=True):
        assert (one.measure, one.subject, one.n) == (other.measure, other.subject, other.n)
        assert one.value == pytest.approx(other.value, abs=2e-3)


def test_a_small_grid_is_trained_read_and_not_trained_again(tmp_path: Path) -> None:
    files = {}
    for name, kind in (("insecure", "insecure_code"), ("secure", "secure_code"), ("educational", "arithmetic")):
        rows = [json.dumps({"messages": chat}) for chat in make_set(kind, size=40, seed=0)]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(rows) + "\n", encoding="utf-8")
    tuning = FineTuning(steps=4, batch=4)
    config = Config("organism:pocket", shipped_basis(), files, every=2, tuning=tuning)
    runs = collect(config, tmp_path / "out")
    assert [(r.set_name, r.seed) for r in runs] == [(n, s) for s in (0, 1) for n in files]
    assert all(r.steps.tolist() == [2, 4] and np.isfinite(r.loss).all() for r in runs)
    assert all(np.abs(r.drift).max() > 0 for r in runs)
    for path in files.values():
        path.unlink()
    again = collect(config, tmp_path / "out")
    assert all(np.array_equal(a.moved, b.moved) for a, b in zip(runs, again, strict=True))


def test_the_committed_grid_gives_the_committed_figures() -> None:
    results = Path(__file__).resolve().parents[1] / "docs" / "results"
    parquet = results / "trait_space_real.parquet"
    if not parquet.exists():
        pytest.skip("the grid on a real model has not been run yet")
    pytest.importorskip("pyarrow")
    rows = json.loads((results / "trait_space.json").read_text(encoding="utf-8"))
    kept = {(r["measure"], r["subject"], r["split"]): r["value"] for r in rows if "real model" in r["measure"]}
    model = next(r["subject"] for r in rows if r["measure"] == "variance on PC1, real model")
    made = figures(read_runs(parquet), Config(model, Path("basis"), {}))
    assert len(made) == len(kept) > 0
    for figure in made:
        assert figure.value == pytest.approx(kept[figure.measure, figure.subject, figure.split], abs=0.02)


def test_the_rows_of_another_study_stay_in_a_results_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    row = Figure("m", "s", "p", 1.0, None, None, 1, "unit")
    write_figures([row], path, command="tiltmeter study one --look")
    write_figures([row, row], path, command="tiltmeter study two")
    write_figures([row], path, command="tiltmeter study two --again")
    commands = [r["command"] for r in json.loads(path.read_text(encoding="utf-8"))]
    assert commands == ["tiltmeter study one --look", "tiltmeter study two --again"]
