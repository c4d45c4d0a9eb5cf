"""One writer per folder: two processes that record into one folder would double work, and pay twice for it.

The lock is the operating system's (`flock`, through filelock), so it ends with the process that holds it, however that
ends: a lock file that a killed process left behind blocks nobody. The file says who holds the lock, for people.

    with hold("runs/one", "tiltmeter eval"):
        ...
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

from filelock import FileLock, SoftFileLock, Timeout

from tiltmeter.errors import FolderInUse, StorageError

__all__ = ["LOCK", "FolderLock", "hold"]

LOCK = ".tiltmeter.lock"
_COMMAND_LENGTH = 80
_GRACE_SECONDS = 6.0  # a killed process' children (data loaders) notice its death within five seconds
_HERE: WeakValueDictionary[str, FolderLock] = WeakValueDictionary()


class FolderLock:
    """A folder that this process alone writes into, until `release`; made by `hold`."""

    def __init__(self, folder: Path, lock: FileLock, doing: str) -> None:
        self.folder = folder
        self.doing = doing
        self._lock = lock
        status = os.stat(folder / LOCK)
        self._file = (status.st_dev, status.st_ino)

    @property
    def held(self) -> bool:
        """Whether the lock still guards its folder; not so once the folder was deleted or exchanged."""
        try:
            status = os.stat(self.folder / LOCK)
        except OSError:
            return False
        return bool(self._lock.is_locked) and (status.st_dev, status.st_ino) == self._file

    def release(self) -> None:
        """Let others write."""
        self._lock.release(force=True)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold(folder: str | Path, doing: str, *, take_over: bool = False) -> FolderLock:
    """Become the one process that writes into a folder, which is made where it is missing.

    Args:
        folder: what is written into.
        doing: what this process does there, in a few words, for whoever comes second.
        take_over: where this very process holds it already, from work that was interrupted, the older hold ends.

    Raises:
        FolderInUse: somebody else writes into it.
        StorageError: the folder cannot be made or written.
    """
    target = Path(folder).absolute()
    try:
        target.mkdir(parents=True, exist_ok=True)
        key = os.path.realpath(target)
        mine = _HERE.get(key)
        if mine is not None and mine.held:
            if not take_over:
                raise FolderInUse(
                    f"{target} is in use by this process itself ({mine.doing}); end that first, or give another folder"
                )
            mine.release()
        found = FolderLock(target, _acquire(target), doing)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; check its permissions and the space left, or give "
            "another folder"
        ) from error
    if not isinstance(found._lock, SoftFileLock):  # whose file is its own
        _sign(target / LOCK, doing)
    _HERE[key] = found
    return found


def _acquire(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK, thread_local=False)
    give_up = time.monotonic() + _GRACE_SECONDS
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a file system without locks gets filelock's own kind
                lock.acquire(blocking=False)
            return lock
        except Timeout:
            holder = _holder(folder / LOCK)
            if _lives(holder) or time.monotonic() > give_up:
                raise FolderInUse(_sentence(folder, holder)) from None
            time.sleep(0.1)


def _sign(path: Path, doing: str) -> None:
    holder = {
        "pid": os.getpid(),
        "host": platform.node(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:_COMMAND_LENGTH],
        "doing": doing,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, without a name on it
        path.write_text(json.dumps(holder), encoding="utf-8", errors="replace")


def _holder(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace")[:4096])
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(holder: Mapping[str, Any]) -> bool:
    """Whether the process that signed is alive, as far as can be seen from here."""
    pid = holder.get("pid")
    if holder.get("host") != platform.node() or not isinstance(pid, int) or pid < 1:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sentence(folder: Path, holder: Mapping[str, Any]) -> str:
    if not holder:
        who = "by a process that did not leave its name"
    else:
        who = (
            f"by process {holder.get('pid')} on {holder.get('host')} ({str(holder.get('command'))[:_COMMAND_LENGTH]}; "
            f"{str(holder.get('doing'))[:40]}), since {holder.get('since')}"
        )
        if not _lives(holder):
            who += ", which has ended but whose child processes have not"
    return f"{folder} is in use {who}; wait for it to end, or give another folder"
