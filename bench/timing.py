"""Clocks: alternating repeats, the rate of a large matrix product, the high-water mark of a process's memory.

Knows nothing of what is timed. On a machine with CUDA every time is taken between two synchronisations, and the
device's own clock is read beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

Work = Callable[[], object]


class Spread(NamedTuple):
    """Repeats of one time: median, least and largest, in the unit of what was given."""

    median: float
    low: float
    high: float
    n: int


class Times(NamedTuple):
    """What one work took: seconds by the wall clock, and by the device's clock where there is one."""

    wall: tuple[float, ...]
    device: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """The median of repeats with their range."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(above: Sequence[float], below: Sequence[float], scale: float = 1.0) -> Spread:
    """Ratios of repeats that were taken in turn: what slowed the machine for one slowed it for both."""
    return spread([scale * a / b for a, b in zip(above, below, strict=True)])


def clock(work: Work) -> tuple[float, float | None]:
    """Run once; seconds by the wall clock and by the device's."""
    gc.collect()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, None
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return time.perf_counter() - start, first.elapsed_time(last) / 1e3


def alternate(works: Mapping[str, Work], *, repeats: int, budget: float, least: int = 1) -> dict[str, Times]:
    """Time works in turn, round after round; a round begins with another work each time.

    Args:
        works: by name.
        repeats: rounds wanted.
        budget: seconds after which no further round begins.
        least: rounds that are run whatever they take.
    """
    names = list(works)
    taken: dict[str, list[tuple[float, float | None]]] = {name: [] for name in names}
    start = time.perf_counter()
    for round_ in range(repeats):
        if round_ >= least and time.perf_counter() - start > budget:
            break
        for at in range(len(names)):
            name = names[(at + round_) % len(names)]
            taken[name].append(clock(works[name]))
    return {
        name: Times(tuple(w for w, _ in pairs), tuple(d for _, d in pairs if d is not None))
        for name, pairs in taken.items()
    }


def matrix_rate(dtype: torch.dtype, device: torch.device, *, repeats: int = 15) -> float:
    """Floating-point operations per second of one large square matrix product, the fastest of some repeats: what the
    machine can do, whatever else it does just then."""
    size = 2048 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    _ = left @ right
    return 2 * size**3 / spread([clock(lambda: left @ right)[0] for _ in range(repeats)]).low


class Peak:
    """Holds `above`: the most bytes of this process's memory over what it had when the block began."""

    above = 0


@contextlib.contextmanager
def memory_peak() -> Iterator[Peak]:
    """Watch this process's resident memory, or the device's allocations where there is CUDA.

    The system's high-water mark is reset and read where it can be (Linux); a thread that looks every millisecond
    stands in for it, and cannot see peaks between two looks.
    """
    import psutil  # type: ignore[import-untyped]

    peak = Peak()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.above = torch.cuda.max_memory_allocated() - before
        return
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # memory that was freed but kept would hide later use
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    process = psutil.Process()
    before = process.memory_info().rss
    marked = _high_water(0) < 1.02 * before  # otherwise the mark is an older one
    seen = [before]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            seen[0] = max(seen[0], process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.above = max(seen[0], _high_water(before) if marked else before) - before


def _high_water(otherwise: int) -> int:
    """The system's mark since the last reset, in bytes; `otherwise` where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return otherwise
