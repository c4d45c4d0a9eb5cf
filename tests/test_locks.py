"""One writer per folder: refused with the holder's name while it lives, free the moment it is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiltmeter.errors import FolderInUse, StorageError
from tiltmeter.locks import LOCK, hold

HOLD = """
import os, sys, time
from tiltmeter.locks import hold
lock = hold({folder!r}, "a test")
if {forking}:
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path, *, forking: bool = False) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    program = HOLD.format(folder=str(folder), forking=forking)
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def end(other: subprocess.Popen[str]) -> None:
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert other.stdout is not None
    other.stdout.close()


def test_a_second_process_is_refused_with_the_holders_name_until_the_first_is_killed(tmp_path: Path) -> None:
    other = holder(tmp_path / "run")
    try:
        with pytest.raises(FolderInUse) as refused:
            hold(tmp_path / "run", "another test")
        said = str(refused.value)
        for part in (str(other.pid), os.uname().nodename, "a test", "since 20", "-c", "give another folder"):
            assert part in said
    finally:
        end(other)
    with hold(tmp_path / "run", "another test") as lock:  # the lock file is still there, and blocks nobody
        assert lock.held
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_children_of_a_killed_process_do_not_keep_its_folder(tmp_path: Path) -> None:
    other = holder(tmp_path, forking=True)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    try:
        began = time.monotonic()
        hold(tmp_path, "a resumed run").release()
        assert time.monotonic() - began < 5
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        assert other.stdout is not None
        other.stdout.close()


@pytest.mark.parametrize("content", ["", "{", '{"pid": "x"}', '{"pid": 999999999999999999999}', "[1]", "\x00"])
def test_whatever_stands_in_a_lock_file_it_blocks_nobody_by_standing_there(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    hold(tmp_path, "a test").release()


def test_this_process_itself_is_refused_twice_unless_it_takes_over(tmp_path: Path) -> None:
    first = hold(tmp_path, "an interrupted run")
    with pytest.raises(FolderInUse, match="this process itself"):
        hold(tmp_path / ".", "again")
    second = hold(tmp_path, "again", take_over=True)
    assert (first.held, second.held) == (False, True)
    second.release()
    hold(tmp_path, "later").release()


def test_a_hold_that_was_dropped_ends(tmp_path: Path) -> None:
    hold(tmp_path, "dropped")
    hold(tmp_path, "next").release()


def test_a_deleted_folder_is_held_no_more(tmp_path: Path) -> None:
    import shutil

    lock = hold(tmp_path / "run", "a test")
    shutil.rmtree(tmp_path / "run")
    assert not lock.held
    with hold(tmp_path / "run", "another", take_over=True) as second:
        assert second.held
        assert not lock.held


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        hold(tmp_path / "file" / "run", "a test")
