"""Every error that tiltmeter raises on purpose, and the helper for missing extras.

    TiltmeterError
    ├── InputError(ValueError)             an argument or a file's content is not usable
    │   ├── ArtifactError                  a file of ours is missing, truncated, foreign or of another version
    │   ├── ModelError                     a model cannot be loaded or lacks what is needed (template, blocks)
    │   ├── LayerError                     a layer index outside the model
    │   ├── FingerprintMismatch            an artifact was made from another model
    │   └── AdapterError                   an adapter is damaged, or belongs to another base
    │       ├── InactiveAdapter            an adapter that changes nothing: nothing can be said of it
    │       └── AmbiguousAdapter           several in one checkpoint: nothing says which acted
    ├── NumericalError(ArithmeticError)    NaN or infinity where a number was needed
    ├── StorageError(OSError)              a result could not be written (disk full, no permission)
    │   └── FolderInUse                    another process writes into the folder
    ├── JudgeError(RuntimeError)           a judge cannot be used at all (one failed answer is Unscored instead)
    │   └── BudgetExceeded                 the next call would pass the stated budget
    └── MissingExtra(ImportError)          an optional dependency is not installed

Each message says what was got, what was allowed and what to do next. All of them pickle, since studies run in
worker processes.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "AdapterError",
    "AmbiguousAdapter",
    "ArtifactError",
    "BudgetExceeded",
    "FingerprintMismatch",
    "FolderInUse",
    "InactiveAdapter",
    "InputError",
    "JudgeError",
    "LayerError",
    "MissingExtra",
    "ModelError",
    "NumericalError",
    "StorageError",
    "TiltmeterError",
    "in_words",
    "require",
]


class TiltmeterError(Exception):
    """Root of the tree: catch this to catch everything that tiltmeter raises on purpose."""


class InputError(TiltmeterError, ValueError):
    """An argument, or the content of a file, cannot be used."""


class ArtifactError(InputError):
    """A file of ours is missing, truncated, foreign, or written in another format version."""


class ModelError(InputError):
    """A model cannot be loaded, or lacks something that is needed: blocks, tokenizer, chat template."""


class LayerError(InputError):
    """A layer index lies outside the model."""


class FingerprintMismatch(InputError):
    """An artifact was made from another model than the one it is used with."""


class AdapterError(InputError):
    """An adapter is damaged, or was trained for another base model."""


class InactiveAdapter(AdapterError):
    """An adapter changes nothing (all of its B matrices are zero), so nothing can be said of what it was trained on."""


class AmbiguousAdapter(AdapterError):
    """A checkpoint holds several adapters, or full weights beside one, and nothing says which of them acted."""


class NumericalError(TiltmeterError, ArithmeticError):
    """NaN or infinity where a number was needed."""


class StorageError(TiltmeterError, OSError):
    """A result could not be written: disk full, no permission, not a folder."""


class FolderInUse(StorageError):
    """Another process writes into the folder."""


class JudgeError(TiltmeterError, RuntimeError):
    """A judge cannot be used at all. One answer that fails is `Unscored`, not this."""


class BudgetExceeded(JudgeError):
    """The next judge call would pass the stated budget."""


class MissingExtra(TiltmeterError, ImportError):
    """An optional dependency is not installed."""


def in_words(error: BaseException) -> str:
    """What an exception says, as part of a sentence: of a foreign one its type too. It never fails itself."""
    try:
        text = str(error).encode("utf-8", errors="replace").decode().strip()
    except Exception:  # noqa: BLE001 - an exception whose own text cannot be made
        text = ""
    said = text.splitlines()[0].rstrip(".")[:300] if text else ""
    name = type(error).__name__
    if not said:
        return name
    return said if isinstance(error, TiltmeterError) else f"{name}: {said}"


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say which pip line installs it.

    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this needs the package '{module}', which is not installed; run: pip install 'tiltmeter[{extra}]'"
        ) from error
