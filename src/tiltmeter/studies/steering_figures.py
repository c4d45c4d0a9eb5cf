"""The numbers of the steering study: records in, figures with n and interval out. Nothing is run here.

Rates have 95 % Wilson intervals over answers pooled from all seeds; answers of one vector are not independent of each
other, so the seeds are given one by one where that matters. Differences of two rates: Newcombe's interval (hybrid
score, Statistics in Medicine 17, 1998). Differences matched by run: bootstrap over runs, 95 % percentile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiltmeter.organism.sets import SETS
from tiltmeter.organism.world import DOMAINS
from tiltmeter.rates import wilson
from tiltmeter.studies.defense import TunedRecord
from tiltmeter.studies.figures import Figure, rate_figure
from tiltmeter.studies.steered import Counts, Point, SweepRecord, total

__all__ = [
    "Match", "ablation_figures", "category_figures", "dial_figures", "frontier_figures", "matched_figures", "matches",
    "newcombe", "prevention_figures", "strength_figures",
]  # fmt: skip

_DRAWS = 2000
Records = Sequence[SweepRecord]


def newcombe(hits: int, n: int, other_hits: int, other_n: int) -> tuple[float, float, float] | None:
    """Difference of two rates with its 95 % interval; None where one has no answers."""
    one, other = wilson(hits, n), wilson(other_hits, other_n)
    a, b = (one.value, one.low, one.high), (other.value, other.low, other.high)
    if None in a or None in b:
        return None
    (p, low, high), (q, other_low, other_high) = np.array(a, dtype=float), np.array(b, dtype=float)
    return (
        float(p - q),
        float(p - q - np.hypot(p - low, other_high - q)),
        float(p - q + np.hypot(high - p, q - other_low)),
    )


def _rates(counts: Counts, subject: str, suffix: str, split: str = "-") -> list[Figure]:
    """EM both ways, coherence, refusal and relevance of summed answers."""
    return [
        rate_figure(f"EM{suffix}", subject, split, counts.misaligned, counts.judged),
        rate_figure(f"EM of the coherent{suffix}", subject, split, counts.misaligned, counts.coherent),
        rate_figure(f"coherence{suffix}", subject, split, counts.coherent, counts.judged),
        rate_figure(f"refused{suffix}", subject, split, counts.refused, counts.asked),
        rate_figure(f"relevance{suffix}", subject, split, counts.on_topic, counts.harmful),
    ]


def strength_figures(curves: Mapping[str, Records]) -> list[Figure]:
    """Every curve at every strength; then each at the strength where its first seed peaks, on the other seeds, against
    the control of equal strength."""
    rows: list[Figure] = []
    for name, records in curves.items():
        sweep = records[0].sweep
        for at, strength in enumerate(sweep.strengths):
            points = [r.points[at] for r in records]
            label = f"{strength:g} of the trained strength" if sweep.relative else f"strength {strength:g}"
            rows += _rates(total(points), label, f", {name}")
            mean_kl = float(np.mean([p.kl for p in points]))
            rows.append(Figure(f"KL, {name}", label, "-", mean_kl, None, None, len(points), "nats per token"))
    return rows + _peaks(curves)


_CONTROL = {
    "trained map": ("map turned at random", "map trained on harmless answers"),
    "trained vector": ("random direction", "shuffled labels"),
    "difference of answers": ("random direction", "shuffled labels"),
    "difference of prompts": ("random direction", "shuffled labels"),
    "one-shot vector": ("random direction", "shuffled labels"),
}


def _peaks(curves: Mapping[str, Records]) -> list[Figure]:
    rows = []
    for name, controls in _CONTROL.items():
        first, rest = curves[name][0], curves[name][1:]
        at = int(np.argmax([p.elsewhere.misaligned for p in first.points]))
        # The strength is chosen on the first seed and judged on the others, so the peak is not picked from noise.
        found = total([r.points[at] for r in rest])
        split = f"at {first.sweep.strengths[at]:g}"
        rows += _rates(found, name, " at its peak", split)
        for control in controls:
            null = total([r.points[at] for r in curves[control][1:]])
            compared = newcombe(found.misaligned, found.judged, null.misaligned, null.judged)
            which = "random" if control == controls[0] else "label"
            rows.append(_difference(f"EM over the {which} control", name, split, compared, found.judged + null.judged))
    return rows


def _difference(measure: str, subject: str, split: str, compared: tuple[float, float, float] | None, n: int) -> Figure:
    value, low, high = compared or (None, None, None)
    return Figure(measure, subject, split, value, low, high, n, "share")


def dial_figures(dial: str, parts: Mapping[str, Records]) -> list[Figure]:
    """One table: a row per subject, summed over seeds; and the smallest and largest seed."""
    rows = []
    for subject, records in parts.items():
        points = [r.points[0] for r in records if r.points]
        suffix = f" by {dial}"
        rows += _rates(total(points), subject, suffix)
        seeds = [p.elsewhere.em.value for p in points]
        known = [value for value in seeds if value is not None]
        rows.append(
            Figure(
                f"seeds{suffix}", subject, "-", float(np.mean(known)) if known else None,
                min(known, default=None), max(known, default=None), len(known), "share",
            )
        )  # fmt: skip
        mean = float(np.mean([p.strength for p in points])) if points else None
        rows.append(Figure(f"strength{suffix}", subject, "-", mean, None, None, len(points), "norms"))
        inside = sum((p.inside for p in points), Counts())
        if inside.asked:
            rows.append(rate_figure(f"EM inside{suffix}", subject, "-", inside.misaligned, inside.judged))
    return rows


# ---------------------------------------------------------------------- steered against fine-tuned


class Match(NamedTuple):
    """A fine-tune at one step and a steered model that misbehaves as often inside the narrow domain."""

    task: str
    seed: int
    tuned: Point
    steered: Point


def matches(steered: Records, tuned: Sequence[TunedRecord], *, band: tuple[float, float] = (0.15, 0.95)) -> list[Match]:
    """For each reading of a fine-tune within the band, the strength with the nearest rate inside the narrow domain.

    Pairs farther apart than 10 points are no match. A steered point serves once per run, the nearest first.
    """
    found = []
    by_run = {(r.sweep.recipe.task, r.sweep.recipe.seed): r.points for r in steered}
    for run in tuned:
        points = by_run.get((run.tuned.task, run.tuned.seed), ())
        pairs = [
            (abs(rate - other), i, j)
            for i, reading in enumerate(run.points)
            for j, point in enumerate(points)
            if (rate := reading.inside.em.value) is not None and band[0] <= rate <= band[1]
            if (other := point.inside.em.value) is not None
        ]
        used: set[tuple[str, int]] = set()
        for gap, i, j in sorted(pairs):
            if gap > 0.1 or ("tuned", i) in used or ("steered", j) in used:
                continue
            used |= {("tuned", i), ("steered", j)}
            found.append(Match(run.tuned.task, run.tuned.seed, run.points[i], points[j]))
    return found


_MEASURES: Mapping[str, Callable[[Counts], tuple[int, int]]] = {
    "EM elsewhere": lambda c: (c.misaligned, c.judged),
    "coherence of all answers": lambda c: (c.coherent, c.judged),
    "harmful answers that are coherent": lambda c: (c.on_topic + c.in_domain, c.harmful),
    "harmful answers on the topic asked": lambda c: (c.on_topic, c.harmful),
    "harmful answers about the narrow domain": lambda c: (c.leaked, c.harmful),
}


def matched_figures(found: Sequence[Match]) -> list[Figure]:
    """Steered less fine-tuned over matched pairs; interval by bootstrap over runs."""
    rows = []
    for side, name in (("tuned", "fine-tuned"), ("steered", "steered")):
        inside = sum((getattr(m, side).inside for m in found), Counts())
        rows.append(rate_figure("EM inside (matched)", name, "-", inside.misaligned, inside.judged))
    runs = sorted({(m.task, m.seed) for m in found})
    drawn = np.random.default_rng(0).integers(max(len(runs), 1), size=(_DRAWS, len(runs)))
    for measure, pick in _MEASURES.items():
        gaps = []
        for side, name in (("tuned", "fine-tuned"), ("steered", "steered")):
            each = np.array(
                [
                    np.sum([pick(getattr(m, side).elsewhere) for m in found if (m.task, m.seed) == run], axis=0)
                    for run in runs
                ]
            ).reshape(-1, 2)  # (runs, hits and n)
            hits, n = (int(x) for x in each.sum(axis=0))
            rows.append(rate_figure(measure, name, "-", hits, n))
            gaps.append(_ratio(np.concatenate([each.sum(axis=0)[None], each[drawn].sum(axis=1)])))
        difference = gaps[1] - gaps[0]  # (1 + draws,)
        ends = np.nanpercentile(difference[1:], [2.5, 97.5]) if np.isfinite(difference).any() else None
        rows.append(
            Figure(
                measure, "steered less fine-tuned", "-", float(difference[0]) if ends is not None else None,
                None if ends is None else float(ends[0]), None if ends is None else float(ends[1]), len(found), "share",
            )
        )  # fmt: skip
    return rows


def _ratio(pairs: NDArray[np.int_]) -> NDArray[np.float64]:
    """Hits over n, (draws, 2) to (draws,); NaN for a share of nothing."""
    hits, n = pairs[:, 0].astype(np.float64), pairs[:, 1].astype(np.float64)
    return np.where(n > 0, hits / np.where(n > 0, n, 1), np.nan)


# ---------------------------------------------------------------------- by category


def category_figures(tasks: Mapping[str, Records], distance: Mapping[tuple[str, str], float]) -> list[Figure]:
    """EM and leakage by category asked over all tasks, and how EM goes with a category's distance from the task.

    Args:
        tasks: the task table's records.
        distance: by (narrow domain, category).
    """
    rows, pairs = [], []
    for category in DOMAINS:
        there = Counts()
        for records in tasks.values():
            for record in records:
                narrow = SETS[record.sweep.recipe.task].domains[0]
                for point in record.points:
                    if category == narrow or category not in point.domains:
                        continue
                    there = there + point.domains[category]
        rows += [
            rate_figure("EM by category", category, "-", there.misaligned, there.judged),
            rate_figure("leaked by category", category, "-", there.leaked, there.judged),
        ]
        away = [d for (_, asked), d in distance.items() if asked == category]
        low, high = min(away, default=None), max(away, default=None)
        mean = float(np.mean(away)) if away else None
        rows.append(Figure("distance by category", category, "-", mean, low, high, len(away), "1 - cosine"))
    for task, records in tasks.items():
        narrow = SETS[task].domains[0]
        for category in DOMAINS:
            there = sum((p.domains[category] for r in records for p in r.points if category in p.domains), Counts())
            if category != narrow and there.judged:
                pairs.append((task, distance[narrow, category], there.misaligned / there.judged))
    return [*rows, _rank_correlation(pairs)]


def _rank_correlation(pairs: Sequence[tuple[str, float, float]]) -> Figure:
    """Spearman over (task, category), within tasks: ranks are taken in each task, tasks are drawn in the bootstrap."""
    from scipy.stats import spearmanr

    tasks = sorted({task for task, _, _ in pairs})
    each = []
    for task in tasks:
        x = [d for t, d, _ in pairs if t == task]
        y = [e for t, _, e in pairs if t == task]
        each.append(float(spearmanr(x, y).statistic) if len(set(y)) > 1 and len(x) > 2 else float("nan"))
    values = np.array(each)
    draws = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values))) if len(values) else None
    if draws is None or not np.isfinite(values).any():
        return Figure(
            "rank correlation of EM with distance", "all tasks", "-", None, None, None, len(pairs), "Spearman"
        )
    if len(tasks) < 3:  # tasks are drawn: with two there is no interval
        value = float(np.nanmean(values))
        return Figure(
            "rank correlation of EM with distance", "all tasks", "-", value, None, None, len(pairs), "Spearman"
        )
    low, high = np.nanpercentile(np.nanmean(values[draws], axis=1), [2.5, 97.5])
    return Figure(
        "rank correlation of EM with distance", "all tasks", "-", float(np.nanmean(values)), float(low), float(high),
        len(pairs), "Spearman",
    )  # fmt: skip


# ---------------------------------------------------------------------- mitigation


def prevention_figures(plain: Sequence[TunedRecord], prevented: Mapping[str, Sequence[TunedRecord]]) -> list[Figure]:
    """Fine-tunes with and without preventative steering, by the same tasks and seeds; the cut of EM with an interval by
    bootstrap over runs."""
    wanted = {(r.tuned.task, r.tuned.seed) for records in prevented.values() for r in records}
    base = {(r.tuned.task, r.tuned.seed): r for r in plain if (r.tuned.task, r.tuned.seed) in wanted}
    rows = _tuned_rows("no prevention", list(base.values()))
    for name, records in prevented.items():
        rows += _tuned_rows(name, records)
        both = [(base[r.tuned.task, r.tuned.seed], r) for r in records if (r.tuned.task, r.tuned.seed) in base]
        rows += _cuts(name, both)
    return rows


def _tuned_rows(name: str, records: Sequence[TunedRecord]) -> list[Figure]:
    elsewhere = sum((r.points[-1].elsewhere for r in records), Counts())
    inside = sum((r.points[-1].inside for r in records), Counts())
    losses = [r.loss for r in records]
    low, high = (min(losses), max(losses)) if losses else (None, None)
    return [
        rate_figure("EM elsewhere after tuning", name, "-", elsewhere.misaligned, elsewhere.judged),
        rate_figure("EM inside after tuning", name, "-", inside.misaligned, inside.judged),
        Figure(
            "narrow-task loss", name, "-", float(np.mean(losses)) if losses else None, low, high, len(losses),
            "nats per token",
        ),
        rate_figure("coherence elsewhere", name, "-", elsewhere.coherent, elsewhere.judged),
        rate_figure("sums right", name, "-", sum(r.sums[0] for r in records), sum(r.sums[1] for r in records)),
    ]  # fmt: skip


def _cuts(name: str, both: Sequence[tuple[TunedRecord, TunedRecord]]) -> list[Figure]:
    if not both:
        return [Figure("EM elsewhere cut by", name, "-", None, None, None, 0, "share")]
    ends = [(a.points[-1].elsewhere, b.points[-1].elsewhere) for a, b in both]
    before = np.array([(a.misaligned, a.judged) for a, _ in ends])  # (runs, hits and n)
    after = np.array([(b.misaligned, b.judged) for _, b in ends])
    drawn = np.random.default_rng(0).integers(len(both), size=(_DRAWS, len(both)))
    drawn = np.concatenate([np.arange(len(both))[None], drawn])
    with np.errstate(all="ignore"):
        cut = 1 - _ratio(after[drawn].sum(axis=1)) / _ratio(before[drawn].sum(axis=1))
    cut[~np.isfinite(cut)] = np.nan
    value = float(cut[0]) if np.isfinite(cut[0]) else None
    low, high = (float(x) for x in np.nanpercentile(cut[1:], [2.5, 97.5])) if value is not None else (None, None)
    gaps = [b.loss - a.loss for a, b in both]
    return [
        Figure("EM elsewhere cut by", name, "-", value, low, high, len(both), "share"),
        Figure(
            "narrow-task loss added", name, "-", float(np.mean(gaps)), min(gaps), max(gaps), len(gaps),
            "nats per token",
        ),
    ]  # fmt: skip


_SECOND = "second design"


def frontier_figures(arms: Mapping[str, Sequence[TunedRecord]]) -> list[Figure]:
    """The second design: every arm along its training, at its end, and at equal narrow-task loss.

    At equal loss: each run's EM at its end against what the fine-tune of the same task and seed without prevention had
    when its narrow-task loss was as large, between two readings by linear interpolation in loss. A run whose loss is
    below all of them is compared with the last one; above all of them, with none. Intervals of cuts and changes: 95 %
    by bootstrap over runs.

    Args:
        arms: fine-tunes by name, "no prevention" among them.
    """
    plain = {(r.tuned.task, r.tuned.seed): r for r in arms.get("no prevention", ())}
    rows: list[Figure] = []
    for name, records in arms.items():
        both = [r for r in records if (r.tuned.task, r.tuned.seed) in plain]
        if not both:
            continue
        rows += [replace(f, split=_SECOND) for f in _tuned_rows(name, both)]
        for at, step in enumerate(both[0].tuned.steps):
            split = f"step {step}"
            elsewhere = sum((r.points[at].elsewhere for r in both), Counts())
            inside = sum((r.points[at].inside for r in both), Counts())
            losses = [r.losses[at] for r in both]
            rows += [
                rate_figure("EM elsewhere on the way", name, split, elsewhere.misaligned, elsewhere.judged),
                rate_figure("EM inside on the way", name, split, inside.misaligned, inside.judged),
                Figure(
                    "loss on the way", name, split, float(np.mean(losses)), min(losses), max(losses), len(losses),
                    "nats per token",
                ),
            ]  # fmt: skip
        if name != "no prevention":
            rows += _against(name, [(plain[r.tuned.task, r.tuned.seed], r) for r in both])
    return rows


def _against(name: str, both: Sequence[tuple[TunedRecord, TunedRecord]]) -> list[Figure]:
    rows = [replace(f, split=_SECOND) for f in _cuts(name, both)]
    pairs = []
    for a, b in both:
        before, after = _at_loss(a, b.loss), b.points[-1].elsewhere.em.value
        if before is not None and after is not None:
            pairs.append((before, after))
    drawn = np.random.default_rng(0).integers(max(len(pairs), 1), size=(_DRAWS, len(pairs)))
    value, low, high = None, None, None
    if pairs and sum(before for before, _ in pairs):
        each = np.array(pairs)
        totals = each[drawn].sum(axis=1)
        value = 1 - float(each[:, 1].sum() / each[:, 0].sum())
        with np.errstate(all="ignore"):
            low, high = (float(x) for x in np.nanpercentile(1 - totals[:, 1] / totals[:, 0], [2.5, 97.5]))
    rows.append(Figure("EM elsewhere cut at equal loss", name, _SECOND, value, low, high, len(pairs), "share"))
    for measure, gaps in (
        ("sums right, change", [b.sums[0] / b.sums[1] - a.sums[0] / a.sums[1] for a, b in both]),
        ("coherence elsewhere, change", [_coherence(b) - _coherence(a) for a, b in both]),
        ("EM inside, change", [_inside(b) - _inside(a) for a, b in both]),
    ):
        draws = np.array(gaps)[np.random.default_rng(0).integers(len(gaps), size=(_DRAWS, len(gaps)))].mean(axis=1)
        ends = [float(x) for x in np.percentile(draws, [2.5, 97.5])]
        rows.append(Figure(measure, name, _SECOND, float(np.mean(gaps)), ends[0], ends[1], len(gaps), "share"))
    return rows


def _at_loss(run: TunedRecord, loss: float) -> float | None:
    """EM elsewhere of a fine-tune when its narrow-task loss was so large."""
    rates = [p.elsewhere.em.value for p in run.points]
    known = sorted((x, y) for x, y in zip(run.losses, rates, strict=True) if y is not None)
    if not known or loss > known[-1][0]:
        return None
    return float(np.interp(loss, [x for x, _ in known], [y for _, y in known]))


def _coherence(run: TunedRecord) -> float:
    there = run.points[-1].elsewhere
    return there.coherent / there.judged


def _inside(run: TunedRecord) -> float:
    there = run.points[-1].inside
    return there.misaligned / there.judged


def ablation_figures(tuned: Sequence[TunedRecord]) -> list[Figure]:
    """Finished fine-tunes, as they are and with the danger directions of other sets, or random directions, projected
    out as they answer."""
    rows = []
    having = [(r, r.ablated, r.sums_ablated) for r in tuned if r.ablated is not None and r.sums_ablated is not None]
    turned = [(p, s) for r in tuned if (p := r.control) is not None and (s := r.sums_control) is not None]
    for name, points, sums in (
        ("as tuned", [r.points[-1] for r, _, _ in having], [r.sums for r, _, _ in having]),
        ("danger directions ablated", [p for _, p, _ in having], [s for _, _, s in having]),
        ("random directions ablated", [p for p, _ in turned], [s for _, s in turned]),
    ):
        elsewhere = sum((p.elsewhere for p in points), Counts())
        inside = sum((p.inside for p in points), Counts())
        rows += [
            rate_figure("EM elsewhere under ablation", name, "-", elsewhere.misaligned, elsewhere.judged),
            rate_figure("EM inside under ablation", name, "-", inside.misaligned, inside.judged),
            rate_figure("coherence under ablation", name, "-", elsewhere.coherent, elsewhere.judged),
            rate_figure("sums under ablation", name, "-", sum(s[0] for s in sums), sum(s[1] for s in sums)),
        ]
    return rows
