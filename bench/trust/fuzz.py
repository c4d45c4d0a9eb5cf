"""Spoilt files for every loader: does one end in an untyped exception, hang, or take the memory?

    make fuzz N=1000000                       # goes on where it stopped; row in docs/results/trust.json
    python bench/trust/fuzz.py -n 20000 --out -
    python bench/trust/fuzz.py --again read_toml:123     # one case once more, with its traceback

Sound files of every kind are made in memory by the project's own writers, PEFT, gguf and safetensors, and spoilt by
`mutators`. A case is (loader, number): the same code makes the same file again, so that nothing that crashes or hangs is
kept. Workers load them under limits: 5 seconds a case, and 1 GiB of memory over what the worker had at its start.

A file may be refused with an error of ours or be loaded. Counted are the rest: exceptions of other types (by the place
in our code that let them through), cases over a limit, and workers that died.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import mutators
import seeds

import tiltmeter
from tiltmeter.errors import TiltmeterError
from tiltmeter.runs import append_record, read_records
from tiltmeter.studies.figures import Figure, write_figures

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "results" / "trust.json"
SECONDS, GIB = 5.0, 1 << 30
BLOCK = 2000  # cases per line of the count
STUCK = 20.0  # seconds after which a worker that hears no signal is ended
SOURCE = Path(tiltmeter.__file__).parent


class TooLong(BaseException):
    """The time of a case is over; no loader may catch it."""


def _ring(*_: object) -> None:
    raise TooLong


def spoil(loader: seeds.Loader, number: int) -> tuple[dict[str, bytes], str]:
    """The files of a case, and in words what was done to them."""
    rng = random.Random(f"{loader.name}:{number}")
    files = dict(loader.files)
    name = rng.choice(loader.spoilt or sorted(files))
    words = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        try:
            made = mutators.mutator_for(name, rng)(files[name], rng)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):  # spoilt already
            made = rng.choice(mutators.BYTES)(files[name], rng)
        files[name] = made.content
        words.append(f"{name}: {made.words}")
    return files, "; ".join(words)


def put(folder: Path, files: dict[str, bytes], before: dict[str, bytes]) -> None:
    """Write those files that are not there already."""
    for name, content in files.items():
        if before.get(name) is not content:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def place(error: BaseException) -> str:
    """The last line of ours that an exception came through, and its type."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(SOURCE))]
    where = f"{Path(frames[-1].filename).relative_to(SOURCE)}:{frames[-1].name}" if frames else "outside"
    return f"{where} {type(error).__name__}"


def load(loader: seeds.Loader, folder: Path) -> str:
    """How one case ends: "loaded", "refused", or what must not be."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        said = loader.load(folder)
        return "loaded" if said is None else f"loaded {said}"
    except TiltmeterError:
        return "refused"
    except TooLong:
        return "over 5 s"
    except MemoryError:
        return "over 1 GiB"
    except BaseException as error:  # noqa: BLE001 - what is counted here
        return f"untyped {place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _quiet() -> None:
    warnings.simplefilter("ignore")
    import logging

    logging.disable(logging.CRITICAL)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)


def work(cases: list[tuple[str, int]], at: Synchronized[int], results: Any) -> None:
    """A worker: all cases from `at` on."""
    _quiet()
    signal.signal(signal.SIGALRM, _ring)
    loaders = {loader.name: loader for loader in seeds.LOADERS}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, resource.getrlimit(resource.RLIMIT_AS)[1]))
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        before: dict[str, dict[str, bytes]] = {}
        while at.value < len(cases):
            name, number = cases[at.value]
            folder = scratch / name
            if name not in before:
                folder.mkdir()
                before[name] = {}
            files, words = spoil(loaders[name], number)
            put(folder, files, before[name])
            before[name] = files
            said = load(loaders[name], folder)
            results.send((name, number, said, words if said not in ("loaded", "refused") else ""))
            at.value += 1
            if said.startswith("over"):  # what is left in memory would count against the next case
                break
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        results.close()


def run_block(cases: list[tuple[str, int]]) -> list[tuple[str, int, str, str]]:
    """All cases in workers: one after the other, a new one where one died."""
    context = multiprocessing.get_context("fork")
    at: Synchronized[int] = context.Value("i", 0)  # type: ignore[assignment]
    found: list[tuple[str, int, str, str]] = []
    while at.value < len(cases):
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(cases, at, send))
        worker.start()
        send.close()
        last = time.monotonic()
        stuck = False
        while True:
            if receive.poll(1.0):
                try:
                    found.append(receive.recv())
                except EOFError:
                    break
                last = time.monotonic()
            elif time.monotonic() - last > STUCK:
                stuck = True
                worker.kill()
                break
        worker.join()
        receive.close()
        if at.value < len(cases):
            name, number = cases[at.value]
            words = spoil(next(x for x in seeds.LOADERS if x.name == name), number)[1]
            if worker.exitcode != 0 or stuck:
                said = "over 5 s (deaf)" if stuck else f"worker died ({worker.exitcode})"
                found.append((name, number, said, words))
                at.value += 1
    return found


def plan(first: int, n: int, names: list[str] | None) -> list[tuple[str, int]]:
    """Cases `first` to `first + n`: loaders by their share."""
    loaders = [x for x in seeds.LOADERS if names is None or x.name in names]
    rng = random.Random(first)
    drawn = rng.choices(loaders, [x.share for x in loaders], k=n)
    return [(loader.name, first + at) for at, loader in enumerate(drawn)]


def source_digest() -> str:
    """Of the code that is tried."""
    content = hashlib.sha256()
    for path in sorted(SOURCE.rglob("*.py")):
        if "studies" not in path.parts:
            content.update(path.read_bytes())
    return content.hexdigest()[:12]


def tell(counts: Counter[str], examples: dict[str, list[str]]) -> None:
    """Print what was counted."""
    total = counts.total()
    bad = {said: n for said, n in counts.items() if said.split()[0] not in ("loaded", "refused")}
    print(f"{total:,} tried, {counts['refused']:,} refused with an error of ours, "
          f"{sum(n for said, n in counts.items() if said.startswith('loaded')):,} loaded")  # fmt: skip
    for said, n in sorted(bad.items(), key=lambda pair: -pair[1]):
        print(f"  {n:6} {said}   such as {'; '.join(examples.get(said, [])[:2])}")
    kinds = {kind: sum(n for said, n in bad.items() if said.startswith(kind)) for kind in KINDS}
    print(", ".join(f"{n} {kind}" for kind, n in kinds.items()), flush=True)


KINDS = ("untyped", "over 5 s", "over 1 GiB", "worker died")


def figures(counts: Counter[str]) -> list[Figure]:
    """Rows of the results file."""
    n = counts.total()
    names = {"untyped": "untyped exceptions", "over 5 s": "hangs over 5 s", "over 1 GiB": "over 1 GiB of memory",
             "worker died": "workers that died"}  # fmt: skip
    rows = [Figure("mutated inputs tried", f"{len(seeds.LOADERS)} loaders", "", n, None, None, n, "files")]
    rows.append(Figure("mutated inputs refused with an error of ours", "all loaders", "", counts["refused"], None, None,
                       n, "files"))  # fmt: skip
    for kind, name in names.items():
        value = sum(times for said, times in counts.items() if said.startswith(kind))
        rows.append(Figure(name, "all loaders", "", value, None, None, n, "files"))
    return rows


def again(case: str) -> None:
    """One case with its traceback."""
    name, _, number = case.rpartition(":")
    loader = next(x for x in seeds.LOADERS if x.name == name)
    files, words = spoil(loader, int(number))
    print(words)
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), files, {})
        try:
            print("loaded", loader.load(Path(folder)))
        except Exception:  # noqa: BLE001 - shown
            traceback.print_exc()


def main() -> None:
    """Try, count, print, write."""
    parser = argparse.ArgumentParser(description="Spoilt files for every loader.")
    parser.add_argument("-n", type=int, default=20_000, help="cases in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", help="names of loaders, with commas")
    parser.add_argument("--state", default=str(ROOT / ".cache" / "fuzz"), help="where the count is kept")
    parser.add_argument("--out", default=str(OUT), help="results file; - writes none")
    parser.add_argument("--again", help="one case, as NAME:NUMBER")
    parser.add_argument("--covers", action="store_true", help="say which readers are tried")
    options = parser.parse_args()
    if options.again:
        return again(options.again)
    if options.covers:
        print(f"covers: {', '.join(sorted({*seeds.ELSEWHERE, *(name for x in seeds.LOADERS for name in x.covers)}))}")
    names = options.only.split(",") if options.only else None
    record = Path(options.state) / f"{source_digest()}{'-' + options.only if names else ''}.jsonl"
    done: dict[int, dict[str, Any]] = {}
    if record.exists():
        done = {row["first"]: row for row in read_records(record).rows}
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    began, new = time.monotonic(), 0
    for first in range(options.first, options.first + options.n, BLOCK):
        n = min(BLOCK, options.first + options.n - first)
        row = done.get(first)
        if row is None or row["n"] != n:
            found = run_block(plan(first, n, names))
            new += n
            row = {"first": first, "n": n, "counts": Counter(said for _, _, said, _ in found),
                   "faults": [[a, b, c, d] for a, b, c, d in found if d and not c.startswith("loaded")]}  # fmt: skip
            row = json.loads(json.dumps(row))
            append_record(record, row)
        counts.update(row["counts"])
        for name, number, said, words in row["faults"]:
            examples.setdefault(said, []).append(f"{name}:{number} ({words[:120]})")
        if new and (first // BLOCK) % 10 == 0:
            rate = new / (time.monotonic() - began)
            print(f"{counts.total():,} of {options.n:,} at {rate:.0f} a second", file=sys.stderr, flush=True)
    tell(counts, examples)
    if options.out != "-":
        write_figures(figures(counts), Path(options.out), command=f"make fuzz N={options.n}")
    if any(said.split()[0] not in ("loaded", "refused") for said in counts):
        sys.exit(1)
    return None


if __name__ == "__main__":
    main()
