"""What a paid judge costs: a ledger of calls with a hard budget.

Every call is entered before it is made, at the most that it can cost; a call that could pass a limit is not
made. Afterwards its entry is corrected to what the endpoint says it took. What a call that failed half-way
was charged cannot be known, so it stays entered at its most; so does a call during which the process died.

It knows nothing of endpoints or prompts: models are names, calls are numbers of tokens, prices are the
caller's.

    >>> ledger = Ledger(prices={"gpt-4o": Price(2.5, 10.0)}, budget_usd=0.01)
    >>> call = ledger.reserve("gpt-4o", input_tokens=1000, output_tokens=16)
    >>> ledger.settle(call, (400, 1))
    >>> round(ledger.usd, 6)
    0.00101
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tiltmeter.errors import ArtifactError, BudgetExceeded, InputError
from tiltmeter.runs import append_record, read_records

__all__ = ["Ledger", "ModelCost", "Price"]


class Price(NamedTuple):
    """US dollars per million tokens."""

    input: float
    output: float


@dataclass(frozen=True)
class ModelCost:
    """What one model was asked, and what it cost.

    Attributes:
        calls: calls made, retries included.
        input_tokens: as far as the endpoint said.
        output_tokens: as far as the endpoint said.
        usd: None where no price was given.
        assumed_usd: the part of `usd` that is an upper bound, for calls whose end was not seen.
    """

    calls: int
    input_tokens: int
    output_tokens: int
    usd: float | None
    assumed_usd: float


class Ledger:
    """Counts calls and money per model, and refuses the call that could pass a limit.

    With a file, the count goes on where an earlier process stopped, however it stopped: a call is on the disk
    before it is made. One process writes a ledger at a time.

    Args:
        path: a JSONL file; None keeps the count in memory.
        prices: per model; needed for a budget in dollars.
        budget_usd: the most that may be spent, over all processes that wrote this file.
        budget_calls: the most calls that may be made, counted alike.

    Attributes:
        usd: dollars spent so far, calls of unknown end at their most.

    Raises:
        InputError: a limit or a price is negative.
        ArtifactError: the file is damaged.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        prices: Mapping[str, Price] | None = None,
        budget_usd: float | None = None,
        budget_calls: int | None = None,
    ) -> None:
        self.prices = {model: Price(*price) for model, price in (prices or {}).items()}
        limits = [budget_usd, budget_calls, *(part for price in self.prices.values() for part in price)]
        if any(limit is not None and not limit >= 0 for limit in limits):
            raise InputError(
                f"got a budget of {budget_usd} dollars and {budget_calls} calls with prices {self.prices}; "
                "budgets and prices are numbers from 0 up, prices in dollars per million tokens"
            )
        self.path = None if path is None else Path(path)
        self.budget_usd, self.budget_calls = budget_usd, budget_calls
        self.usd = 0.0
        self._calls: dict[int, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            for row in read_records(self.path).rows:
                self._enter(row)

    def check(self, model: str) -> None:
        """Refuse a budget in dollars that cannot be kept because the model has no price.

        Raises:
            InputError: there is no price for the model.
        """
        if self.budget_usd is not None and model not in self.prices:
            raise InputError(
                f"a budget of {self.budget_usd} dollars was given without the price of '{model}'; give its "
                "price per million input and output tokens, or limit the number of calls instead"
            )

    def reserve(self, model: str, *, input_tokens: int, output_tokens: int) -> int:
        """Enter a call that is about to be made, at the most that it can cost.

        Returns:
            The call's number, for `settle`.

        Raises:
            BudgetExceeded: the call could pass a limit; it is not entered.
        """
        usd = self._usd(model, input_tokens, output_tokens)
        if self.budget_calls is not None and len(self._calls) + 1 > self.budget_calls:
            raise BudgetExceeded(
                f"{len(self._calls)} judge calls were made and {self.budget_calls} are allowed; what was "
                "judged is kept: raise the limit and run the same command again to go on"
            )
        if self.budget_usd is not None and self.usd + usd > self.budget_usd:
            raise BudgetExceeded(
                f"{self.usd:.4f} dollars are spent and the next call may cost {usd:.4f}, which would pass "
                f"the budget of {self.budget_usd:.4f}; what was judged is kept: raise the budget and run the "
                "same command again to go on"
            )
        call = len(self._calls)
        self._write(call, {"model": model, "state": "open", "input": 0, "output": 0, "usd": usd})
        return call

    def settle(self, call: int, usage: tuple[int, int] | None, *, charged: bool = True) -> None:
        """Enter what a call really took.

        Args:
            call: its number.
            usage: input and output tokens; None where the endpoint did not say.
            charged: False where the endpoint refused the call, so that it cost nothing.
        """
        entry = self._calls[call]
        if not charged:
            self._write(call, {"state": "refused", "usd": 0.0})
        elif usage is None:
            self._write(call, {"state": "assumed"})
        else:
            usd = self._usd(entry["model"], *usage)
            self._write(call, {"state": "paid", "input": usage[0], "output": usage[1], "usd": usd})

    def costs(self) -> dict[str, ModelCost]:
        """What each model was asked and what it cost."""
        costs: dict[str, ModelCost] = {}
        for model in sorted({call["model"] for call in self._calls.values()}):
            calls = [call for call in self._calls.values() if call["model"] == model]
            costs[model] = ModelCost(
                calls=len(calls),
                input_tokens=sum(call["input"] for call in calls),
                output_tokens=sum(call["output"] for call in calls),
                usd=sum(call["usd"] for call in calls) if model in self.prices else None,
                assumed_usd=sum(call["usd"] for call in calls if call["state"] in ("open", "assumed")),
            )
        return costs

    def _usd(self, model: str, input_tokens: int, output_tokens: int) -> float:
        price = self.prices.get(model, Price(0.0, 0.0))
        return (input_tokens * price.input + output_tokens * price.output) / 1e6

    def _write(self, call: int, change: Mapping[str, Any]) -> None:
        row = {"call": call, **change}
        if self.path is not None:
            append_record(self.path, row)
        self._enter(row)

    def _enter(self, row: Mapping[str, Any]) -> None:
        try:
            entry = {"usd": 0.0} | self._calls.get(int(row["call"]), {}) | dict(row)
            before = float(self._calls.get(int(row["call"]), {"usd": 0.0})["usd"])
            self.usd += float(entry["usd"]) - before
            known = {"model": str(entry["model"]), "state": str(entry["state"])}
            entry |= {"input": int(entry["input"]), "output": int(entry["output"]), **known}
            entry["usd"] = float(entry["usd"])
            if not (0 <= entry["usd"] < math.inf and entry["input"] >= 0 and entry["output"] >= 0):
                raise ValueError("a call cannot cost less than nothing")  # it would lift the budget
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(
                f"{self.path} is not a ledger of judge calls ({dict(row)}); choose another file"
            ) from error
        self._calls[int(row["call"])] = entry
