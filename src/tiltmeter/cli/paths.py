"""Kinds of parameters: paths that are looked at when the command line is read, before anything heavy is imported."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import click

__all__ = ["ADAPTER", "FILE", "FILE_OR_FOLDER", "FOLDER", "MODEL", "OUT_FILE", "OUT_FOLDER", "NameOrFile"]

_SUFFIXES = (".toml", ".yaml", ".yml", ".json", ".jsonl", ".csv")
_HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")  # that of `lm.looks_like_hub_id`, which needs torch


class _Existing(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """A path that must be there: a file with content, a folder, or either."""

    name = "path"

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Look, and give the path."""
        path = Path(value)
        try:
            found = path.stat()
        except (OSError, ValueError) as error:
            self.fail(f"there is no {' or '.join(self.kinds)} '{value}'{_why(error)}; check the path", param, ctx)
        if stat.S_ISDIR(found.st_mode):
            if "folder" not in self.kinds:
                self.fail(f"'{value}' is a folder, and a file is needed", param, ctx)
        elif "file" not in self.kinds:
            self.fail(f"'{value}' is a file, and a folder is needed", param, ctx)
        elif not stat.S_ISREG(found.st_mode):
            self.fail(f"'{value}' is a pipe or a device; copy it to a file first", param, ctx)
        elif found.st_size == 0:
            self.fail(f"the file '{value}' is empty; make it again, or check the path", param, ctx)
        if not os.access(path, os.R_OK):
            self.fail(f"'{value}' may not be read; check its permissions", param, ctx)
        return path


class _Out(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """A path that can be written: its folders are there, or can be made."""

    name = "path"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Look, and give the path."""
        path = Path(value)
        try:
            if self.kind == "file" and path.is_dir():
                self.fail(f"'{value}' is a folder; name a file in it", param, ctx)
            near = path.absolute() if self.kind == "folder" else path.absolute().parent
            while not near.exists() and near != near.parent:
                near = near.parent
        except (OSError, ValueError) as error:
            self.fail(f"'{value}' cannot be written{_why(error)}; check the path", param, ctx)
        if not near.is_dir():
            self.fail(f"'{value}' cannot be made: '{near}' is no folder; check the path", param, ctx)
        if not os.access(near, os.W_OK | os.X_OK):
            self.fail(f"'{value}' cannot be made: '{near}' may not be written to; check its permissions", param, ctx)
        return path


class NameOrFile(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """One of some names, or a file. Without names, what has no suffix and no slash is a name."""

    name = "text"

    def __init__(self, *names: str) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Look at it if it is a file."""
        text = str(value)
        named = text in self.names if self.names else "/" not in text and not text.endswith(_SUFFIXES)
        if not named or (not self.names and Path(text).exists()):
            FILE.convert(text, param, ctx)
        return text


class _Model(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """A model, or an adapter: what cannot be a name on the hub must be there."""

    name = "text"

    def __init__(self, *, adapter: bool) -> None:
        self.adapter = adapter

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Look at it if it is a path."""
        text = str(value)
        try:
            path = Path(text).expanduser()
            there, is_file = path.exists(), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            self._absent(text, _why(error), param, ctx)
        hub = _HUB_ID.fullmatch(text) is not None and (not self.adapter or "/" in text)
        if not there and not hub and (self.adapter or not text.startswith("organism:")):
            self._absent(text, "", param, ctx)
        if is_file and self.adapter:
            self.fail(f"'{text}' is a file; give the folder that holds adapter_config.json", param, ctx)
        if there and self.adapter and not (path / "adapter_config.json").is_file():
            self.fail(f"'{text}' holds no adapter_config.json; give a folder that PEFT saved", param, ctx)
        return text

    def _absent(self, text: str, why: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        kind, allowed = ("adapter", "a folder") if self.adapter else ("model", "a folder, a .gguf file, organism:NAME")
        self.fail(f"there is no {kind} '{text}'{why}; give {allowed} or a name on the hub", param, ctx)


def _why(error: Exception) -> str:
    """The system's reason, where it is not plainly that nothing is there."""
    if isinstance(error, FileNotFoundError):
        return ""
    return f" ({(error.strerror if isinstance(error, OSError) else None) or error})"


FILE, FOLDER, FILE_OR_FOLDER = _Existing("file"), _Existing("folder"), _Existing("file", "folder")
OUT_FILE, OUT_FOLDER = _Out("file"), _Out("folder")
MODEL, ADAPTER = _Model(adapter=False), _Model(adapter=True)
