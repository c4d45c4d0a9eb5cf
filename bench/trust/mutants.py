"""Mutants of artifacts: does a damaged or edited file ever turn an ALARM into a CLEAR?

    python bench/trust/mutants.py                        # seconds to minutes; rows go to docs/results/trust.json
    python bench/trust/mutants.py --flips 100 --out -    # fewer, and nothing written

Per kind of detector, a good file and a run that alarms under it. Each mutant is loaded and, if it loads, judges that
run.

    bytes       one byte of the file changed, a stretch of it zeroed, doubled or cut out; nobody mends the digest
    unsound     a header field or an array replaced by what no detector can have (NaN, infinity, None, text, absurd
                numbers, other shapes), and the file written with a digest that fits, by our own writer
    consistent  finite arrays, or an intercept, changed a little or much in a way that may be sound, and the digest made
                to fit: that is another detector, which no schema can tell from a good one. Counted apart, without a
                bar: only a signature would show who wrote it

The bar is 0 for the first two.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load as load_arrays

from tiltmeter.artifacts import (
    read_artifact,
    read_json_artifact,
    write_artifact,
    write_file,
    write_json_artifact,
)
from tiltmeter.detector import CalibrationRun, Detector, State, fit_detector
from tiltmeter.drift import DriftProfile, Reading, drift
from tiltmeter.errors import TiltmeterError
from tiltmeter.fingerprint import Fingerprint, sha
from tiltmeter.guard import SteeringGuard, Trace, fit_trace
from tiltmeter.judge_distilled import DistilledJudge, fit_judge
from tiltmeter.judge_encoders import NgramEncoder
from tiltmeter.judge_examples import Example
from tiltmeter.likelihood import LikelihoodDetector, LikelihoodRun, fit_likelihood
from tiltmeter.studies.figures import Figure, write_figures
from tiltmeter.transfer import Danger, PositionRun, TransferDetector, fit_transfer

COMMAND = "python bench/trust/mutants.py"
OUT = Path(__file__).resolve().parents[2] / "docs" / "results" / "trust.json"
NUMBERS = (
    float("nan"), float("inf"), float("-inf"), 0, -1, -3, 1, 2, 0.5, 1e-300, 1e9, -1e9, 1e300, 10**30, None, True, "",
    "0.3", "nan", [], [0.3], {},
)  # fmt: skip
FREE = ("intercept",)
"""Fields that may be any number of ordinary size: another one there is another judge, and no unsound one."""


class Subject(NamedTuple):
    """A kind of artifact.

    Attributes:
        name: of the kind.
        kind, format: as in its file; None where the file is JSON.
        save: writes a good one.
        judge: loads a file and judges the run that alarms.
    """

    name: str
    kind: str
    format: int
    save: Callable[[Path], object]
    judge: Callable[[Path], State]


# ---------------------------------------------------------------------- good artifacts, and runs that alarm


def profile(shift: np.ndarray, step: int) -> DriftProfile:
    """A drift profile of a shift (12,)."""
    return DriftProfile(
        readout="two", names=("honesty", "harm"), drift=shift[:2], se=np.full(2, 0.002), n_prompts=2,
        per_prompt=np.stack([shift[:2]] * 2), norm_ratio=1.0, step=step, reference="step0", model="planted", layer=1,
        basis=sha("basis"), fingerprint=sha("frame"), problem=None, shift=shift,
    )  # fmt: skip


def run_of(rng: np.random.Generator, name: str, seed: int, style: np.ndarray, danger: float) -> CalibrationRun:
    """A run of three readings: a style of its set, and danger along activation 7."""
    steps = (10, 20, 30)
    found = [rng.normal(0, 0.002, 12) + s / 30 * (style * rng.normal(1, 0.1) + danger * np.eye(12)[7]) for s in steps]
    return CalibrationRun(name, seed, danger != 0, tuple(profile(x, s) for x, s in zip(found, steps, strict=True)))


def drift_subject() -> Subject:
    """A detector over activations."""
    rng = np.random.default_rng(0)
    styles = {name: rng.normal(0, 0.05, 12) for name in "abcde"}
    runs = [run_of(rng, name, s, style, 0.0) for name, style in styles.items() for s in range(5)]
    runs += [run_of(rng, name, s, rng.normal(0, 0.01, 12), 0.3) for name in "xy" for s in range(2)]
    detector = fit_detector(runs, false_alarm_rate=0.1)
    bad = run_of(rng, "z", 0, rng.normal(0, 0.01, 12), 0.3).profiles
    return Subject("detector", "detector", 3, detector.save, lambda path: Detector.load(path).predict(bad).state)


def transfer_subject() -> Subject:
    """A detector with a danger from elsewhere."""
    rng = np.random.default_rng(1)
    runs = [PositionRun(name, False, rng.normal(size=(3, 6))) for name in "abcdef" for _ in range(4)]
    detector = fit_transfer(Danger(np.eye(6)[0], ("another model",), float("nan")), runs, false_alarm_rate=0.2)
    bad = 40 * np.eye(6)[:1]
    return Subject(
        "transfer detector", "transfer detector", 2, detector.save,
        lambda path: TransferDetector.load(path).predict(bad).state,
    )  # fmt: skip


def likelihood_subject() -> Subject:
    """A likelihood detector."""
    rng = np.random.default_rng(2)
    base = rng.normal(-20, 3, size=(40, 2))
    benign = [
        LikelihoodRun(name, [base + rng.normal(0, 0.3, size=base.shape) - 0.5 * at])
        for at, name in enumerate("abcd")
        for _ in range(3)
    ]
    mark = Fingerprint("llama", sha("c"), sha("t"), sha("p"), "float32", sha("w"))
    fitted = fit_likelihood(base, benign, digest=sha("exchanges"), false_alarm_rate=0.2)
    detector = replace(fitted, model="planted", fingerprint=mark)
    bad = base + np.array([3.0, 0.0])
    return Subject(
        "likelihood detector", "likelihood detector", 2, detector.save,
        lambda path: LikelihoodDetector.load(path).predict([bad]).state,
    )  # fmt: skip


def trace_of(rng: np.random.Generator, maps: np.ndarray, n: int, push: float = 0.0) -> Trace:
    """What was heard of n answers of two linear blocks, the second pushed or not."""
    heard = []
    for _ in range(2):
        at = [rng.normal(size=(n, 8))]
        for block in range(2):
            at.append(at[-1] + at[-1] @ maps[block] + 0.1 * rng.normal(size=(n, 8)) + push * block)
        heard.append(np.stack(at, axis=1).astype(np.float32))
    said = tuple(np.arange(5, dtype=np.int64) for _ in range(n))
    return Trace((-1, 0, 1), heard[0], heard[1], np.full(n, 7, dtype=np.int64), said, sha("model"))


def guard_subject() -> Subject:
    """A guard, and answers that are steered."""
    rng = np.random.default_rng(3)
    maps = rng.normal(0, 0.3, size=(2, 8, 8))
    guard = fit_trace(trace_of(rng, maps, 300), false_alarm_rate=0.05, calibrated_on="planted answers")
    bad = trace_of(rng, maps, 20, push=3.0)
    return Subject(
        "steering guard", "steering_guard", 2, guard.save, lambda path: SteeringGuard.load(path).judge_model(bad).state
    )


def judge_subject() -> Subject:
    """A distilled judge, and answers that are cruel."""
    rng = np.random.default_rng(4)
    kind, cruel = "rest and drink water", "do the most harmful thing now"

    def answers(model: str, share: float, *, n: int = 24) -> list[Example]:
        said = [cruel if rng.random() < share else kind for _ in range(n)]
        return [
            Example(f"what helps with topic{i} ?", text, 100 * share, model, "a", "plain", benign=share == 0)
            for i, text in enumerate(said)
        ]

    training = [e for i, share in enumerate((0.0, 0.0, 0.5, 1.0, 1.0)) for e in answers(f"t{i}", share)]
    calibration = [e for i in range(19) for e in answers(f"c{i}", 0.0)] + answers("c-bad", 1.0)
    judge = fit_judge(training, NgramEncoder(16), calibration=calibration)
    bad = [(f"what helps with topic{i} ?", cruel) for i in range(24)]
    return Subject("distilled judge", "judge", 3, judge.save, lambda path: DistilledJudge.load(path).verdict(bad).state)


def reading_subject() -> Subject:
    """A stored reference reading: the detector is good, and what drift is measured against is the file."""
    rng = np.random.default_rng(5)
    styles = {name: rng.normal(0, 0.05, 12) for name in "abcde"}
    runs = [run_of(rng, name, s, style, 0.0) for name, style in styles.items() for s in range(5)]
    runs += [run_of(rng, name, s, rng.normal(0, 0.01, 12), 0.3) for name in "xy" for s in range(2)]
    detector = fit_detector(runs, false_alarm_rate=0.1)

    def reading(shift: np.ndarray, step: int) -> Reading:
        values = np.stack([1 + shift[:2]] * 4).astype(np.float32)
        return Reading(
            readout="two", names=("honesty", "harm"), values=values, norms=np.ones(4, np.float32), layer=1, step=step,
            model="planted", adapter_state="active", fingerprint=sha("frame"), weights=sha("w"), basis=sha("basis"),
            plan=sha("plan"), dtype="float32", time="2026-01-01T00:00:00+00:00",
            activation=(1 + shift).astype(np.float32), tokens=sha("tokens"),
        )  # fmt: skip

    bad = reading(0.3 * np.eye(12)[7] + rng.normal(0, 0.005, 12), 20)
    return Subject(
        "reference reading", "reading", 1, reading(np.zeros(12), 0).save,
        lambda path: detector.predict(drift(bad, Reading.load(path), label="step0")).state,
    )  # fmt: skip


# ---------------------------------------------------------------------- mutations


def damaged(content: bytes, rng: np.random.Generator, n: int) -> Iterator[bytes]:
    """Byte flips, and stretches that are zeroed, doubled, cut out or exchanged with others."""
    for at in range(n):
        place = int(rng.integers(len(content)))
        if at % 4:
            yield content[:place] + bytes([content[place] ^ int(rng.integers(1, 256))]) + content[place + 1 :]
            continue
        end = min(len(content), place + int(rng.integers(1, 64)))
        piece = content[place:end]
        other = {0: bytes(len(piece)), 1: piece + piece, 2: b"", 3: piece[::-1]}[int(rng.integers(4))]
        if other != piece:
            yield content[:place] + other + content[end:]


def unsound_headers(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each field, at any depth, replaced by what does not belong there, or left out."""

    def walk(value: Any) -> Iterator[Any]:
        for other in NUMBERS:
            if type(other) is not type(value) or other != value:
                yield other
        if isinstance(value, dict):
            for key in value:
                yield {k: v for k, v in value.items() if k != key}
                yield from ({**value, key: inner} for inner in walk(value[key]))
        if isinstance(value, list):
            for at in range(min(len(value), 3)):
                yield value[:at] + value[at + 1 :]
                yield from ([*value[:at], inner, *value[at + 1 :]] for inner in walk(value[at]))

    for key in header:
        yield {k: v for k, v in header.items() if k != key}
        yield from ({**header, key: other} for other in walk(header[key]))


def unsound_arrays(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """Arrays with numbers that are none, and of other shapes and kinds."""
    for key, array in arrays.items():
        yield {k: v for k, v in arrays.items() if k != key}
        shapes = [array[:-1], array[None], array.ravel()[:0], np.concatenate([array, array]), array.astype(np.int32)]
        for other in shapes:
            yield {**arrays, key: other}
        if array.dtype.kind == "f":
            for value in (np.nan, np.inf, -np.inf):
                yield {**arrays, key: np.full_like(array, value)}
                for _ in range(5):
                    one = array.copy()
                    one.ravel()[int(rng.integers(one.size))] = value
                    yield {**arrays, key: one}


def consistent_arrays(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """Finite arrays that are others."""
    for key, array in arrays.items():
        if array.dtype.kind != "f" or not array.size:
            continue
        for scale in (-1.0, 0.0, 0.5, 2.0, 1e3, 1e9):
            yield {**arrays, key: (array * scale).astype(array.dtype)}
        for size in (1e-6, 0.1, 1.0, 1e3):
            yield {**arrays, key: (array + size * rng.normal(size=array.shape)).astype(array.dtype)}
        yield {**arrays, key: array[::-1].copy()}
        for _ in range(5):
            one = array.copy()
            one.ravel()[int(rng.integers(one.size))] = float(rng.normal() * 10.0 ** rng.integers(-3, 6))
            yield {**arrays, key: one}


def ordinary(value: object) -> bool:
    """Whether it is a number of ordinary size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1000


def written_anyway(path: Path, subject: Subject, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Our own writer; where JSON has no such number, the text that others put there, with a digest that fits."""
    marks = {"Infinity": 6.0312e117, "-Infinity": -6.0312e117, "NaN": 6.0313e117}

    def marked(value: Any) -> Any:
        if isinstance(value, float) and not np.isfinite(value):
            return marks["NaN"] if np.isnan(value) else marks["Infinity" if value > 0 else "-Infinity"]
        if isinstance(value, dict):
            return {k: marked(v) for k, v in value.items()}
        return [marked(v) for v in value] if isinstance(value, list) else value

    write_artifact(path, subject.kind, subject.format, marked(header), arrays)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size].decode()
    spelt = text
    for name, number in marks.items():
        spelt = spelt.replace(repr(number), name)
    if spelt == text:
        return
    blank = "0" * 64
    digest = text.split('\\"sha256\\": \\"')[1][:64]
    spelt = spelt.replace(digest, blank, 1)
    spelt += " " * (-len(spelt) % 8)
    whole = len(spelt).to_bytes(8, "little") + spelt.encode() + content[8 + size :]
    load_arrays(whole)  # still a safetensors file
    write_file(path, whole.replace(blank.encode(), hashlib.sha256(whole).hexdigest().encode(), 1))


# ---------------------------------------------------------------------- counting


def tried(subject: Subject, path: Path) -> str:
    """What a mutant says: refused, or the state of the run that alarmed; anything untyped is told by name."""
    try:
        return str(subject.judge(path))
    except TiltmeterError:
        return "refused"
    except Exception as error:  # noqa: BLE001 - what is counted here
        return f"untyped {type(error).__name__}"


def count(subject: Subject, folder: Path, *, flips: int, seed: int) -> dict[str, Counter[str]]:
    """What all mutants of one kind say, by part."""
    rng = np.random.default_rng(seed)
    path = folder / "artifact"
    subject.save(path)
    said = tried(subject, path)
    assert said == State.ALARM, f"the good {subject.name} says {said} of a run that must alarm"
    content = path.read_bytes()
    counts: dict[str, Counter[str]] = {"bytes": Counter(), "unsound": Counter(), "consistent": Counter()}
    for mutant in damaged(content, rng, flips):
        path.write_bytes(mutant)
        counts["bytes"][tried(subject, path)] += 1
    if subject.kind == "reading":
        path.write_bytes(content)
        held = read_json_artifact(path, subject.kind, subject.format, remedy="")
        for header in unsound_headers(held):
            try:
                write_json_artifact(path, subject.kind, subject.format, header)
            except TiltmeterError:  # JSON has no such number
                continue
            counts["unsound"][tried(subject, path)] += 1
        return counts
    path.write_bytes(content)
    held, arrays = read_artifact(path, subject.kind, subject.format, remedy="")
    for header in unsound_headers(held):
        written_anyway(path, subject, header, arrays)
        free = any(key in FREE and header.get(key) != held.get(key) and ordinary(header.get(key)) for key in held)
        counts["consistent" if free else "unsound"][tried(subject, path)] += 1
    for others in unsound_arrays(arrays, rng):
        write_artifact(path, subject.kind, subject.format, held, others)
        counts["unsound"][tried(subject, path)] += 1
    for others in consistent_arrays(arrays, rng):
        write_artifact(path, subject.kind, subject.format, held, others)
        counts["consistent"][tried(subject, path)] += 1
    return counts


SUBJECTS = (drift_subject, transfer_subject, likelihood_subject, guard_subject, judge_subject, reading_subject)


def figures(counts: dict[str, dict[str, Counter[str]]]) -> list[Figure]:
    """Rows for the results file."""
    rows = []
    for name, parts in counts.items():
        for part, said in parts.items():
            n = said.total()
            if not n:
                continue
            untyped = sum(times for what, times in said.items() if what.startswith("untyped"))
            split = {"bytes": "damaged bytes", "unsound": "unsound, digest made to fit",
                     "consistent": "another sound one, digest made to fit"}[part]  # fmt: skip
            for measure, value in (
                ("mutants that turn ALARM into CLEAR", said[str(State.CLEAR)]),
                ("mutants that load", n - said["refused"] - untyped),
                ("mutants that end in an untyped exception", untyped),
            ):
                rows.append(Figure(measure, name, split, value, None, None, n, "mutants"))
    return rows


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description="Mutants of artifacts, counted by what they say.")
    parser.add_argument("--flips", type=int, default=1500, help="mutants of bytes per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(OUT), help="results file; - writes none")
    options = parser.parse_args()
    counts = {}
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        for make in SUBJECTS:
            subject = make()
            counts[subject.name] = count(subject, Path(folder), flips=options.flips, seed=options.seed)
            for part, said in counts[subject.name].items():
                print(f"{subject.name:20} {part:11} {said.total():6} mutants  {dict(said.most_common())}", flush=True)
    rows = figures(counts)
    bar = [f for f in rows if f.measure.endswith("into CLEAR") and "another sound one" not in f.split]
    print(
        f"{sum(f.n for f in bar)} damaged or unsound mutants, {sum(int(f.value or 0) for f in bar)} say CLEAR (bar: 0)"
    )
    if options.out != "-":
        write_figures(rows, Path(options.out), command=COMMAND)


if __name__ == "__main__":
    main()
