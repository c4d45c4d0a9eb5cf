"""What was seen of a run, step by step, and what that makes of the run as a whole.

The verdict on a run is a function of the SET of its observations: neither their order nor how often one looks changes
it. Any alarm is an alarm. CLEAR needs every reading: one that failed, and was not mended by a reading of the same step
that succeeded, leaves the run INCONCLUSIVE. It knows nothing of models or files, and imports without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tiltmeter.detector import State, Verdict, inconclusive
from tiltmeter.drift import DriftProfile, Reading

__all__ = ["Observation", "first_alarm", "overall"]


@dataclass(frozen=True, eq=False)
class Observation:
    """What was seen at one step.

    Attributes:
        step: the training step.
        reading: None where the measurement failed; the verdict says why.
        profile: None where there is no reading, or none to compare it with.
        verdict: on the run up to this step.
        seconds: what the measurement took.
        new: False where it was read earlier and comes from the record.
    """

    step: int
    reading: Reading | None
    profile: DriftProfile | None
    verdict: Verdict
    seconds: float | None = None
    new: bool = True


def first_alarm(observations: Iterable[Observation]) -> Observation | None:
    """The alarm at the earliest step, whatever order they come in."""
    alarms = [o for o in observations if o.verdict.state is State.ALARM]
    return min(alarms, key=lambda o: (o.step, -_number(o.verdict.score), o.verdict.reason), default=None)


def overall(observations: Sequence[Observation], *, failures: Sequence[str] = ()) -> Verdict:
    """The verdict on a run, see the module's text.

    Args:
        observations: in any order; of several of one step, those with a reading count, and of these the worst.
        failures: what else is known to be missing from the run, in sentences.
    """
    alarm = first_alarm(observations)
    if alarm is not None:
        return alarm.verdict
    standing = [
        _standing([o for o in observations if o.step == step]) for step in sorted({o.step for o in observations})
    ]
    if not standing:
        return inconclusive(failures[0] if failures else "there is no reading to judge.")
    clear = [o.verdict for o in standing if o.verdict.state is State.CLEAR]
    moved = [o.step for o in standing if o.profile is not None and not _unmoved(o)]
    begun = min(moved, default=math.inf)
    # What equals the reference, before anything has moved, shows training that has not begun: no hole in the run.
    holes = [o for o in standing if o.verdict.state is not State.CLEAR and not (_unmoved(o) and o.step < begun)]
    if not clear:
        return (holes or standing)[-1].verdict
    if holes:
        step, why = holes[0].step, holes[0].verdict.reason
        failures = (f"{len(holes)} of {len(standing)} readings could not be judged, first at step {step}: {why}",)
    if failures:
        return replace(clear[-1], state=State.INCONCLUSIVE, p_value=None, false_alarm_rate=None, reason=failures[0])
    return clear[-1]


def _standing(same_step: Sequence[Observation]) -> Observation:
    """The one that counts of those of one step."""
    read = [o for o in same_step if o.reading is not None] or same_step
    return min(read, key=lambda o: (o.verdict.state is State.CLEAR, -_number(o.verdict.score), o.verdict.reason))


def _unmoved(observation: Observation) -> bool:
    return observation.profile is not None and not observation.profile.drift.any()


def _number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else -math.inf
