"""Numbers, verdicts and comparisons in words.

What it is: small functions from values to short English text, and the guard that decides which state a card
shows. A missing value is always a phrase, never an empty string and never a zero.

What it does not know: HTML. What it returns is plain text that the template escapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

import numpy as np

from tiltmeter.report import BehaviorSection, Rate, RunSection, VerdictRow

__all__ = [
    "behavior_verdict",
    "count",
    "events_title",
    "fixed",
    "flatten",
    "is_known",
    "known_or_none",
    "listing",
    "number",
    "order_of_events",
    "percent",
    "percent_interval",
    "rate_in_words",
    "run_verdict",
    "unjudged",
]

NO_VALUE = "no value"
_NBSP = "\N{NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"
_SMALL = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)


def known_or_none(value: float) -> float | None:
    """A float out of an array, None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits and a real minus sign."""
    if not is_known(value):
        return NO_VALUE
    return f"{value:.{digits}g}".replace("-", _MINUS)


def fixed(value: float | None, places: int = 3, *, sign: bool = False) -> str:
    """A number with a fixed number of decimals, for columns."""
    if not is_known(value):
        return NO_VALUE
    return f"{value:{'+' if sign else ''}.{places}f}".replace("-", _MINUS)


def percent(share: float | None) -> str:
    """A share as a percentage; small ones keep one decimal more, and nothing positive is rounded to 0 %."""
    if not is_known(share):
        return NO_VALUE
    if 0 < share < 0.0005:
        return f"< 0.1{_NBSP}%"
    text = f"{100 * share:.1f}"
    return f"{text.removesuffix('.0')}{_NBSP}%"


def percent_interval(low: float | None, high: float | None) -> str:
    """An interval of shares."""
    if not is_known(low) or not is_known(high):
        return "interval not given"
    return f"{percent(low).removesuffix(f'{_NBSP}%')} to {percent(high)}"


def rate_in_words(rate: Rate) -> str:
    """A rate with its counts and interval."""
    if not is_known(rate.value):
        return f"no rate ({rate.n} scored)"
    hits = round(rate.value * rate.n)
    return f"{percent(rate.value)} ({hits} of {rate.n}; {percent_interval(rate.low, rate.high)})"


def count(amount: int, noun: str, plural: str | None = None) -> str:
    """'one reading', '12 readings'."""
    word = _SMALL[amount] if 0 <= amount < len(_SMALL) else f"{amount:,}"
    return f"{word} {noun if amount == 1 else plural or noun + 's'}"


def listing(items: Sequence[str], most: int | None = None) -> str:
    """'a, b and c'; with `most`, the rest is counted instead of named."""
    shown = list(items)
    if most is not None and len(shown) > most:
        rest = len(shown) - most
        shown = [*shown[:most], f"{rest} more"]
    if len(shown) < 2:
        return "".join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def flatten(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of a provenance table: nested keys joined by a middle dot, values as text, None in words."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flatten(value, f"{name} · ") or [(name, "nothing recorded")]
        elif value is None or value == "":
            rows.append((name, "not recorded"))
        elif isinstance(value, (list, tuple)):
            rows.append((name, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((name, str(value)))
    return rows


def unjudged(run: RunSection) -> list[tuple[int, str]]:
    """Readings that could not be judged, with the reason; what equals the reference before anything moved is none."""
    holes = []
    moved = False
    for position, step in enumerate(np.asarray(run.steps).tolist()):
        still = bool(run.drift.shape[1]) and not np.any(run.drift[position])
        moved = moved or (not still and bool(np.isfinite(run.drift[position]).all()))
        if still and not moved:
            continue
        verdict = run.verdicts[position] if run.verdicts else None
        if verdict is not None and verdict.state == "INCONCLUSIVE":
            holes.append((step, verdict.reason))
        elif not np.isfinite(run.score[position]):
            holes.append((step, "it has no score"))
    return holes


def run_verdict(run: RunSection) -> VerdictRow:
    """The verdict that the card of a run shows: the given one, unless the readings contradict it.

    An alarm at any reading is an alarm. A CLEAR needs every reading judged, a score, and a threshold that the score
    does not pass; otherwise it is INCONCLUSIVE.
    """
    alarms = [verdict for verdict in run.verdicts if verdict.state == "ALARM"]
    if run.verdict is not None and run.verdict.state != "CLEAR" and not alarms:
        return run.verdict
    if run.verdict is not None and run.verdict.state == "ALARM":
        return run.verdict
    if alarms:
        said = f" The verdict on the whole run says {run.verdict.state}; the alarm counts." if run.verdict else ""
        return replace(alarms[0], reason=alarms[0].reason + said)
    blank = VerdictRow(state="INCONCLUSIVE", reason="")
    if len(run.steps) == 0:
        return replace(run.verdict or blank, state="INCONCLUSIVE", reason="The run holds no reading.")
    if run.verdict is None and not run.verdicts:
        return replace(blank, reason="No detector has judged this run.")
    verdict = run.verdict or max(run.verdicts, key=lambda row: row.score if is_known(row.score) else -math.inf)
    doubt = _doubt(run, verdict)
    return replace(verdict, state="INCONCLUSIVE", reason=doubt) if doubt else verdict


def _doubt(run: RunSection, clear: VerdictRow) -> str:
    """Why a CLEAR cannot be shown as one; empty where it can."""
    holes = unjudged(run)
    if holes:
        step, why = holes[0]
        return (
            f"{count(len(holes), 'reading').capitalize()} of {len(run.steps)} could not be judged "
            f"(step {step}: {why.rstrip('.')})."
        )
    if not is_known(clear.score) or not is_known(clear.threshold):
        missing = "score" if not is_known(clear.score) else "threshold"
        return f"The detector said CLEAR without a {missing}, so there is nothing to hold it to."
    if clear.score > clear.threshold:
        return "The detector said CLEAR, but the score is above the threshold: these do not fit together."
    if run.first_alarm_step is not None:
        return f"The detector said CLEAR, but an alarm is recorded at step {run.first_alarm_step}."
    return ""


def behavior_verdict(section: BehaviorSection) -> VerdictRow:
    """The verdict on a set of answers; without a rate it is never CLEAR."""
    verdict = section.verdict or VerdictRow(state="INCONCLUSIVE", reason="The answers came without a verdict.")
    if verdict.state == "CLEAR" and not is_known(section.em_rate.value):
        why = section.reason or "no rate could be formed"
        return replace(verdict, state="INCONCLUSIVE", reason=f"There is no EM rate: {why}")
    return verdict


def order_of_events(run: RunSection) -> str:
    """When the alarm came and when behavior turned, compared."""
    limit = percent(run.behavior_threshold)
    alarm = "no alarm" if run.first_alarm_step is None else f"alarm at step {run.first_alarm_step}"
    if run.first_alarm_step is None and run_verdict(run).state == "INCONCLUSIVE":
        alarm = "no alarm, but not every reading could be judged"
    if run.behavior is None:
        return f"{alarm}; behavior was not measured"
    if run.behavior_step is None:
        measured = int(np.isfinite(run.behavior.em_rate).sum())
        if measured == 0:
            return f"{alarm}; no EM rate could be formed"
        return f"{alarm}; EM rate above {limit} at none of {count(measured, 'checkpoint')}"
    turned = f"EM rate above {limit} from step {run.behavior_step}"
    if run.first_alarm_step is None:
        return f"{alarm}; {turned}"
    lead = run.behavior_step - run.first_alarm_step
    if lead == 0:
        return f"{alarm}; {turned}: at the same step"
    return f"{alarm}; {turned}: {abs(lead)} steps {'earlier' if lead > 0 else 'too late'}"


def events_title(run: RunSection) -> str:
    """The order of events as a title's clause: 'poisoned alarms 10 steps before its EM rate passes 5 %'."""
    turned = f"its EM rate passes {percent(run.behavior_threshold)}"
    if run.first_alarm_step is None:
        if run.behavior_step is not None:
            return f"{run.name} never alarms although {turned} at step {run.behavior_step}"
        state = run_verdict(run).state
        return f"{run.name} cannot be judged" if state == "INCONCLUSIVE" else f"{run.name} never alarms"
    if run.behavior_step is None:
        return f"{run.name} alarms at step {run.first_alarm_step}"
    lead = run.behavior_step - run.first_alarm_step
    if lead == 0:
        return f"{run.name} alarms at the step at which {turned}"
    return f"{run.name} alarms {abs(lead)} steps {'before' if lead > 0 else 'after'} {turned}"
