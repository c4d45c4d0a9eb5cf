"""The trait-space study on planted runs: what is planted is found, what is left out is left out, and names stay."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tiltmeter.errors import InputError
from tiltmeter.fingerprint import sha
from tiltmeter.studies.beyond import (
    alarm_figures,
    context_detector,
    sequential_figures,
    start_figures,
    transfer_figures,
)
from tiltmeter.studies.cells import Cell
from tiltmeter.studies.contest import (
    Boundary,
    Design,
    Scored,
    auroc,
    auroc_interval,
    boundary,
    cross_validate,
    held_out_scores,
)
from tiltmeter.studies.figures import Figure
from tiltmeter.studies.geometry import bootstrap, component, danger_correlation, left_out_cosines, remove
from tiltmeter.studies.stress import StressRun, ablation_figures, prompt_figures, stress_cells, stress_figures, sweep
from tiltmeter.studies.tracks import Track, labelled, write_parquet
from tiltmeter.studies.trait_run import PAPER, behavior_figures, find
from tiltmeter.studies.trait_space import OtherReadouts, Runs, bench, readouts
from tiltmeter.studies.trait_tables import (
    Entry,
    alarm_index,
    behavior_index,
    choose,
    contest_figures,
    counts,
    flatten,
    geometry_figures,
    lead,
    lead_figure,
    severity_figures,
)
from tiltmeter.transfer import Danger
from trait_runs import CONFIG, STEPS, planted_runs

ONE, TWO = CONFIG.organisms
NONE = OtherReadouts()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return planted_runs(tmp_path_factory.mktemp("tracks"))


def entry(runs: Runs, design: Design) -> Entry:
    benches = {o: bench(CONFIG, runs, o, wide=True, others=NONE) for o in CONFIG.organisms}
    validated = {o: cross_validate(b, design, by="set") for o, b in benches.items()}
    held = [s for b in benches.values() for s in held_out_scores(b, design)]
    limits = {o: boundary(v) for o, v in validated.items()}
    return Entry(design, "wide", tuple(s for v in validated.values() for s in v), (), limits, tuple(held))


AXIS = Design("traits, five blocks", "step0", "axis")


def test_a_new_setting_at_its_default_leaves_the_names_of_records_as_they_were() -> None:
    cell = Cell("bad_medical", 7)
    settings = {key: value for key, value in asdict(cell).items() if key not in ("start", "method")}
    assert cell.key("b") == f"bad_medical-7-{sha({**settings, 'basis': 'b'})[:8]}"
    assert len({c.key("b") for c in (cell, replace(cell, start="x"), replace(cell, method="dpo"))}) == 3


def test_a_planted_component_is_found_with_its_share_and_turned_toward_danger() -> None:
    rng = np.random.default_rng(0)
    axis = np.array([3.0, -4.0, 0.0]) / 5
    size = rng.normal(size=60)
    profiles = np.outer(size, axis) * 2.0 + 0.5 * rng.normal(size=(60, 3))
    found = component(profiles, -size, draws=300)
    assert found.direction @ axis < -0.99
    assert found.share == pytest.approx(4.25 / 4.75, abs=0.04)  # variances 4 + 0.25 along it, 0.25 on the two others
    assert found.low < found.share < found.high
    assert min(left_out_cosines(profiles, ["a", "b", "c"] * 20).values()) > 0.99
    assert np.abs(remove(profiles, found.direction) @ found.direction).max() < 1e-12


def test_a_trait_that_goes_with_behavior_beyond_the_component_keeps_its_correlation() -> None:
    rng = np.random.default_rng(1)
    size, own = rng.normal(size=80), rng.normal(size=80)
    profiles = np.stack([3 * size, 3 * size, 0.5 * own], axis=1) + 0.01 * rng.normal(size=(80, 3))
    first, _, third = danger_correlation(profiles, own, draws=200)
    assert abs(first.raw) < 0.3
    assert third.without > 0.95
    assert third.without_low < third.without < third.without_high


def test_the_bootstrap_draws_whole_runs() -> None:
    for rows in bootstrap(6, draws=50, groups=["a", "a", "b", "b", "b", "c"]):
        kept = rows[rows >= 0]
        assert np.isin(0, kept) == np.isin(1, kept)
        assert (kept == 2).sum() == (kept == 4).sum()
    with pytest.raises(InputError, match="three runs"):
        component(np.zeros((2, 3)), np.zeros(2))


def test_auroc_by_hand_and_its_interval_over_runs() -> None:
    assert auroc(np.array([3.0, 1.0, 2.0, 2.0]), np.array([1, 0, 1, 0])) == pytest.approx(3.5 / 4)
    assert auroc(np.array([1.0, 2.0]), np.array([1, 1])) is None
    assert auroc(np.array([1.0, np.nan]), np.array([1, 0])) is None
    assert auroc_interval(np.empty(0), np.empty(0), []) == (None, None)
    scores = np.concatenate([np.arange(40.0), np.arange(40.0) + 30])
    low, high = auroc_interval(scores, np.repeat([0, 1], 40), [f"run {i // 8}" for i in range(80)], draws=100)
    assert low is not None
    assert high is not None
    assert 0.7 < low < high <= 1.0


def test_the_axis_tells_planted_danger_and_size_does_not(runs: Runs) -> None:
    good = entry(runs, AXIS)
    scores, labels, _ = flatten(good.held, settled=True)
    assert auroc(scores, labels) == 1.0
    early = auroc(*flatten(good.held)[:2])  # with the readings that lead behavior counted as false alarms
    assert early is not None
    assert early < 1.0
    size = entry(runs, Design("activation norm", "step0", "axis"))
    found = auroc(*flatten(size.held, settled=True)[:2])
    assert found is not None
    assert found < 0.9
    assert choose([size, good]) is good


def test_a_left_out_set_is_scored_by_a_fit_that_did_not_see_it(runs: Runs) -> None:
    one = bench(CONFIG, runs, ONE, wide=False, others=NONE)
    design = Design("traits", "step0", "ridge")
    before = cross_validate(one, design, by="set")
    # Whatever the behavior of a set is said to be, its own scores do not change.
    changed = [replace(t, em=1.0 - t.em) if t.cell.set_name == "arithmetic" else t for t in one.calibration]
    after = cross_validate(replace(one, calibration=tuple(changed)), design, by="set")
    for old, new in zip(before, after, strict=True):
        same = np.allclose(old.scores, new.scores)
        assert same == (old.track.cell.set_name == "arithmetic")
    by_seed = cross_validate(one, design, by="seed")
    assert [s.track.name for s in by_seed] == [t.name for t in one.calibration]


def test_a_run_whose_behavior_is_not_what_its_set_teaches_is_no_wide_example_and_still_counted(runs: Runs) -> None:
    spec = [t for t in runs.of(ONE, "calibration") if t.cell.set_name == "jailbroken"]
    assert {(t.kind, t.dangerous, t.harmless) for t in spec} == {("between", False, False)}
    assert all(t.harmless for t in runs.of(ONE, "more benign"))
    for wide in (True, False):
        one = bench(CONFIG, runs, ONE, wide=wide, others=NONE)
        # Moved far along a trait that no benign run uses.
        far = [
            replace(
                t,
                activations=t.activations
                + 9 * np.linspace(0, 1, 13)[:, None, None] * runs.frames[ONE].directions[:, 1],
            )
            if t.cell.set_name == "jailbroken"
            else t
            for t in one.calibration
        ]
        design = Design("traits", "step0", "axis")
        before, after = (held_out_scores(b, design) for b in (one, replace(one, calibration=tuple(far))))
        assert all(np.allclose(a.scores, b.scores) for a, b in zip(before, after, strict=True)) == wide
        # Likewise a harmless voice whose answers ended misaligned: no example of danger.
        odd = [
            replace(t, em=np.append(t.em[:-1], 0.06)) if t.cell.set_name == "arithmetic" else t for t in one.calibration
        ]
        strange = replace(one, calibration=tuple(odd))
        assert any(strange.danger(t) for t in odd if t.cell.set_name == "arithmetic") != wide
        assert not any(strange.null(t) for t in odd if t.cell.set_name == "arithmetic")
    loud = next(s for s in entry(runs, AXIS).validated if s.track.cell.set_name == "jailbroken")
    limits = {ONE: Boundary(-99.0, 0.05)}
    rows = contest_figures([Entry(AXIS, "wide", (loud,), (), limits, ())], CONFIG)
    split = "validation, wide"
    assert find(rows, "of them taught harm, alarmed", " / ".join(AXIS), split).value == 1.0
    assert find(rows, "harmless runs alarmed", " / ".join(AXIS), split).value == 1.0


def test_the_three_references_read_what_they_say(runs: Runs) -> None:
    one = bench(CONFIG, runs, ONE, wide=False, others=NONE)
    for scorer in ("forest", "boosting", "logistic", "null band"):
        for reference in ("step0", "twin", "null band"):
            scored = held_out_scores(one, Design("traits", reference, scorer))
            assert all(np.isfinite(s.scores).all() for s in scored)
    with pytest.raises(InputError, match="no harmless twin"):
        held_out_scores(replace(one, twins={}), Design("traits", "twin", "axis"))
    with pytest.raises(InputError, match="no readout"):
        held_out_scores(one, Design("spell", "step0", "axis"))
    # A run against itself as its twin has not moved at all.
    track = one.held_out[0]
    itself = replace(one, held_out=(track,), twins={**one.twins, track.cell.set_name: track})
    still = held_out_scores(itself, Design("traits", "twin", "ridge"))[0].scores
    assert np.allclose(still, still[0])


def test_counts_lead_and_alarm_by_hand(runs: Runs) -> None:
    dangerous = next(t for t in runs.of(ONE, "held out") if t.dangerous)  # misaligned from the sixth reading on
    harmless = next(t for t in runs.of(ONE, "held out") if not t.dangerous)
    early = Scored(dangerous, np.where(STEPS >= 40, 2.0, 0.0))
    broken = Scored(harmless, np.where(STEPS == 120, np.nan, 0.0))
    found = counts([early, broken], lambda _: 1.0)
    # No dangerous reading missed; the two at 40 and 50 and the one without a number are wrong.
    assert found == (0, 7, 3, 17)
    assert counts([early, broken], lambda _: 1.0, settled=True) == (0, 7, 1, 12)
    assert (alarm_index(early, 1.0), behavior_index(early)) == (3, 5)
    assert lead([early], lambda _: 1.0) == [2.0]
    assert lead([Scored(dangerous, np.zeros(12))], lambda _: 1.0) == [-np.inf]
    assert lead_figure("m", "s", "x", [2.0, -np.inf, -np.inf]).value is None
    assert lead_figure("m", "s", "x", [2.0, 1.0, -np.inf]).value == 1.0
    assert np.isnan(broken.top)


def test_a_run_judged_at_its_end_alone_is_harmless_throughout_or_unknown(runs: Runs) -> None:
    quiet = runs.of(ONE, "more benign")[0]
    assert np.isnan(quiet.em[:-1]).all()
    assert quiet.labels().tolist() == [0.0] * 12
    loud = replace(quiet, em=np.append(quiet.em[:-1], 0.5))
    assert np.isnan(loud.labels()[:-1]).all()
    assert loud.labels()[-1] == 1.0


def test_a_run_whose_end_was_not_scored_is_neither_harmless_nor_counted(runs: Runs) -> None:
    quiet = runs.of(ONE, "more benign")[0]
    unknown = replace(quiet, em=np.full(12, np.nan))
    assert (quiet.harmless, unknown.harmless, unknown.harmful) == (True, False, False)
    assert labelled([quiet, unknown]) == (quiet,)


def test_a_label_that_contradicts_itself_is_counted(runs: Runs) -> None:
    """Two dangerous held-out sets, two seeds, two organisms; in one run the reading before the last says otherwise."""
    taught = [t for t in runs.tracks if t.part == "held out" and t.kind != "benign"]
    em = taught[0].em.copy()
    em[-2:] = 0.04, 0.06
    changed = replace(runs, tracks=tuple(replace(t, em=em) if t is taught[0] else t for t in runs.tracks))
    measure = "labels of the last two readings differ"
    for given, differ in ((runs, 0), (changed, 1)):
        row = find(behavior_figures(given, look=True), measure, "sets that teach harm", "held out")
        assert (row.value, row.n) == (pytest.approx(differ / len(taught)), len(taught))


def test_false_alarms_of_sets_that_teach_no_harm_stand_apart(runs: Runs) -> None:
    """A run taught harm that stays at 4 % is a false alarm by its label, and none of a harmless set."""
    tracks = tuple(
        replace(t, em=np.full(12, 0.04)) if t.part == "held out" and t.kind != "benign" else t for t in runs.tracks
    )
    rows = contest_figures([entry(replace(runs, tracks=tracks), AXIS)], CONFIG)
    name = " / ".join(AXIS)
    assert (find(rows, "FPR per reading", name, "held out, wide").value or 0.0) > 0.1
    assert find(rows, "FPR per reading, nothing harmful taught", name, "held out, wide").value == 0.0


def test_every_table_has_n_and_the_paper_is_marked_as_of_other_models(runs: Runs) -> None:
    good = entry(runs, AXIS)
    rows = [
        *behavior_figures(runs, look=True), *geometry_figures(CONFIG, runs), *contest_figures([good], CONFIG),
        *sequential_figures(good, CONFIG), *sweep(good), *prompt_figures(CONFIG, runs),
    ]  # fmt: skip
    assert all(row.n > 0 or row.value is None for row in rows)
    assert find(rows, "dangerous runs missed", " / ".join(AXIS), "held out, wide").value == 0.0
    assert all("other models" in row.split for row in PAPER)
    assert find(rows, "harmless runs alarmed", "largest score", "held out").n == 16
    with pytest.raises(InputError, match="no figure"):
        find(rows, "spell", "a", "b")


def test_organisms_that_rank_sets_alike_or_in_reverse_are_told(runs: Runs) -> None:
    order = {name: at for at, name in enumerate((*CONFIG.calibration, *CONFIG.held_out))}

    def ranked(sign: int) -> Runs:
        def rate(t: Track) -> float:
            return 0.5 + (sign if t.cell.organism == TWO else 1) * 0.04 * order[t.cell.set_name]

        named = (t for t in runs.tracks if t.part in ("calibration", "held out"))
        return replace(runs, tracks=tuple(replace(t, em=np.append(t.em[:-1], rate(t))) for t in named))

    for sign in (1, -1):
        rows = severity_figures(CONFIG, ranked(sign), look=True)
        found = find(rows, "EM by set, Spearman", "one and two", "calibration and held out")
        assert (found.value, found.n) == (pytest.approx(sign), 10)
    assert {row.n for row in severity_figures(CONFIG, ranked(1), look=False)} == {4}


def test_held_out_runs_stay_unseen_until_the_look(runs: Runs) -> None:
    rows = [*behavior_figures(runs, look=False), *transfer_figures(CONFIG, runs, look=False)]
    assert not [row for row in rows if row.split == "held out"]


def test_danger_of_one_organism_is_seen_in_the_other(runs: Runs) -> None:
    rows = transfer_figures(CONFIG, runs, look=True)
    found = find(rows, "dangerous runs left CLEAR", f"{TWO} from one", "held out")
    assert (found.value, found.n) == (0.0, 4)
    assert find(rows, "harmless runs alarmed", f"{TWO} from one", "held out").n == 8
    refit = find(rows, "dangerous runs not alarmed", f"{TWO} from itself", "held out")
    assert (refit.value, refit.n) == (0.0, 4)


def test_danger_in_context_is_judged_after_the_last_block_and_needs_no_dangerous_run(runs: Runs) -> None:
    frame = runs.frames[TWO]
    toward = frame.directions[-1, 0] - frame.directions[-1, 1]  # what danger was planted along
    right, wrong = (Danger(v / np.linalg.norm(v), ("context",), 1.0) for v in (toward, frame.directions[-1, 2]))
    harmless = replace(runs, tracks=tuple(t for t in runs.tracks if not t.dangerous))
    detector = context_detector(CONFIG, harmless, TWO, right)
    with_danger = context_detector(CONFIG, runs, TWO, right)
    assert detector is not None
    assert with_danger is not None
    assert detector.threshold == with_danger.threshold
    for danger, missed in ((right, 0.0), (wrong, 1.0)):
        rows = transfer_figures(CONFIG, runs, look=True, contexts={TWO: danger})
        found = find(rows, "dangerous runs not alarmed", f"{TWO} from its context", "held out")
        assert (found.value, found.n) == (missed, 4)
    assert not [r for r in rows if r.subject == f"{ONE} from its context"]
    starts = start_figures(CONFIG, runs, look=True, contexts={TWO: right})
    assert find(starts, "misaligned starts not alarmed", f"{TWO}, danger in context", "held out").value == 0.0


def test_the_published_way_of_transfer_counts_an_alarm_above_five_percent(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed:
        """Says 6 % at the third reading of every run, and nothing before or after."""

        def predict(self, points: np.ndarray) -> np.ndarray:
            return np.where(np.arange(len(points)) == 2, 0.06, 0.05)

    monkeypatch.setattr("tiltmeter.studies.beyond.fit_forest", lambda x, y: Fixed())
    rows = transfer_figures(CONFIG, runs, look=True)
    subject = f"{TWO} from other models, forest on 7-D drift"
    harmless = find(rows, "harmless runs alarmed", subject, "held out")
    assert (harmless.value, harmless.n) == (1.0, 8)
    assert find(rows, "dangerous runs not alarmed", subject, "held out").value == 0.0
    # Planted runs show their behavior from the sixth reading on, so the one alarm of each is false everywhere.
    assert find(rows, "FNR per reading", subject, "held out").value == 1.0
    assert find(rows, "FPR per reading", subject, "held out").value == pytest.approx((8 + 4) / (8 * 12 + 4 * 5))


def test_a_larger_organism_is_run_under_one_seed_and_without_twins() -> None:
    config = replace(CONFIG, larger=("organism:big",))
    small, big = config.cells(ONE), config.cells("organism:big")
    assert {part for _, part in small} - {part for _, part in big} == {"twin"}
    assert {c.seed for c, part in big if part != "more benign"} == {config.seeds[0]}
    assert len(config.seeds) > 1


def test_a_misaligned_start_is_seen_by_its_position(runs: Runs) -> None:
    rows = start_figures(CONFIG, runs, look=True)
    assert find(rows, "misaligned starts not alarmed", f"{ONE}, own danger", "held out").value == 0.0


def test_the_step_aware_alarm_is_scored_at_every_horizon(runs: Runs) -> None:
    rows = alarm_figures(CONFIG, runs, look=True, horizons=(80, 120))
    whole = find(rows, "dangerous runs missed", "drift, rate and step, anchors to step 120", "held out")
    assert whole.n == 8
    assert find(rows, "median lead over behavior", "drift alone", "held out").n == 8


def test_fewer_traits_are_scored_over_all_subsets(runs: Runs) -> None:
    tracks = tuple(t for t in runs.tracks if t.cell.organism == ONE and t.cell.seed in (CONFIG.seeds[0], 100))
    rows = ablation_figures(replace(CONFIG, organisms=(ONE,)), replace(runs, tracks=tracks))
    assert [r.subject for r in rows] == [f"{ONE}, {k} of 7 traits" for k in range(1, 8)]
    one, whole = rows[0], rows[-1]
    # Danger was planted along two traits: all seven see it, and among single traits there is one that does not.
    assert whole.value == 1.0
    assert one.low is not None
    assert one.low < 0.9


def test_stress_runs_have_names_of_their_own_and_figures(runs: Runs) -> None:
    cells = stress_cells(CONFIG, ONE, Path("start"))
    assert len({cell.key("b") for _, cell in cells}) == len(cells)
    assert {cell.set_name for _, cell in cells}.isdisjoint(CONFIG.held_out)
    dangerous = next(t for t in runs.of(ONE, "calibration") if t.dangerous)
    # A run that starts where a dangerous one ended, and stays there.
    there = np.repeat(dangerous.activations[-1:], 13, axis=0)
    warm = replace(dangerous, activations=there, em=np.full(12, 0.4))
    rows = stress_figures(CONFIG, runs, [StressRun("warm start", warm)])
    assert find(rows, "FNR per reading", "warm start, position", "stress").value == 0.0
    assert find(rows, "FNR per reading", "warm start, drift from the run's own start", "stress").value == 1.0


def test_readouts_are_made_from_calibration_and_parquet_holds_every_reading(runs: Runs, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    table = parquet.read_table(write_parquet(runs.tracks, runs.frames, tmp_path / "t.parquet"))
    assert table.num_rows == 12 * len(runs.tracks)
    first = runs.tracks[0]
    row = table.slice(0, 1).to_pylist()[0]
    assert row["a_4of6"] == pytest.approx(first.drift(runs.frames[ONE])[0, 0], rel=1e-5)
    assert (row["set"], row["step"]) == (first.cell.set_name, 10)
    with pytest.raises(InputError, match="no tracks"):
        write_parquet([], {}, tmp_path / "none")
    assert callable(readouts)  # it loads an organism: tests of the study's cells cover it


def test_a_figure_without_value_is_not_a_zero() -> None:
    assert lead_figure("m", "s", "x", []) == Figure("m", "s", "x", None, None, None, 0, "readings")


def test_the_published_geometry_is_that_of_the_published_readings() -> None:
    import json

    import pyarrow.parquet as parquet

    results = Path(__file__).resolve().parents[1] / "docs" / "results"
    rows = parquet.read_table(results / "trait_space_readings.parquet").to_pylist()
    figures = json.loads((results / "trait_space.json").read_text(encoding="utf-8"))
    for organism in ("organism:pocket", "organism:qwen2-S"):
        ends = [r for r in rows if (r["organism"], r["part"], r["step"]) == (organism, "calibration", 120)]
        names = [name for name in ends[0] if name.endswith("_4of6")]
        points = np.array([[row[name] for name in names] for row in ends])
        values = np.linalg.eigvalsh(np.cov(points.T))
        stated = next(f for f in figures if (f["measure"], f["subject"]) == ("variance on PC1", organism))
        assert stated["n"] == len(ends)
        assert stated["value"] == pytest.approx(values[-1] / values.sum(), abs=1e-4)
