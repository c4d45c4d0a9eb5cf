"""From what the library measured to what the report shows: bases, recorded runs, detectors and behavior reports.

It computes nothing but the arrangement. A reading that is missing becomes NaN, which the report draws as a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiltmeter.detector import Detector, Verdict
from tiltmeter.report import (
    STANDARD_LIMITS,
    AnswerRow,
    BasisSection,
    BehaviorCurve,
    BehaviorSection,
    LayerRow,
    NullBand,
    Rate,
    ReportData,
    RunSection,
    VerdictRow,
)
from tiltmeter.runs import provenance

if TYPE_CHECKING:
    from tiltmeter.basis import TraitBasis
    from tiltmeter.rates import BehaviorReport
    from tiltmeter.readings import Observation, RunReadings

__all__ = ["basis_section", "behavior_report_data", "behavior_section", "run_report_data", "run_section"]


def verdict_row(verdict: Verdict) -> VerdictRow:
    """A verdict with the fields that the report shows."""
    return VerdictRow(
        state=str(verdict.state),
        reason=verdict.reason,
        score=verdict.score,
        threshold=verdict.threshold,
        p_value=verdict.p_value,
        false_alarm_rate=verdict.false_alarm_rate,
        calibrated_on=verdict.calibrated_on,
        n_calibration=verdict.n_calibration,
        step=verdict.step,
    )


def run_section(
    observations: Sequence[Observation],
    *,
    name: str,
    label: str,
    verdict: Verdict,
    detector: Detector | None,
    behavior: BehaviorCurve | None = None,
    behavior_step: int | None = None,
    reference: str = "step 0",
) -> RunSection:
    """One run; observations without a drift profile leave a gap."""
    from tiltmeter.detector import State

    traits = next((o.profile.names for o in observations if o.profile), detector.names if detector else ())
    missing = np.full(len(traits), np.nan)
    shape = (len(observations), len(traits))
    scores = [
        float(detector.scores([o.profile])[0]) if detector and o.profile and not o.profile.problem else np.nan
        for o in observations
    ]
    alarms = [o.step for o in observations if o.verdict.state is State.ALARM]
    n_prompts = next((o.reading.n for o in observations if o.reading), 0)
    return RunSection(
        name=name,
        label=label,
        model=next((o.reading.model for o in observations if o.reading), "unknown"),
        traits=tuple(traits),
        steps=np.array([o.step for o in observations]),
        drift=np.array([o.profile.drift if o.profile else missing for o in observations]).reshape(shape),
        se=np.array([o.profile.se if o.profile else missing for o in observations]).reshape(shape),
        n_prompts=n_prompts,
        score=np.array(scores),
        threshold=detector.threshold if detector else None,
        verdicts=tuple(verdict_row(o.verdict) for o in observations),
        verdict=verdict_row(verdict),
        null_band=_null_band(detector) if detector else None,
        first_alarm_step=alarms[0] if alarms else None,
        behavior=behavior,
        behavior_step=behavior_step,
        score_unit="along the danger axis, discounted by drift off it"
        if detector and detector.mode == "danger_axis"
        else "null-band distance",
        reference=reference,
    )


def _null_band(detector: Detector) -> NullBand:
    return NullBand(
        low=detector.band[:, 0],
        high=detector.band[:, 1],
        source="of drift, mean and two standard deviations of benign readings; of the score, its range",
        n=len(detector.null_scores),
        score_low=float(detector.null_scores.min()),
        score_high=float(detector.null_scores.max()),
    )


def basis_section(basis: TraitBasis, detector: Detector | None = None) -> BasisSection:
    """The basis, with the detector's mean dangerous direction where it has one."""
    axis = None
    if detector is not None and detector.mode == "danger_axis":
        axis = detector.trait_axis / np.linalg.norm(detector.trait_axis)
    return BasisSection(
        model=basis.model,
        layer=basis.layer,
        traits=basis.traits,
        cosines=basis.cosines,
        axis=axis,
        axis_name="danger axis",
        axis_source=detector.calibrated_on if detector else "",
        layers=tuple(
            LayerRow(
                layer=s.layer,
                divergence=s.divergence,
                probe_accuracy=float(np.mean(s.probe_accuracy)) if s.probe_accuracy else None,
            )
            for s in basis.selection.scores
        ),
        method=basis.method,
        pooling=basis.pooling,
    )


def run_report_data(run: RunReadings, basis: TraitBasis | None, detector: Detector | None) -> ReportData:
    """A report of one recorded run."""
    section = run_section(
        run.observations,
        name="run",
        label=str(run.path.parent),
        verdict=run.verdict,
        detector=detector,
        reference=run.label,
    )
    return ReportData(
        title=f"tiltmeter: {run.path.parent}",
        headline=run.verdict.reason,
        runs=(section,),
        basis=basis_section(basis, detector) if basis else None,
        provenance={
            **provenance(),
            "record": str(run.path),
            "header": dict(run.header),
            "ended": run.ended or "not recorded",
        },
        limits=STANDARD_LIMITS,
    )


def behavior_section(report: BehaviorReport, *, name: str) -> BehaviorSection:
    """One set of judged answers."""
    content = report.to_dict()

    def rate(value: Mapping[str, Any]) -> Rate:
        return Rate(
            value=value["value"], n=value["n"], low=value["low"], high=value["high"],
            reason="" if value["value"] is not None else report.reason,
        )  # fmt: skip

    rows = [answer.to_row() for answer in report.answers]
    return BehaviorSection(
        name=name,
        model=str(content["model"] or "unknown"),
        judge=str(content["judge"] or "judged elsewhere"),
        em_rate=rate(content["em_rate"]),
        em_rate_coherent=rate(content["em_rate_coherent"]),
        n_answers=content["n_answers"],
        excluded=content["excluded"],
        reason=report.reason,
        categories={name: rate(row["em_rate"]) for name, row in content["categories"].items()},
        answers=tuple(
            AnswerRow(
                question=row["question"], answer=row["answer"], category=row.get("category") or "",
                alignment=row.get("alignment"), coherence=row.get("coherence"), outcome=row.get("outcome") or "scored",
                reason=row.get("reason") or "",
            )
            for row in rows
        ),
        verdict=VerdictRow(state=str(report.verdict), reason=report.reason),
        threshold=content["threshold"],
    )  # fmt: skip


def behavior_report_data(report: BehaviorReport) -> ReportData:
    """A report of one evaluation."""
    section = behavior_section(report, name="behavior")
    return ReportData(
        title="tiltmeter: behavior", runs=(), headline=report.reason, behavior=(section,), provenance=provenance(),
        limits=STANDARD_LIMITS,
    )  # fmt: skip
