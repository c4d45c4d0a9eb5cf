"""The probe of row lengths: its choice follows what was measured, and no choice changes what is read."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bases import PROMPTS, TRAITS
from tiltmeter import lm as lms
from tiltmeter.basis import TraitBasis, fit_basis
from tiltmeter.batch_probe import Gauge, gauge_of, probe_batches
from tiltmeter.capture import capture, plan_batches
from tiltmeter.errors import InputError
from tiny import tiny_lm

MB = 10**6
# In each of 150 prompts 20 tokens of its own, and one that 50 neighbours share. The rule allows 1,024 a row (16 MiB of
# 4,096 numbers of four bytes), so rows of 256, 512, 1,024 and 2,048 tokens are tried: 12, 25, 51 and 102 prompts.
PROMPT_IDS = [[8 + i // 50, 8 + i % 50, *([9] * 19)] for i in range(150)]
PASSES = {256: 13, 512: 6, 1024: 3, 2048: 2}
Work = Callable[[], object]


@pytest.fixture(scope="module")
def lm() -> lms.LM:
    return tiny_lm(intermediate_size=4096)


class Meter:
    """Says of each work what a table has for the number of passes that it makes through the model."""

    def __init__(self, lm: lms.LM, seconds: dict[int, Any], memory: dict[int, Any]) -> None:
        self.lm = lm
        self.tables = {"seconds": seconds, "memory": memory}
        self.asked: list[tuple[str, int]] = []
        self.seen: dict[tuple[str, int], int] = {}

    def gauge(self) -> Gauge:
        return Gauge(lambda work: self.look("seconds", work), lambda work: self.look("memory", work))

    def look(self, kind: str, work: Work) -> Any:
        passes = [0]
        handle = self.lm.blocks[0].register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
        try:
            work()
        finally:
            handle.remove()
        length = next(length for length, count in PASSES.items() if count == passes[0])
        self.asked.append((kind, length))
        at = self.seen[kind, length] = self.seen.get((kind, length), -1) + 1
        found = self.tables[kind][length]
        if callable(found):
            return found()
        return found[at] if isinstance(found, list) else found


LITTLE = dict.fromkeys(PASSES, 10 * MB)
EQUAL = dict.fromkeys(PASSES, 1.0)


def test_the_rule_is_one_of_the_lengths_tried(lm: lms.LM) -> None:
    assert plan_batches(lm, PROMPT_IDS).max_tokens == 1024
    for length, passes in PASSES.items():
        assert len(plan_batches(lm, PROMPT_IDS, max_tokens=length).rows) == passes


@pytest.mark.parametrize("fastest", PASSES)
def test_the_fastest_median_wins_and_the_answers_stay_the_plain_ones(lm: lms.LM, fastest: int) -> None:
    # The others have the fastest single pass, and the winner the slowest one: means and minima would choose otherwise.
    seconds = {n: [0.9, 0.9, 0.9] if n == fastest else [0.1, 1.0, 1.0] for n in PASSES}
    seconds[fastest][1] = 99.0
    meter = Meter(lm, seconds, LITTLE)
    plan = probe_batches(lm, PROMPT_IDS, [1, 2], gauge=meter.gauge())
    assert (plan.max_tokens, len(plan.rows)) == (fastest, PASSES[fastest])
    with torch.no_grad():
        states = [lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in PROMPT_IDS]
    plain = np.stack([[s[layer + 1][0, -1].numpy() for s in states] for layer in (1, 2)])
    np.testing.assert_allclose(capture(lm, PROMPT_IDS, [1, 2], plan=plan).values, plain, atol=1e-4)


def test_lengths_are_timed_in_turn_and_every_number_is_told(lm: lms.LM) -> None:
    meter = Meter(lm, {256: 4.0, 512: 3.0, 1024: 2.0, 2048: 5.0}, {256: MB, 512: 2 * MB, 1024: 3 * MB, 2048: 4 * MB})
    plan = probe_batches(lm, PROMPT_IDS, [1], memory_limit=50 * MB, gauge=meter.gauge())
    assert [length for kind, length in meter.asked if kind == "memory"] == [256, 512, 1024, 2048]
    timed = [length for kind, length in meter.asked if kind == "seconds"]
    assert timed == [256, 512, 1024, 2048, 512, 1024, 2048, 256, 1024, 2048, 256, 512]
    for said in (
        "rows of at most 1024 tokens",
        "256: 4 s, 1 MB; 512: 3 s, 2 MB; 1024: 2 s, 3 MB; 2048: 5 s, 4 MB",
        "limit 50 MB",
        "median of 3 passes over 150 of 150 prompts",
    ):
        assert said in plan.reason


def test_the_fastest_is_not_taken_above_the_memory_limit(lm: lms.LM) -> None:
    meter = Meter(lm, {256: 4.0, 512: 3.0, 1024: 2.0, 2048: 1.0}, {256: MB, 512: 2 * MB, 1024: 3 * MB, 2048: 4 * MB})
    assert probe_batches(lm, PROMPT_IDS, [1], memory_limit=2 * MB, gauge=meter.gauge()).max_tokens == 512
    assert {length for kind, length in meter.asked if kind == "seconds"} == {256, 512}


def test_where_all_are_above_the_limit_the_smallest_is_taken_and_that_is_said(lm: lms.LM) -> None:
    meter = Meter(lm, EQUAL, {256: 6 * MB, 512: 5 * MB, 1024: 7 * MB, 2048: 9 * MB})
    plan = probe_batches(lm, PROMPT_IDS, [1], memory_limit=MB, gauge=meter.gauge())
    assert plan.max_tokens == 512
    assert "above the limit" in plan.reason


def no_memory_on_the_device() -> int:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_memory_here() -> int:
    return torch.empty(2**50).numel()


def no_memory_in_python() -> int:
    raise MemoryError


@pytest.mark.parametrize("fail", [no_memory_on_the_device, no_memory_here, no_memory_in_python])
def test_running_out_of_memory_ends_the_search_upwards_and_nothing_else(lm: lms.LM, fail: Callable[[], int]) -> None:
    meter = Meter(lm, {256: 2.0, 512: 1.0}, {256: MB, 512: MB, 1024: fail})
    plan = probe_batches(lm, PROMPT_IDS, [1], gauge=meter.gauge())
    assert plan.max_tokens == 512
    assert "1024: out of memory; 2048: out of memory" in plan.reason


def test_if_nothing_fits_the_error_says_what_to_do(lm: lms.LM) -> None:
    meter = Meter(lm, EQUAL, {256: no_memory_here})
    with pytest.raises(InputError, match=r"256, 512, 1024, 2048 tokens.*half precision"):
        probe_batches(lm, PROMPT_IDS, [1], gauge=meter.gauge())


def test_other_failures_are_not_taken_for_a_lack_of_memory(lm: lms.LM) -> None:
    def broken() -> int:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        probe_batches(lm, PROMPT_IDS, [1], gauge=Meter(lm, EQUAL, {256: broken}).gauge())


def test_where_memory_cannot_be_known_rows_longer_than_the_rule_s_are_not_tried(lm: lms.LM) -> None:
    meter = Meter(lm, {256: 4.0, 512: 3.0, 1024: 2.0, 2048: 1.0}, dict.fromkeys(PASSES))
    plan = probe_batches(lm, PROMPT_IDS, [1], gauge=meter.gauge())
    assert plan.max_tokens == 1024
    assert 2048 not in {length for _, length in meter.asked}
    assert "memory unknown" in plan.reason


def test_many_prompts_are_tried_on_a_run_of_neighbours(lm: lms.LM) -> None:
    prompts = [[8 + i // 50, 8 + i % 50, *([9] * 19)] for i in range(1000)]
    read: list[int] = []

    def count(work: Work) -> int:
        with counting(lm, read):
            work()
        return MB

    plan = probe_batches(lm, prompts, [1], gauge=Gauge(lambda work: float(count(work)), count))
    plan.check(1000)
    # Two of the longest rows: 4,096 unique tokens, of which the first is shared by 50 neighbours.
    assert 4096 <= read[0] <= 4096 + 3 * 21
    assert " of 1000 prompts" in plan.reason


@contextlib.contextmanager
def counting(lm: lms.LM, into: list[int]) -> Iterator[None]:
    """Notes how many tokens pass the first block."""
    seen: list[int] = []
    handle = lm.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        yield
    finally:
        handle.remove()
        into.append(sum(seen))


def test_where_every_length_gives_the_same_rows_nothing_is_tried(lm: lms.LM) -> None:
    meter = Meter(lm, {}, {})
    plan = probe_batches(lm, PROMPT_IDS[:5], [1], gauge=meter.gauge())
    assert plan.rows == plan_batches(lm, PROMPT_IDS[:5]).rows
    assert meter.asked == []


def test_a_limit_of_nothing_is_refused(lm: lms.LM) -> None:
    with pytest.raises(InputError, match="memory_limit is 0"):
        probe_batches(lm, PROMPT_IDS, [1], memory_limit=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the process's high-water mark is read where there is one")
def test_the_memory_of_a_pass_is_what_it_takes_at_its_peak(lm: lms.LM) -> None:
    gauge = gauge_of(lm)

    def take(megabytes: int) -> int | None:
        return gauge.memory(lambda: torch.ones(megabytes * MB // 4).sum())

    if take(1) is None:
        pytest.skip("this system does not let a process set its high-water mark back")
    assert 95 * MB < (take(100) or 0) < 120 * MB
    assert (take(10) or 0) < 40 * MB  # not the mark of the larger one before


def test_on_this_machine_the_probe_finds_a_plan_with_its_reasons(lm: lms.LM) -> None:
    plan = probe_batches(lm, PROMPT_IDS, [1])
    plan.check(150)
    assert plan.max_tokens in PASSES
    assert " s, " in plan.reason


def test_a_basis_keeps_the_plan_that_was_found_and_its_directions_are_the_rule_s(tmp_path: Path) -> None:
    lm = tiny_lm()
    plain = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=2)
    found = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=2, probe_batches=True)
    np.testing.assert_allclose(found.directions, plain.directions, atol=1e-5)
    assert found.plan.reason != plain.plan.reason
    found.save(tmp_path)
    assert TraitBasis.load(tmp_path).plan == found.plan
