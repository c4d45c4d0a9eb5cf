"""Spoilt files for every loader: a short run, and that no loader is forgotten."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiltmeter
from tiltmeter.adapter_files import adapter_config
from tiltmeter.answers import read_answers
from tiltmeter.calibrate import read_exchanges, read_likelihood_table, read_table
from tiltmeter.drift import Reading
from tiltmeter.errors import TiltmeterError
from tiltmeter.judge_examples import read_examples, read_pairs
from tiltmeter.ledger import Ledger
from tiltmeter.questions import load_questions
from tiltmeter.readings import read_run
from tiltmeter.runs import read_json
from tiltmeter.vectors import read_chats

PROGRAM = Path(__file__).parents[1] / "bench" / "trust" / "fuzz.py"
# Of files that the package ships or writes for itself in one go; studies read what they wrote.
OWN = ("studies", "cli", "organism", "integrations", "report")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    command = [sys.executable, str(PROGRAM), "-n", "3000", "--first", "50000000", "--out", "-", "--covers"]
    state = tmp_path_factory.mktemp("fuzz")
    done = subprocess.run([*command, "--state", str(state)], capture_output=True, text=True, timeout=300)
    return f"{done.stdout}\n{done.stderr[-2000:]}\nexit code {done.returncode}"


def test_no_spoilt_file_ends_in_an_untyped_exception_a_hang_or_a_loss_of_memory(said: str) -> None:
    assert "3,000 tried" in said, said
    assert "0 untyped, 0 over 5 s, 0 over 1 GiB, 0 worker died\n" in said, said
    assert "exit code 0" in said, said
    tried, refused, loaded = re.findall(r"([\d,]+) (?:tried|refused|loaded)", said)
    assert int(refused.replace(",", "")) + int(loaded.replace(",", "")) == 3000 == int(tried.replace(",", ""))
    assert min(int(refused.replace(",", "")), int(loaded.replace(",", ""))) > 300  # it neither spoils all nor nothing


KEYS = st.sampled_from(
    ("id", "outcome", "question", "answer", "messages", "aligned", "coherent", "harmful", "harmless", "peft_type",
     "config", "format", "kind", "step", "reading", "verdict", "call", "usd", "model", "set", "run", "seed", "role",
     "content")
)  # fmt: skip
NUMBERS = st.integers() | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=6),
    max_leaves=12,
)
READERS: dict[str, Callable[[Path], object]] = {
    "a.json": read_json, "b.json": lambda path: adapter_config(path.parent), "c.json": Reading.load,
    "d.yaml": load_questions, "a.jsonl": read_answers, "b.jsonl": read_pairs, "c.jsonl": read_examples,
    "d.jsonl": read_exchanges, "e.jsonl": read_chats, "f.jsonl": read_run, "g.jsonl": Ledger, "h.jsonl": read_table,
    "i.jsonl": read_likelihood_table,
}  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=8), min_size=1, max_size=3))
def test_any_structure_in_json_is_read_or_refused_with_an_error_of_ours(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    text = "\n".join(json.dumps(row) for row in rows)
    for name, read in READERS.items():
        path = tmp_path / ("adapter_config.json" if name == "b.json" else name)
        path.write_text(text if name.endswith("jsonl") else json.dumps(rows if name == "d.yaml" else rows[0]))
        with contextlib.suppress(TiltmeterError):
            read(path)


def _loaders() -> set[str]:
    """Public functions and class methods whose name says that they read, and that take a path."""
    found = set()
    for module in pkgutil.walk_packages(tiltmeter.__path__, "tiltmeter."):
        if module.name.split(".")[1] in OWN:
            continue
        content = importlib.import_module(module.name)
        for name in getattr(content, "__all__", ()):
            thing = getattr(content, name)
            if getattr(thing, "__module__", "") != module.name:
                continue
            if inspect.isclass(thing):
                found |= {f"{name}.{m}" for m in ("load", "open") if _takes_path(vars(thing).get(m))}
            elif re.match(r"(load|read|open)(_|$)", name) and _takes_path(thing):
                found.add(f"{module.name.split('.')[1]}.{name}")
    return found


def _takes_path(function: object) -> bool:
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        return False
    return any(re.search(r"\bPath\b", str(p.annotation)) for p in inspect.signature(function).parameters.values())


def test_every_loader_of_files_is_tried(said: str) -> None:
    covered = set(said.split("covers: ")[1].split("\n")[0].split(", "))
    missing = {name for name in _loaders() if not {name, name.split(".")[-1]} & covered}
    assert not missing, f"put {sorted(missing)} into the table of bench/trust/seeds.py"
