"""The batch plan by trial: how long rows may be on this machine, by its clock and its memory.

`plan_batches` follows a rule, so that two plans for the same prompts and model are equal. Here some lengths around that
rule's are tried instead, on the prompts themselves: each once for its memory (and to warm up), those that stay under
the limit then in turn for their time, and the fastest median wins. The plan's `reason` holds all numbers. Another run
may choose otherwise: keep the plan, as a basis does.

Memory is what a pass takes above what was there before: allocations of the device on CUDA; on a CPU with Linux, the
process's high-water mark, reset before each pass. Elsewhere it is not known, and rows longer than the rule's are
not tried.

    plan = probe_batches(lm, ids, layers=[14, 16, 18])
    plan.reason         # "rows of at most 2730 tokens: the fastest of 4 (682: 1.71 s, 61 MB; ...)"
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tiltmeter.capture import Pooling, capture, plan_batches
from tiltmeter.errors import InputError
from tiltmeter.lm import LM
from tiltmeter.plan import BatchPlan

__all__ = ["Gauge", "gauge_of", "probe_batches"]

Work = Callable[[], object]

_SHARES = (0.25, 0.5, 1.0, 2.0)  # of the rule's row length
_ROUNDS = 3
_SAMPLE_ROWS = 2  # a sample fills at least so many of the longest rows
_CPU_LIMIT = 300 * 10**6
_DEVICE_SHARE = 0.5  # of the memory that is free


class Gauge(NamedTuple):
    """What a pass costs on a machine.

    Attributes:
        seconds: runs a work and says how long it took.
        memory: runs a work and says how many bytes it took at its peak, above what was there before; None where
            that cannot be known.
    """

    seconds: Callable[[Work], float]
    memory: Callable[[Work], int | None]


def probe_batches(
    lm: LM,
    token_ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    pooling: Pooling = "last_token",
    memory_limit: int | None = None,
    gauge: Gauge | None = None,
) -> BatchPlan:
    """Lay prompts into forward passes, with the row length that is fastest here within a memory limit.

    Args:
        lm: the model.
        token_ids: the prompts; of many, a run of neighbours that fills two of the longest rows is tried.
        layers: what will be read.
        pooling: as in `capture`.
        memory_limit: bytes that a pass may take; default 300 MB on a CPU, half of what is free on a device.
        gauge: what measures time and memory; default that of the model's device.

    Raises:
        InputError: a limit below one byte, or not even the shortest rows fit into the memory; otherwise as
            `plan_batches` and `capture`.
    """
    if memory_limit is not None and memory_limit < 1:
        raise InputError(f"memory_limit is {memory_limit}; it must be a number of bytes, at least 1")
    rule = plan_batches(lm, token_ids)
    if rule.method == "single":
        return replace(rule, reason=f"{rule.reason}; one prompt per row leaves no row length to try")
    lay = partial(plan_batches, lm, method=rule.method, verify=False)
    lengths = sorted({max(1, int(rule.max_tokens * share)) for share in _SHARES})
    plans = _distinct([lay(token_ids, max_tokens=length) for length in lengths])
    if len(plans) == 1:
        return replace(rule, reason=f"{rule.reason}; every row length tried gives the same rows")
    gauge, limit = gauge or gauge_of(lm), memory_limit or _default_limit(lm)
    sample = _neighbours(token_ids, _SAMPLE_ROWS * plans[-1].max_tokens)
    works: dict[int, Work] = {
        plan.max_tokens: partial(
            capture, lm, sample, layers, pooling=pooling, plan=lay(sample, max_tokens=plan.max_tokens)
        )
        for plan in plans
    }
    with _surviving():
        works[plans[0].max_tokens]()  # what is made once is no row length's cost
    memory = _memory(works, gauge, rule.max_tokens)
    if not any(isinstance(found, int) or found is None for found in memory.values()):
        raise InputError(
            f"memory ran out with rows of every length tried ({', '.join(map(str, works))} tokens); load the model in "
            "half precision, or on a device with more memory"
        )
    fitting = [n for n, found in memory.items() if found is None or (isinstance(found, int) and found <= limit)]
    known = {n: found for n, found in memory.items() if isinstance(found, int)}
    seconds = _seconds({n: works[n] for n in fitting}, gauge)
    chosen = min(seconds, key=lambda n: (seconds[n], n)) if seconds else min(known, key=lambda n: (known[n], n))
    verdict = f"the fastest of {len(works)}" if seconds else "above the limit like all others, but least above it"
    tried = "; ".join(_told(n, seconds.get(n), found) for n, found in memory.items())
    shown = f"limit {limit / 1e6:.0f} MB; median of {_ROUNDS} passes over {len(sample)} of {len(token_ids)} prompts"
    why = f"rows of at most {chosen} tokens: {verdict} ({tried}; {shown})"
    plan = next(plan for plan in plans if plan.max_tokens == chosen)
    return replace(plan, reason=f"{rule.reason}; {why}")


def gauge_of(lm: LM) -> Gauge:
    """What measures passes of this model."""
    if lm.device.type == "cuda":
        return Gauge(partial(_clock, lm.device), partial(_device_memory, lm.device))
    if lm.device.type == "cpu" and sys.platform == "linux":
        return Gauge(partial(_clock, lm.device), _resident_memory)
    return Gauge(partial(_clock, lm.device), _unknown_memory)


# ---------------------------------------------------------------------- trying

_RAN_OUT = "out of memory"
_LEFT_OUT = "not tried: its memory cannot be known here"


def _memory(works: dict[int, Work], gauge: Gauge, rule: int) -> dict[int, int | str | None]:
    """By row length: bytes; None where unknown; or in words why there is no number, and then it cannot be chosen."""
    found: dict[int, int | str | None] = {}
    blind = False
    for length, work in works.items():
        if _RAN_OUT in found.values():  # longer rows need more
            found[length] = _RAN_OUT
        elif blind and length > rule:
            found[length] = _LEFT_OUT
        else:
            with _surviving() as survived:
                survived.bytes = gauge.memory(work)
            found[length] = _RAN_OUT if survived.ran_out else survived.bytes
            blind = blind or found[length] is None
    return found


def _seconds(works: dict[int, Work], gauge: Gauge) -> dict[int, float]:
    """Median times of works that are run in turn; a round begins with another one each time."""
    lengths = list(works)
    taken: dict[int, list[float]] = {length: [] for length in lengths}
    for round_ in range(_ROUNDS):
        for at in range(len(lengths)):
            length = lengths[(at + round_) % len(lengths)]
            taken[length].append(gauge.seconds(works[length]))
    return {length: statistics.median(times) for length, times in taken.items()}


class _Survived:
    """What came of a pass: its bytes, or that memory ran out."""

    bytes: int | None = None
    ran_out = False


@contextlib.contextmanager
def _surviving() -> Iterator[_Survived]:
    """Take it for an answer when memory runs out, and give back what the pass had taken."""
    survived = _Survived()
    try:
        yield survived
    except MemoryError:
        survived.ran_out = True
    except RuntimeError as error:  # torch has an error class of its own for devices, and none for a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        survived.ran_out = True
    if survived.ran_out:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _told(length: int, seconds: float | None, memory: int | str | None) -> str:
    if isinstance(memory, str):
        return f"{length}: {memory}"
    size = "memory unknown" if memory is None else f"{memory / 1e6:.0f} MB"
    return f"{length}: {size}" if seconds is None else f"{length}: {seconds:.3g} s, {size}"


def _distinct(plans: Sequence[BatchPlan]) -> list[BatchPlan]:
    """Plans with rows of their own; of those that are the same, the one of the least length."""
    return list({plan.rows: plan for plan in reversed(plans)}.values())[::-1]


def _neighbours(token_ids: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """A run of the sorted prompts, out of the middle, with about as many unique tokens: they share as all do."""
    order = sorted(range(len(token_ids)), key=lambda i: tuple(token_ids[i]))
    middle = len(order) // 2
    seen: set[tuple[int, ...]] = set()
    picked: list[int] = []
    for at in sorted(range(len(order)), key=lambda at: (abs(at - middle), at)):
        if len(seen) >= tokens:
            break
        ids = tuple(token_ids[order[at]])
        seen.update(ids[: end + 1] for end in range(len(ids)))
        picked.append(order[at])
    return [token_ids[i] for i in sorted(picked)]


# ---------------------------------------------------------------------- measuring


def _default_limit(lm: LM) -> int:
    if lm.device.type == "cuda":
        return int(_DEVICE_SHARE * torch.cuda.mem_get_info(lm.device)[0])
    return _CPU_LIMIT


def _clock(device: torch.device, work: Work) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def _device_memory(device: torch.device, work: Work) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _unknown_memory(work: Work) -> None:
    work()


def _resident_memory(work: Work) -> int | None:
    """The rise of the process's high-water mark on Linux; None where the mark cannot be set back."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # memory that was freed but kept would hide what is used
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, mark = _status("VmRSS"), _status("VmHWM")
    work()
    after = _status("VmHWM")
    if before is None or mark is None or after is None or mark > 1.02 * before:
        return None
    return max(0, after - before)


def _status(field: str) -> int | None:
    """A size in /proc/self/status, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return None
