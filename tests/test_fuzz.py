"""Spoilt files for every loader: a short run, and that no loader is forgotten."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiltmeter

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
