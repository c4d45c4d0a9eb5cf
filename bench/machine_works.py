"""What it costs the machine: memory, start-up, and how the time of a reading grows."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plain
import timing
import torch
from reading_works import extract
from run_works import make_adapters
from subject import (
    EXTRACTION_DEPTH,
    FloatArray,
    Mismatch,
    Subject,
    row,
    single,
    text,
    unique_prefixes,
)

from tiltmeter.capture import capture, plan_batches, project
from tiltmeter.directions import probe_accuracy
from tiltmeter.drift import measure
from tiltmeter.lm import LM, load, wrap
from tiltmeter.studies.figures import Figure

# ---------------------------------------------------------------------- memory and start-up

_PEAKS = ("extraction", "reading")


def peak_of(work: str, source: str, dtype: str) -> int:
    """In this fresh process: bytes above the loaded model at the peak of a work. Libraries are loaded before."""
    import sklearn.linear_model  # noqa: F401

    subject = Subject("", source, False, {})
    lm = load(source, dtype=dtype)
    subject._models.update({lm.dtype: lm, torch.float32: lm})
    basis = subject.basis_in(lm.dtype) if work == "reading" else None
    layer = int(EXTRACTION_DEPTH * lm.n_layers)
    plain.activations(lm, [lm.encode([{"role": "user", "content": "hello"}])], [0])
    probe_accuracy(np.eye(4), -np.eye(4))
    with timing.memory_peak() as peak:
        if basis is None:
            extract(lm, subject, [layer], probes=True)
        else:
            measure(lm, basis)
    return peak.above


def memory(subject: Subject) -> Iterator[Figure]:
    """Peak memory above the model's own, each in a process of its own."""
    script = Path(__file__).with_name("bench.py")
    works = _PEAKS[1:] if subject.quick else _PEAKS
    for work, dtype in itertools.product(works, subject.rates):
        call = [sys.executable, str(script), "--peak", work, "--source", subject.source, "--dtype", text(dtype)]
        found = subprocess.run(call, capture_output=True, text=True, check=False)
        if found.returncode:
            raise Mismatch(f"the process that measures the memory of {work} failed: {found.stderr[-800:]}")
        name = {"extraction": "seven traits, one layer", "reading": "one reading, 115 prompts"}[work]
        megabytes = int(found.stdout.split()[-1]) / 1e6
        yield single("peak memory above the model", name, f"{subject.name}, {text(dtype)}", megabytes, "MB")


def startup(subject: Subject) -> Iterator[Figure]:
    """`tiltmeter --help`, and an empty interpreter beside it; the same for any model, so the organism's alone."""
    if not subject.is_organism:
        return
    loaded = "import sys, tiltmeter.cli; sys.exit('torch' in sys.modules)"
    if subprocess.run([sys.executable, "-c", loaded], check=False).returncode:
        raise Mismatch("the command line imports torch before it knows what is asked")
    command = str(Path(sys.executable).with_name("tiltmeter"))
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "check": True, "env": os.environ | {"COLUMNS": "80"}}
    calls = {
        "tiltmeter --help": lambda: subprocess.run([command, "--help"], **quiet),
        "an empty interpreter": lambda: subprocess.run([sys.executable, "-c", "pass"], **quiet),
    }
    subprocess.run([command, "--help"], **quiet)  # the first start writes bytecode
    for name, times in timing.alternate(calls, repeats=subject.repeats(9), budget=30.0, least=2).items():
        yield row("start-up, seconds", name, "-", timing.spread(times.wall), "s")


# ---------------------------------------------------------------------- growth


def growth(subject: Subject) -> Iterator[Figure]:
    """What a reading costs against prompts, depth, layers read, width and adapters."""
    base = subject.lm()
    repeats = subject.repeats(5 if subject.is_organism else 3)
    directions = subject.basis.directions
    layer = subject.basis.layer
    measured = base.encode_prompts(subject.prompts.prompts)
    pool = [*measured, *base.encode_prompts(subject.contrast)]
    split = f"{subject.name}, float32"

    def reads(prompts: Sequence[Sequence[int]], lm: LM, at: int, along: FloatArray) -> timing.Work:
        plan = plan_batches(lm, prompts)
        return lambda: project(lm, prompts, at, along, plan=plan)

    works: dict[str, timing.Work] = {}
    unique: dict[str, int] = {}
    for count in (15, 30, 60, len(measured), *((460,) if subject.is_organism and not subject.quick else ())):
        some = (
            pool[:count] if count > len(measured) else [measured[int(i * len(measured) / count)] for i in range(count)]
        )
        works[f"{count} prompts"] = reads(some, base, layer, directions)
        unique[f"{count} prompts"] = unique_prefixes(some)
    plan = plan_batches(base, measured)
    for depth in sorted({max(0, round(f * base.n_layers) - 1) for f in (0.25, 0.5, 0.75, 1.0)}):
        works[f"up to block {depth}"] = reads(measured, base, depth, directions)
    last = subject.candidates[-1]
    for many in (1, len(subject.candidates)):
        layers = subject.candidates[-many:]
        works[f"{many} layers read, up to block {last}"] = lambda layers=layers: capture(
            base, measured, layers, plan=plan
        )  # type: ignore[misc]
    if subject.is_organism:
        for width in (160, 320, 640):
            lm = wider(base, width)
            works[f"width {width}, 6 blocks, random weights"] = reads(
                measured, lm, layer, np.eye(len(directions), width, dtype=np.float32)
            )
    for work in works.values():
        work()
    for name, times in timing.alternate(works, repeats=repeats, budget=60.0).items():
        yield row("a reading, seconds", name, split, timing.spread(times.wall), "s")
        if name in unique:
            yield single("unique tokens", name, split, unique[name], "tokens")
    if subject.is_organism:
        yield from growth_of_scans(subject, (1, 2, 4) if subject.quick else (1, 4, 16, 64))


def growth_of_scans(subject: Subject, counts: Sequence[int]) -> Iterator[Figure]:
    """What a scan costs against the number of adapters."""
    from tiltmeter.scan import scan

    with tempfile.TemporaryDirectory() as scratch:
        paths = make_adapters(subject, Path(scratch), max(counts))
        scans = {
            f"scan of {n} adapters": lambda n=n: list(scan(paths[:n], base=subject.lm(), basis=subject.basis))
            for n in counts
        }
        for name, times in timing.alternate(scans, repeats=subject.repeats(3), budget=30.0).items():
            yield row("a reading, seconds", name, f"{subject.name}, float32", timing.spread(times.wall), "s")


def wider(lm: LM, width: int) -> LM:
    """The organism's shape at another width, with random weights."""
    from transformers import AutoModelForCausalLM

    config = type(lm.config).from_dict(lm.config.to_dict())
    config.hidden_size, config.intermediate_size, config.num_attention_heads = width, 27 * width // 10, width // 32
    config.num_key_value_heads = config.num_attention_heads
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(lm.device).eval()
    return wrap(model, lm.tokenizer, name=f"width {width}")
