"""The ledger: hand-computed costs, hard limits, and counts that survive the process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiltmeter.errors import ArtifactError, BudgetExceeded, InputError
from tiltmeter.ledger import Ledger, ModelCost, Price

PRICES = {"m": Price(2.0, 10.0)}  # dollars per million


def test_a_call_is_entered_at_its_most_and_corrected_afterwards() -> None:
    ledger = Ledger(prices=PRICES)
    call = ledger.reserve("m", input_tokens=1_000_000, output_tokens=100_000)
    assert ledger.usd == pytest.approx(3.0)
    ledger.settle(call, (500_000, 10_000))
    assert ledger.usd == pytest.approx(1.1)
    assert ledger.costs() == {"m": ModelCost(1, 500_000, 10_000, pytest.approx(1.1), 0.0)}


def test_unknown_ends_stay_at_their_most_and_refused_calls_are_free() -> None:
    ledger = Ledger(prices=PRICES)
    for usage, charged in ((None, True), (None, False)):
        call = ledger.reserve("m", input_tokens=1_000_000, output_tokens=0)
        ledger.settle(call, usage, charged=charged)
    ledger.reserve("m", input_tokens=500_000, output_tokens=0)  # never settled
    assert ledger.costs() == {"m": ModelCost(3, 0, 0, pytest.approx(3.0), pytest.approx(3.0))}


def test_a_model_without_a_price_has_no_cost_rather_than_none_at_all() -> None:
    ledger = Ledger()
    ledger.settle(ledger.reserve("m", input_tokens=5, output_tokens=5), (4, 1))
    assert ledger.costs()["m"].usd is None
    assert ledger.costs()["m"].input_tokens == 4


def test_the_limit_itself_may_be_reached_but_not_passed() -> None:
    ledger = Ledger(prices=PRICES, budget_usd=2.0)
    ledger.reserve("m", input_tokens=1_000_000, output_tokens=0)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("m", input_tokens=1, output_tokens=0)
    assert ledger.usd == pytest.approx(2.0)
    assert ledger.costs()["m"].calls == 1
    calls = Ledger(budget_calls=1)
    calls.reserve("m", input_tokens=1, output_tokens=1)
    with pytest.raises(BudgetExceeded):
        calls.reserve("m", input_tokens=1, output_tokens=1)


def test_the_next_process_goes_on_counting_with_calls_of_a_killed_one_at_their_most(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    first = Ledger(path, prices=PRICES)
    first.settle(first.reserve("m", input_tokens=1_000_000, output_tokens=0), (500_000, 0))
    first.reserve("m", input_tokens=1_000_000, output_tokens=0)  # the process dies here
    second = Ledger(path, prices=PRICES, budget_usd=4.0)
    assert second.usd == pytest.approx(3.0)
    assert second.costs()["m"].calls == 2
    with pytest.raises(BudgetExceeded):
        second.reserve("m", input_tokens=600_000, output_tokens=0)
    call = second.reserve("m", input_tokens=400_000, output_tokens=0)
    assert call == 2
    assert Ledger(path, prices=PRICES).usd == pytest.approx(3.8)


def test_a_call_is_on_the_disk_before_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    Ledger(path, prices=PRICES).reserve("m", input_tokens=1_000_000, output_tokens=0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"call": 0, "model": "m", "state": "open", "input": 0, "output": 0, "usd": 2.0}]


@pytest.mark.parametrize("row", ['{"call": "x"}', '{"step": 3}', '{"call": 0, "usd": null}', '{"call": 0}'])
def test_a_foreign_file_is_no_ledger(tmp_path: Path, row: str) -> None:
    path = tmp_path / "costs.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ArtifactError, match="ledger"):
        Ledger(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget_usd": -1.0},
        {"budget_calls": -1},
        {"prices": {"m": (-1.0, 0.0)}},
        {"budget_usd": float("nan")},
    ],
)
def test_limits_that_mean_nothing_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match="from 0 up"):
        Ledger(**settings)  # type: ignore[arg-type]


def test_a_budget_without_a_price_is_refused() -> None:
    with pytest.raises(InputError, match="price of 'other'"):
        Ledger(prices=PRICES, budget_usd=1.0).check("other")
    Ledger(prices=PRICES, budget_usd=1.0).check("m")
    Ledger().check("other")
