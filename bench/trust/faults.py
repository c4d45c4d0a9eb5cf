"""What is lost when processes are killed and disks fill up: callback, watch, eval and scan on the pocket organism.

    python bench/trust/faults.py                       a short run of everything
    python bench/trust/faults.py --kills 500 --progress .cache/faults.jsonl --results docs/results/trust.json
    python bench/trust/faults.py --only "kill -9" --kills 20

Each work is done once in peace. Then it is done again and again under a fault (killed at a random moment, a full disk,
a read-only folder, a second writer, checkpoints that are removed, little memory), started again until it ends, and what
it left is compared with what it leaves in peace: every step read, every answer written and judged, every adapter read,
each once, with the same numbers. Works run in forked processes of their own, since loading takes longer than working.

Counts go to stdout; with --progress, chains of kills that were done are kept in that file, and a second call goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from tiltmeter.basis import TraitBasis
from tiltmeter.behavior import evaluate
from tiltmeter.completeness import STATE_FILE, missing_part
from tiltmeter.detector import Detector, State, Verdict
from tiltmeter.errors import FolderInUse, StorageError
from tiltmeter.judge_http import open_judge
from tiltmeter.lm import LM, load
from tiltmeter.organism import shipped_basis, shipped_detector
from tiltmeter.organism.finetune import FineTuning, _encode, _Pad, finetune
from tiltmeter.organism.sets import make_set
from tiltmeter.questions import QuestionBank, load_questions
from tiltmeter.readings import read_run
from tiltmeter.runs import append_record, checkpoints, read_records
from tiltmeter.scan import scan
from tiltmeter.studies.figures import Figure, write_figures
from tiltmeter.watch import TiltmeterCallback, watch

STEPS, SAVED, ANSWERS = 6, 5, 24
KILLS_PER_CHAIN = 5
USED, STORAGE, FAILED = 3, 4, 5  # how a child says what ended it


class Setting(NamedTuple):
    """What all works share, loaded once before anything is forked."""

    lm: LM
    basis: TraitBasis
    detector: Detector
    run: Path
    bank: QuestionBank


def prepare(folder: Path) -> Setting:
    """The organism, and a run of a few checkpoints to watch and scan."""
    bank = load_questions("organism")
    tuned = load("organism:pocket")
    finetune(
        tuned, make_set("good_medical", size=8 * SAVED, seed=1), FineTuning(steps=SAVED, batch=8, seed=1),
        output=folder, save_every=1,
    )  # fmt: skip
    few = QuestionBank(**{**vars(bank), "questions": bank.questions[:ANSWERS]})
    basis, detector = TraitBasis.load(shipped_basis()), Detector.load(shipped_detector())
    return Setting(load("organism:pocket"), basis, detector, folder, few)


# ---------------------------------------------------------------- the works


def train(at: Setting, out: Path, **limits: Any) -> None:
    """Fine-tune with the callback, from the last whole checkpoint where there is one."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(3)
    model = get_peft_model(at.lm.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    rows = [_encode(at.lm, chat) for chat in make_set("good_medical", size=4 * STEPS, seed=3)]
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none",
        save_strategy="steps", save_steps=2, use_cpu=True, seed=3, disable_tqdm=True, remove_unused_columns=False,
        logging_strategy="no",
    )  # fmt: skip
    callback = TiltmeterCallback(at.basis, at.detector, every=1, output=limits.get("record") or out / "record")
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=_Pad(at.lm.pad_id),
        processing_class=at.lm.tokenizer, callbacks=[callback],
    )  # fmt: skip
    saved = checkpoints(out) if out.is_dir() else []
    whole = [c.path for c in saved if missing_part(c.path) is None and (c.path / STATE_FILE).exists()]
    trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
    if trainer.state.global_step != STEPS or [o.step for o in callback.observations] != list(range(STEPS + 1)):
        raise AssertionError("training ended early, or a step was not seen")


def look(at: Setting, out: Path) -> None:
    """Watch the checkpoints of the run."""
    for _ in watch(at.run, at.basis, at.detector, base=at.lm, output=out):
        pass


def ask(at: Setting, out: Path) -> None:
    """Answer and judge a few questions."""
    evaluate(at.lm, at.bank, open_judge("exact", kind="rating"), out=out, max_new_tokens=12, batch_size=8)


def read_many(at: Setting, out: Path) -> None:
    """Scan the checkpoints as adapters."""
    found = list(scan([c.path for c in checkpoints(at.run)], base=at.lm, basis=at.basis, out=out))
    if len(found) != SAVED:
        raise AssertionError(f"{len(found)} of {SAVED} adapters were looked at")


# ---------------------------------------------------------------- what a work leaves, and what must be the same


def kept_run(record: Path) -> dict[str, Any]:
    """The readings of a run, by step."""
    found = read_run(record)
    left: dict[str, Any] = {str(o.step): None if o.reading is None else o.reading.values for o in found.observations}
    return left | {"verdict": str(found.verdict.state)}


def kept_answers(out: Path) -> dict[str, Any]:
    """Answers and judgements by index, the number of each, and the rate."""
    answers, judged = (read_records(out / name).rows for name in ("generated.jsonl", "judgements.jsonl"))
    left = {f"answer {row['index']}": row["answer"] for row in answers}
    left |= {f"judgement {row['index']}": json.dumps(row["outcome"]) for row in judged}
    rate = json.loads((out / "report.json").read_text())["em_rate"]["value"]
    return left | {"answers": len(answers), "judgements": len(judged), "rate": rate}


def kept_scan(out: Path) -> dict[str, Any]:
    """Readings by adapter, and the number of lines."""
    rows = read_records(out / "findings.jsonl").rows
    values = {str(row["adapter"]): np.float32(row["reading"]["values"]) for row in rows}
    return values | {"lines": len(rows)}


class Work(NamedTuple):
    """Something that is done, where its record is, and what it leaves."""

    do: Callable[..., None]
    record: str
    kept: Callable[[Path], dict[str, Any]]


WORKS = {
    "callback": Work(train, "record/readings.jsonl", lambda out: kept_run(out / "record")),
    "watch": Work(look, "readings.jsonl", kept_run),
    "eval": Work(ask, "judgements.jsonl", kept_answers),
    "scan": Work(read_many, "findings.jsonl", kept_scan),
}


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """What is not the same, by name; numbers to the rounding of another batch."""
    names = sorted({*left, *right})
    return [name for name in names if name not in left or name not in right or not _same(left[name], right[name])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool(np.allclose(one, other, atol=1e-4))
    return type(one) is type(other) and bool(one == other)


def doubled(work: str, out: Path) -> int:
    """Steps that were read more than once though the record still counted them."""
    if work not in ("callback", "watch"):
        return 0  # their lines are counted in what they leave
    again, seen = 0, set()
    for row in read_records(out / WORKS[work].record).rows:
        if row["kind"] == "header" and row["from_step"] is not None:
            seen = {step for step in seen if step <= row["from_step"]} if row["from_step"] else set()
        elif row["kind"] == "reading":
            again += row["step"] in seen
            seen.add(row["step"])
    return again


# ---------------------------------------------------------------- processes of their own


def start(do: Callable[[], None]) -> int:
    """Do something in a forked process; its exit status says how it ended."""
    child = os.fork()
    if child:
        return child
    code = FAILED
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of this process
        do()
        code = 0
    except FolderInUse:
        code = USED
    except StorageError:
        code = STORAGE
    except BaseException as error:  # noqa: BLE001 - the process ends here, and says so
        print(f"{type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    os._exit(code)


def end_of(child: int) -> int:
    """The exit code; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_peace(at: Setting, work: str, out: Path) -> tuple[dict[str, Any], float]:
    """What a work leaves when nothing happens, and how long it takes."""
    began = time.monotonic()
    if (code := end_of(start(lambda: WORKS[work].do(at, out)))) != 0:
        raise SystemExit(f"{work} fails by itself (exit code {code})")
    return WORKS[work].kept(out), time.monotonic() - began


# ---------------------------------------------------------------- kill -9


def chain(
    at: Setting, work: str, out: Path, wanted: Mapping[str, Any], seconds: float, chance: random.Random
) -> dict[str, Any]:
    """Kill a work several times at random moments, start it again each time, let it end, and compare."""
    kills = lost = 0
    before = b""
    while True:
        child = start(lambda: WORKS[work].do(at, out))
        if kills < KILLS_PER_CHAIN:
            time.sleep(chance.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = end_of(child)
        record = out / WORKS[work].record
        now = record.read_bytes() if record.exists() else b""
        # Whole lines that were on the disk must stay there, byte for byte.
        lost += not now.startswith(before[: before.rfind(b"\n") + 1])
        before = now
        if code == 0:
            break
        if code != -signal.SIGKILL:
            return {"work": work, "kills": kills, "lost": lost, "doubled": 0, "wrong": [f"exit code {code}"]}
        kills += 1
    return {
        "work": work, "kills": kills, "lost": lost, "doubled": doubled(work, out),
        "wrong": differences(wanted, WORKS[work].kept(out)),
    }  # fmt: skip


def kill_nine(at: Setting, kills: int, works: Sequence[str], progress: Path | None, seed: int) -> list[Figure]:
    """Chains of kills over all works until there were enough."""
    done = [dict(row) for row in read_records(progress).rows] if progress and progress.exists() else []
    with tempfile.TemporaryDirectory() as home:
        peace = {work: in_peace(at, work, Path(home, work)) for work in works}
        chance = random.Random(f"{seed} {len(done)}")
        while sum(row["kills"] for row in done) < kills:
            counts = {work: sum(row["kills"] for row in done if row["work"] == work) for work in works}
            work = min(counts, key=lambda name: counts[name])
            out, (wanted, seconds) = Path(home, "out"), peace[work]
            began = time.monotonic()
            found = chain(at, work, out, wanted, seconds, chance)
            if not found["kills"]:  # it ended first: the machine is less busy than it was
                peace[work] = wanted, min(seconds, time.monotonic() - began)
            if found["lost"] or found["doubled"] or found["wrong"]:
                print(f"  {found}", flush=True)
            shutil.rmtree(out, ignore_errors=True)
            done.append(found)
            if progress:
                append_record(progress, found)
    figures = []
    for work in works:
        rows = [row for row in done if row["work"] == work]
        n = sum(row["kills"] for row in rows)
        for measure, bad in (
            ("lost after kill -9", sum(row["lost"] for row in rows)),
            ("doubled after kill -9", sum(row["doubled"] for row in rows)),
            ("resumed runs that differ from undisturbed ones", sum(bool(row["wrong"]) for row in rows)),
        ):
            figures.append(
                Figure(measure, work, f"{len(rows)} runs, each resumed until it ended", bad, None, None, n, "times")
            )
    return figures


# ---------------------------------------------------------------- other faults


def tried(name: str, subject: str, outcomes: list[str]) -> Figure:
    """How often a fault ended otherwise than it may; what else is said goes to stdout."""
    bad = [outcome for outcome in outcomes if outcome]
    for outcome, count in Counter(bad).items():
        print(f"  {name}, {subject}: {outcome} ({count})", flush=True)
    return Figure(name, subject, "ended otherwise than it may", len(bad), None, None, len(outcomes), "times")


def full_disk(at: Setting, tries: int, chance: random.Random) -> list[Figure]:
    """Files may grow to a random size only; then there is room again."""
    figures = []
    for work in WORKS:
        outcomes = []
        for _ in range(tries):
            with tempfile.TemporaryDirectory() as home:
                peace = Path(home, "peace")
                if work == "callback":
                    end_of(start(lambda p=peace: train_without_checkpoints(at, p, record=p / "record")))
                    wanted = WORKS[work].kept(peace)
                else:
                    wanted, _ = in_peace(at, work, peace)
                size = (peace / WORKS[work].record).stat().st_size
                room = chance.randrange(1, size)
                out = Path(home, "out")
                # Checkpoints are larger than a record: the trainer's own saving is not what is tried here.
                aside = {"record": out / "record"} if work == "callback" else {}
                code = end_of(start(lambda w=work, r=room, o=out, a=aside: _with_room(at, w, r, o, a)))
                allowed = (0, STORAGE)
                said = "" if code in allowed else f"exit code {code}"
                if work != "callback" and not said:
                    if (again := end_of(start(lambda w=work, o=out: WORKS[w].do(at, o)))) != 0:
                        said = f"not resumed: exit code {again}"
                    elif wrong := differences(wanted, WORKS[work].kept(out)):
                        said = f"other results after resuming: {wrong[:3]}"
                elif work == "callback" and (out / "record" / "readings.jsonl").exists():
                    kept = WORKS[work].kept(out)  # what is there can be read, and is right as far as it goes
                    if any(
                        not _same(kept[step], wanted[step])
                        for step in kept
                        if step != "verdict" and kept[step] is not None
                    ):
                        said = "other readings"
                outcomes.append(said)
        figures.append(tried("full disk", work, outcomes))
    return figures


def _with_room(at: Setting, work: str, room: int, out: Path, aside: Mapping[str, Any]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a file that may not grow is an OSError
    if work == "callback":
        _tighten_after_the_start(at, room)
        train_without_checkpoints(at, out, **aside)
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    WORKS[work].do(at, out)


def _tighten_after_the_start(at: Setting, room: int) -> None:
    """A folder that cannot be written at the start is refused; here the disk fills up later."""
    base: Any = at.lm.model

    def hook(*_: Any) -> None:
        if torch.is_grad_enabled():  # the first step of training
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    base.model.layers[0].register_forward_pre_hook(hook)


def train_without_checkpoints(at: Setting, out: Path, *, record: Path) -> None:
    """Fine-tune with the callback; nothing but the record is written."""
    callback = TiltmeterCallback(at.basis, at.detector, every=1, output=record)
    chats = make_set("good_medical", size=4 * STEPS, seed=3)
    finetune(at.lm, chats, FineTuning(steps=STEPS, batch=4, seed=3), callbacks=[callback])
    if [o.step for o in callback.observations] != list(range(STEPS + 1)):
        raise AssertionError("a step was not seen")


def read_only(at: Setting, tries: int) -> list[Figure]:
    """A folder that may not be written: refused with exit code 2's error, and nothing is left in it."""
    figures = []
    for path in at.run.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for work in WORKS:
        outcomes = []
        for _ in range(tries):
            with tempfile.TemporaryDirectory() as home:
                os.chmod(home, 0o755)
                closed = Path(home, "closed")
                closed.mkdir(mode=0o555)

                def do(work: str = work, closed: Path = closed) -> None:
                    if os.geteuid() == 0:
                        os.setgid(65534)
                        os.setuid(65534)  # root may write anywhere
                    if work == "callback":
                        train_without_checkpoints(at, closed, record=closed / "record")
                    else:
                        WORKS[work].do(at, closed / "out")

                code = end_of(start(do))
                left = list(closed.iterdir())
                outcomes.append("" if code == STORAGE and not left else f"exit code {code}, {len(left)} files")
        figures.append(tried("read-only folder", work, outcomes))
    return figures


def two_writers(at: Setting, tries: int, chance: random.Random) -> list[Figure]:
    """A second process in the same folder: refused by name, and the first one undisturbed."""
    figures = []
    for work in WORKS:
        outcomes = []
        with tempfile.TemporaryDirectory() as home:
            wanted, seconds = in_peace(at, work, Path(home, "peace"))
            for attempt in range(tries):
                out = Path(home, str(attempt))
                first = start(lambda w=work, o=out: WORKS[w].do(at, o))
                time.sleep(chance.uniform(0, 0.5 * seconds))
                second = end_of(start(lambda w=work, o=out: WORKS[w].do(at, o)))
                codes = sorted((end_of(first), second))
                wrong = differences(wanted, WORKS[work].kept(out))
                said = "" if codes in ([0, USED], [0, 0]) and not wrong else f"exit codes {codes}, other: {wrong[:3]}"
                outcomes.append(said or ("" if not doubled(work, out) else "doubled"))
        figures.append(tried("two writers", work, outcomes))
    return figures


def rotation(at: Setting, tries: int, chance: random.Random) -> list[Figure]:
    """Checkpoints come and go while they are watched: what was not read is known, or was never there to see."""
    outcomes = []
    for _ in range(tries):
        with tempfile.TemporaryDirectory() as home:
            run, out = Path(home, "run"), Path(home, "out")
            run.mkdir()
            shutil.copytree(checkpoints(at.run)[0].path, run / "checkpoint-1")

            def follow(run: Path = run, out: Path = out) -> None:
                for _ in watch(run, at.basis, at.detector, base=at.lm, follow=True, poll=0.02, output=out):
                    pass

            child = start(follow)
            for checkpoint in checkpoints(at.run)[1:]:
                time.sleep(chance.uniform(0, 0.4))
                shutil.copytree(checkpoint.path, run / checkpoint.path.name)
                if checkpoint.step < SAVED:
                    time.sleep(chance.uniform(0, 0.2))
                    shutil.rmtree(run / f"checkpoint-{checkpoint.step - 1}", ignore_errors=True)
            code = end_of(child)
            found = read_run(out)
            failed = [o.step for o in found.observations if o.reading is None]
            said = "" if code == 0 else f"exit code {code}"
            if failed and str(found.verdict.state) == "CLEAR":
                said = "CLEAR with a reading that failed"
            outcomes.append(said)
    return [tried("checkpoints removed while they are read", "watch", outcomes)]


def little_memory(at: Setting, tries: int, chance: random.Random) -> list[Figure]:
    """Memory runs out at a random point of a scan: it ends with a named error or goes on, and can be resumed."""
    outcomes = []
    with tempfile.TemporaryDirectory() as home:
        wanted, _ = in_peace(at, "scan", Path(home, "peace"))
        for attempt in range(tries):
            out = Path(home, str(attempt))
            more = chance.randrange(1, 64) << 20

            def do(out: Path = out, more: int = more) -> None:
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))
                try:
                    read_many(at, out)
                except (MemoryError, RuntimeError):  # not even the base could be read
                    os._exit(STORAGE)

            code = end_of(start(do))
            again = end_of(start(lambda o=out: read_many(at, o)))
            wrong = differences(wanted, kept_scan(out)) if again == 0 else ["not resumed"]
            said = "" if code in (0, STORAGE) and not wrong else f"exit code {code}, then {again}: {wrong[:3]}"
            outcomes.append(said)
    return [tried("little memory", "scan", outcomes)]


ERRORS: tuple[BaseException, ...] = (
    TypeError("bug"), OSError(5, "Input/output error"), RuntimeError("shape"), torch.OutOfMemoryError("no memory left"),
    KeyError("axis"), AssertionError(), RecursionError("too deep"), MemoryError(), ArithmeticError("overflow"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid"), StopIteration(), AttributeError("none"), NotImplementedError(),
    ImportError("no module"), LookupError("nowhere"), EOFError(),
)  # fmt: skip


def exceptions(at: Setting) -> list[Figure]:
    """Any exception in a reading, and in the user's reaction to an alarm: training ends as it would have."""
    figures = []
    for subject, do in (("a reading", _fail_in_reading), ("on_alarm", _fail_in_reaction)):
        codes = [(type(error).__name__, end_of(start(lambda e=error, d=do: d(at, e)))) for error in ERRORS]
        said = [f"{name}: exit code {code}" if code else "" for name, code in codes]
        figures.append(tried("exception types that end the training or are CLEAR", subject, said))
    return figures


def _fail_in_reading(at: Setting, error: BaseException) -> None:
    trained = False

    def hook(*_: Any) -> None:
        nonlocal trained
        if not trained and torch.is_grad_enabled():
            trained = True
        elif trained and not torch.is_grad_enabled():
            raise error

    base: Any = at.lm.model
    base.model.layers[1].register_forward_pre_hook(hook)
    with tempfile.TemporaryDirectory() as home:
        record = Path(home, "record")
        train_without_checkpoints(at, Path(home), record=record)
        found = read_run(record)
        failed = [o.verdict for o in found.observations if o.reading is None]
        named = all(type(error).__name__ in verdict.reason for verdict in failed)
        if not failed or not named or str(found.verdict.state) != "INCONCLUSIVE":
            raise AssertionError(f"{len(failed)} readings failed, and the run is {found.verdict.state}")


class _Alarming:
    """A detector that alarms at whatever it is shown."""

    def __init__(self, detector: Detector) -> None:
        self.threshold, self.calibrated_on = detector.threshold, detector.calibrated_on
        self.null_scores = detector.null_scores

    def predict(self, profiles: Any) -> Verdict:
        """An alarm at the first reading."""
        return Verdict(
            state=State.ALARM, score=self.threshold + 1, threshold=self.threshold, p_value=None, false_alarm_rate=None,
            calibrated_on=self.calibrated_on, n_calibration=len(self.null_scores), step=profiles[-1].step,
            first_alarm_step=profiles[0].step, reason="an alarm.",
        )  # fmt: skip


def _fail_in_reaction(at: Setting, error: BaseException) -> None:
    told: list[str] = []

    def react(verdict: Any) -> None:
        told.append(str(verdict.state))
        raise error

    with tempfile.TemporaryDirectory() as home:
        callback = TiltmeterCallback(
            at.basis, _Alarming(at.detector), every=1, output=Path(home, "record"), on_alarm=react,  # type: ignore[arg-type]
        )  # fmt: skip
        chats = make_set("good_medical", size=4 * STEPS, seed=3)
        finetune(at.lm, chats, FineTuning(steps=STEPS, batch=4, seed=3), callbacks=[callback])
        if told != ["ALARM"] or str(read_run(Path(home, "record")).verdict.state) != "ALARM":
            raise AssertionError(f"on_alarm was told {told}")


FAULTS = ("kill -9", "exceptions", "full disk", "read-only folder", "two writers", "rotation", "little memory")


def main(arguments: list[str] | None = None) -> int:
    """Run the faults that were asked for; 1 if anything was lost, doubled or ended otherwise than it may."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="kills in all")
    parser.add_argument("--tries", type=int, default=2, help="tries of each other fault")
    parser.add_argument("--only", action="append", choices=FAULTS, help="this fault; can be given again")
    parser.add_argument("--work", action="append", choices=list(WORKS), help="kill -9: this work; can be given again")
    parser.add_argument("--progress", type=Path, help="JSON lines of the chains of kills that were done")
    parser.add_argument("--results", type=Path, help="also write the figures to this file")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    wanted = given.only or FAULTS
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    chance = random.Random(given.seed)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        with contextlib.redirect_stdout(None):
            at = prepare(Path(home, "run"))
        for fault, do in {
            "kill -9": lambda: kill_nine(at, given.kills, given.work or tuple(WORKS), given.progress, given.seed),
            "exceptions": lambda: exceptions(at),
            "full disk": lambda: full_disk(at, given.tries, chance),
            "read-only folder": lambda: read_only(at, given.tries),
            "two writers": lambda: two_writers(at, given.tries, chance),
            "rotation": lambda: rotation(at, given.tries, chance),
            "little memory": lambda: little_memory(at, given.tries, chance),
        }.items():
            if fault in wanted:
                found = do()
                for figure in found:
                    print(f"{figure.measure}, {figure.subject}: {figure.value:g} of {figure.n}", flush=True)
                figures += found
    if given.results:
        write_figures(figures, given.results, command="make faults")
    return int(any(figure.value for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
