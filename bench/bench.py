"""How fast tiltmeter is, against its own plain one-by-one version and against the machine's limit.

    python bench/bench.py                            the pocket organism
    python bench/bench.py --model FOLDER             that model as well (or TILTMETER_BENCH_MODEL=FOLDER)
    python bench/bench.py --quick --only reading     small samples: does it run
    python bench/bench.py --traits FILE --model FOLDER --only reading,extraction --add      other prompts
    python bench/bench.py --only memory --add        measure these works again, and keep the other figures

Everything that is held against each other is timed in this one run, in turn, and only after both ways gave the same
answers; a difference ends the run with exit code 1. Figures go to docs/results/speed.json, the
table and the bars to stdout, progress to stderr. A machine with CUDA is used, and device times are added.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import timing
import torch
from machine_works import peak_of
from subject import ADAPTERS, ORGANISM, Mismatch, Subject, Texts, read_texts, single, text
from works import WORKS

from tiltmeter.studies.figures import Figure, write_figures

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "speed.json"


class Bar(NamedTuple):
    """What a figure has to reach: at least, or at most, `bound`."""

    measure: str
    work: str
    dtype: str
    at_least: bool
    bound: float


BARS = (
    Bar("times faster", "seven traits, one layer", "float32", True, 8),
    Bar("times faster", "seven traits, one layer", "bfloat16", True, 25),
    Bar("1 - least cosine to float32", "seven traits, one layer", "bfloat16", False, 0.001),
    Bar("times faster", "seven traits, 5 layers, probes", "float32", True, 40),
    Bar("times faster", "seven traits, 5 layers, probes", "bfloat16", True, 120),
    Bar("times faster", "one reading, 115 prompts", "float32", True, 10),
    Bar("times faster", "one reading, 115 prompts", "bfloat16", True, 25),
    Bar("over the limit", "seven traits, one layer", "float32", False, 2),
    Bar("over the limit", "one reading, 115 prompts", "float32", False, 2.5),
    Bar("times faster", f"{ADAPTERS} adapters on one base, each", "float32", True, 15),
    Bar("times faster", f"{ADAPTERS} adapters on one base, each", "bfloat16", True, 15),
    Bar("a reading over ten steps", "the callback, every 10 steps of 16 x 200 tokens", "float32", False, 0.02),
    Bar("peak memory above the model", "seven traits, one layer", "", False, 300),
    Bar("peak memory above the model", "one reading, 115 prompts", "", False, 150),
    Bar("start-up, seconds", "tiltmeter --help", "", False, 0.3),
)


def dtypes_that_pay(device: torch.device) -> dict[torch.dtype, float]:
    """Operations per second of a large product in float32, and in bfloat16 where that is clearly faster."""
    rates = {dtype: timing.matrix_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    if rates[torch.bfloat16] < 1.5 * rates[torch.float32]:
        rates.pop(torch.bfloat16)
    return rates


def shown(figure: Figure) -> str:
    """One line of the table."""
    unit = f" {figure.unit}" if figure.unit else ""
    value = "-" if figure.value is None else f"{figure.value:.4g}"
    interval = "" if figure.low is None or figure.high is None else f" ({figure.low:.3g} to {figure.high:.3g})"
    where = "" if figure.split == "-" else f" [{figure.split}]"
    return f"{figure.subject + where:<72} {figure.measure:<44} {value}{interval}{unit}, n {figure.n}"


def verdicts(figures: Sequence[Figure]) -> list[str]:
    """Each bar against each figure that it is about."""
    lines = []
    for bar in BARS:
        for figure in figures:
            if about(bar, figure) and figure.value is not None:
                reached = figure.value >= bar.bound if bar.at_least else figure.value <= bar.bound
                word = "at least" if bar.at_least else "at most"
                lines.append(
                    f"{'reached' if reached else 'MISSED ':<8} {figure.subject} [{figure.split}]: {figure.measure} "
                    f"{figure.value:.4g}, bar {word} {bar.bound:g}"
                )
    return lines


def about(bar: Bar, figure: Figure) -> bool:
    """Whether a bar is about a figure."""
    return (figure.measure, figure.subject) == (bar.measure, bar.work) and bar.dtype in figure.split


def benchmark(
    sources: Sequence[tuple[str, str]],
    names: Sequence[str],
    *,
    quick: bool,
    texts: Texts | None,
    keep: Callable[[Sequence[Figure]], None],
) -> list[Figure]:
    """All works on all models, in order; `keep` gets all figures so far after each work."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = dtypes_that_pay(device)
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name()
    figures = [
        single("matrix product rate", f"a large square product in {text(dtype)}", threads, rate / 1e9, "GFLOP/s", 15)
        for dtype, rate in rates.items()
    ]
    print("\n".join(map(shown, figures)), file=sys.stderr)
    start = time.perf_counter()
    for label, source in sources:
        subject = Subject(label, source, quick, rates, texts)
        for name in names:
            print(f"{time.perf_counter() - start:6.0f} s  {label}: {name}", file=sys.stderr, flush=True)
            for figure in WORKS[name](subject):
                figures.append(figure)
                print(f"          {shown(figure)}", file=sys.stderr, flush=True)
            keep(figures)
    return figures


def write(figures: Sequence[Figure], out: Path, command: str, earlier: Sequence[Mapping[str, object]]) -> None:
    """The results file; earlier rows stay unless they have been measured again."""
    rows = write_figures(figures, out, command=command)
    fresh = {(row["measure"], row["subject"], row["split"]) for row in rows}
    kept = [row for row in earlier if (row["measure"], row["subject"], row["split"]) not in fresh]
    lines = ",\n".join(json.dumps(row) for row in [*kept, *rows])
    out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> int:
    """Parse, run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small samples and few repeats")
    parser.add_argument(
        "--model", default=os.environ.get("TILTMETER_BENCH_MODEL"), help="a real model to measure as well"
    )
    parser.add_argument("--out", type=Path, help="JSON to write; by default docs/results/speed.json, with --quick none")
    parser.add_argument("--only", help=f"works, separated by commas: {', '.join(WORKS)}")
    parser.add_argument("--add", action="store_true", help="keep the figures that are there and not measured now")
    parser.add_argument("--skip-organism", action="store_true", help="measure the other model alone")
    parser.add_argument(
        "--traits", type=Path, help="measure with these traits: TOML, or the reference implementation's YAML"
    )
    parser.add_argument("--peak", choices=("extraction", "reading"), help=argparse.SUPPRESS)
    parser.add_argument("--source", default=ORGANISM, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    if given.peak:
        print(peak_of(given.peak, given.source, given.dtype))
        return 0
    names = given.only.split(",") if given.only else list(WORKS)
    if unknown := sorted(set(names) - set(WORKS)):
        parser.error(f"there is no work {', '.join(unknown)}; choose among {', '.join(WORKS)}")
    sources = [] if given.skip_organism else [("organism", ORGANISM)]
    sources += [(Path(given.model).name, given.model)] if given.model else []
    texts = read_texts(given.traits) if given.traits else None
    if texts is not None:
        sources = [(f"{label}, {texts.name}", source) for label, source in sources if source != ORGANISM]
    out = given.out or (None if given.quick or (given.only and not given.add) else RESULTS)
    command = "python bench/bench.py" + (" --quick" if given.quick else "")
    command += f" --only {given.only}" if given.only else ""
    command += f" --model {Path(given.model).name}" if given.model else ""
    command += f" --traits {given.traits.name}" if given.traits else ""
    earlier = json.loads(out.read_text(encoding="utf-8")) if given.add and out is not None and out.exists() else []

    def keep(figures: Sequence[Figure]) -> None:
        if out is not None:
            write(figures, out, command, earlier)

    try:
        figures = benchmark(sources, names, quick=given.quick, texts=texts, keep=keep)
    except Mismatch as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    for figure in figures:
        print(shown(figure))
    print()
    for line in verdicts(figures):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
