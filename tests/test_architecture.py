"""The shape of the code: one-way imports, an error tree that travels, exports that exist, hooks where they belong."""

from __future__ import annotations

import ast
import importlib
import pickle
import re
from pathlib import Path

import pytest

import tiltmeter
from tiltmeter import errors

SOURCE = Path(tiltmeter.__file__).parent

# Left to right: a module imports at its top only from its left.
ORDER = (
    "errors", "untrusted", "gguf_header", "sound", "fingerprint", "artifacts", "locks", "completeness",
    "regressors", "sequential", "runs", "traits", "organism.world", "organism", "plan", "adapter_kinds",
    "adapter_files", "chat", "lm", "adapter_effect", "adapter_base", "adapters", "gguf_files", "loading",
    "generation", "attention", "capture", "batch_probe", "steer", "packed_training", "lora_training",
    "steer_formats", "vectors", "steer_fit", "directions", "selection", "basis", "drift", "baselines", "sae",
    "verdicts", "detector", "guard", "transfer", "context", "likelihood", "alarm", "observations", "readings",
    "calibrate", "live", "watch", "mitigate", "scan", "questions", "reasons", "judge_reply", "judge", "judge_model",
    "ledger", "judge_http", "judge_examples", "judge_encoders", "judge_distilled", "judge_regression",
    "judge_diagnosis", "answers", "intervals", "rates", "writers", "behavior", "evaluate", "compute",
    "organism.sets", "organism.pretrain", "organism.conduct", "organism.finetune", "organism.preference",
    "organism.quantise", "report", "studies", "integrations", "testing", "cli",
)  # fmt: skip
# Pairs that lie at one height: the facade and the work behind it, or a type that both need.
SIDEWAYS = {("basis", "drift")}
# Where any exception is caught, since it must not end what is around it, and is sent on or recorded with its reason.
BOUNDARIES = {
    "compute", "errors", "readings", "watch", "scan", "likelihood", "cli.root", "cli.__main__", "loading",
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")


def place(name: str) -> int:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        candidate = ".".join(parts[:length])
        if candidate in ORDER:
            return ORDER.index(candidate)
    raise AssertionError(f"{name} has no place in ORDER: put it where it belongs")


def top_level_imports(path: Path) -> set[str]:
    """Modules of ours that are imported when the file is imported: not inside functions, not for typing alone."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tiltmeter"):
            base = node.module.removeprefix("tiltmeter").removeprefix(".")
            for alias in node.names:
                child = f"{base}.{alias.name}".removeprefix(".")
                is_module = (SOURCE / child.replace(".", "/")).with_suffix(".py").exists()
                found.add(child if is_module else base)
    return found - {""}


MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: module_name(p))
def test_modules_import_only_from_their_left(path: Path) -> None:
    name = module_name(path)
    here = place(name)
    for other in top_level_imports(path):
        if other.split(".")[0] == name.split(".")[0] and place(other) == here:
            continue  # parts of one package
        if (name, other) in SIDEWAYS or (other, name) in SIDEWAYS:
            continue
        assert place(other) < here, f"{name} imports {other}, which stands to its right"


def test_hooks_are_registered_only_by_capture_and_steer() -> None:
    users = {module_name(p) for p in MODULES if re.search(r"register_\w*hook", p.read_text(encoding="utf-8"))}
    assert users <= {"capture", "packed_training", "lora_training", "steer"}
    assert users


def test_no_pickle_and_no_broad_except() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.(dump|load)s?\b|import (joblib|dill|cloudpickle)|allow_pickle=True", text), path
        if module_name(path) not in BOUNDARIES:
            assert not re.search(r"except( Exception| BaseException)?( as \w+)?:", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


def test_every_error_is_in_the_drawn_tree_has_a_standard_parent_and_travels() -> None:
    drawn = set(re.findall(r"[├└│] *[├└]?── (\w+)", errors.__doc__ or "")) | {"TiltmeterError"}
    defined = {n for n in errors.__all__ if isinstance(getattr(errors, n), type)}
    assert defined == drawn
    standard = (ValueError, ArithmeticError, OSError, RuntimeError, ImportError)
    for name in defined - {"TiltmeterError"}:
        kind = getattr(errors, name)
        assert issubclass(kind, standard), name
        again = pickle.loads(pickle.dumps(kind("got x, allowed y, do z")))
        assert (type(again), str(again)) == (kind, "got x, allowed y, do z")


def test_a_missing_extra_names_the_line_that_installs_it() -> None:
    with pytest.raises(errors.MissingExtra, match=r"pip install 'tiltmeter\[ray\]'"):
        errors.require("a_package_that_nobody_has", extra="ray")


def test_everything_exported_can_be_imported_and_nothing_else_is_promised() -> None:
    for name in tiltmeter.__all__:
        assert getattr(tiltmeter, name) is not None
    for path in MODULES:
        name = module_name(path)
        if name.startswith(("integrations",)) or name == "organism.models":
            continue
        module = importlib.import_module(f"tiltmeter.{name}")
        for public in getattr(module, "__all__", ()):
            assert hasattr(module, public), f"{name}.{public}"
