"""Mapping a function over items: order, failures, Ctrl-C, threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiltmeter.compute import JobError, map_jobs
from tiltmeter.errors import InputError, LayerError, MissingExtra

EXECUTORS = ["serial", "local"]


class OddError(Exception):
    """Pickles, but cannot be rebuilt from its own arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def later_is_faster(item: int) -> int:
    time.sleep(0.3 if item == 0 else 0.0)
    return item * item


def fail_on_two(item: int) -> int:
    if item == 2:
        raise LayerError("layer 40 asked for; the model has 0 to 29; choose one of these")
    return item


def fail_oddly(item: int) -> int:
    raise OddError("this", "that")


def die(item: int) -> int:
    os._exit(3)


def environment(item: int) -> dict[str, str | None]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: os.environ.get(name) for name in names} | {"pid": str(os.getpid())}


def torch_threads(item: int) -> int:
    import torch

    return torch.get_num_threads()


def mark_then_wait(job: tuple[str, float]) -> None:
    folder, seconds = job
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(seconds)


def mark(path: str) -> str:
    Path(path).touch()
    time.sleep(0.05)
    if path.endswith("-0"):
        raise ValueError("the first one fails")
    return path


@pytest.mark.parametrize("executor", EXECUTORS)
def test_results_come_in_the_order_of_the_items(executor: str) -> None:
    assert map_jobs(later_is_faster, [0, 1, 2, 3], executor=executor, workers=2) == [0, 1, 4, 9]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_progress_counts_up_to_the_total_and_each_result_is_handed_over_with_its_index(executor: str) -> None:
    counts: list[tuple[int, int]] = []
    handed: dict[int, int] = {}
    map_jobs(
        later_is_faster,
        [3, 1, 2],
        executor=executor,
        workers=2,
        progress=lambda done, total, label: counts.append((done, total)),
        on_result=lambda index, result: handed.update({index: result}),
    )
    assert counts == [(1, 3), (2, 3), (3, 3)]
    assert handed == {0: 9, 1: 1, 2: 4}


def test_results_are_handed_over_as_they_finish() -> None:
    order: list[int] = []
    map_jobs(later_is_faster, [0, 1, 2], workers=2, on_result=lambda index, _: order.append(index))
    assert order[-1] == 0


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_jobs_own_error_arrives_with_its_message_and_the_job_named(executor: str) -> None:
    with pytest.raises(LayerError, match="layer 40 asked for") as caught:
        map_jobs(fail_on_two, [0, 1, 2], executor=executor, workers=1)
    assert "while running job 3 of 3" in caught.value.__notes__


def test_an_error_that_cannot_travel_is_reported_and_breaks_nothing() -> None:
    with pytest.raises(JobError, match="OddError: this and that") as caught:
        map_jobs(fail_oddly, [0], workers=1)
    assert "fail_oddly" in str(caught.value)  # the trace names where it was raised


def test_a_worker_that_dies_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(JobError, match=r"worker process died.*fewer workers \(there were 1\)"):
        map_jobs(die, [0], workers=1)


def test_the_first_failure_cancels_what_has_not_begun(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"job-{n}") for n in range(200)]
    with pytest.raises(ValueError, match="the first one fails"):
        map_jobs(mark, paths, workers=1)
    assert len(list(tmp_path.iterdir())) < 100


def test_cores_are_divided_among_the_workers() -> None:
    cores = len(os.sched_getaffinity(0))
    here = os.environ.get("OMP_NUM_THREADS")
    for workers in (1, 2):
        found = map_jobs(environment, [0, 1], workers=workers)
        for row in found:
            assert row.pop("pid") != str(os.getpid())
            assert set(row.values()) == {str(max(1, cores // workers))}
    assert os.environ.get("OMP_NUM_THREADS") == here


def test_torch_in_a_worker_obeys_its_share_of_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert map_jobs(torch_threads, [0], workers=1) == [cores]


def test_the_serial_executor_takes_any_callable_and_stays_in_this_process() -> None:
    assert map_jobs(lambda _: os.getpid(), [0, 1], executor="serial") == [os.getpid()] * 2


def test_a_function_that_cannot_be_sent_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=r"cannot be sent to a worker process .*executor='serial'"):
        map_jobs(lambda item: item, [0])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_nothing_to_do_is_an_empty_list(executor: str) -> None:
    assert map_jobs(later_is_faster, [], executor=executor) == []


def test_unknown_executors_and_worker_counts_are_refused() -> None:
    with pytest.raises(InputError, match="'cloud'; it must be 'local', 'serial' or 'ray'"):
        map_jobs(later_is_faster, [1], executor="cloud")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="workers is 0"):
        map_jobs(later_is_faster, [1], workers=0)


def test_ray_without_ray_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tiltmeter\[ray\]'"):
        map_jobs(later_is_faster, [1], executor="ray")


def test_ray_gives_the_same_results_and_errors_as_the_other_executors() -> None:
    ray = pytest.importorskip("ray", reason="the ray extra is not installed")
    try:
        assert map_jobs(later_is_faster, [0, 1, 2, 3], executor="ray", workers=2) == [0, 1, 4, 9]
        with pytest.raises(LayerError, match="layer 40 asked for"):
            map_jobs(fail_on_two, [0, 1, 2], executor="ray")
        with pytest.raises(JobError, match="worker was lost"):
            map_jobs(die, [0], executor="ray")
    finally:
        ray.shutdown()


def test_an_error_in_a_callback_ends_the_workers(tmp_path: Path) -> None:
    def refuse(index: int, result: object) -> None:
        raise InputError("stop here")

    started = time.monotonic()
    with pytest.raises(InputError, match="stop here"):
        map_jobs(later_is_faster, [1] * 500, workers=2, on_result=refuse)
    assert time.monotonic() - started < 30


SCRIPT = (
    "import json, signal, sys\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where a shell started the tests behind
    f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    "from test_compute import mark_then_wait\n"
    "from tiltmeter.compute import map_jobs\n"
    "if __name__ == '__main__':\n"
    "    try:\n"
    "        map_jobs(mark_then_wait, [(sys.argv[1], 60), (sys.argv[1], 1)], workers=2)\n"
    "    except KeyboardInterrupt:\n"
    "        print(json.dumps('interrupted'))\n"
)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process with two workers, one in its job and one waiting for one."""
    script, folder = tmp_path / "script.py", tmp_path / "marks"
    script.write_text(SCRIPT)
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(entry.name) for entry in folder.iterdir()]
    assert len(workers) == 2
    time.sleep(2)  # now one worker is in its job and the other waits for one
    yield process, workers
    process.kill()
    process.communicate()


def gone(pid: int) -> bool:
    """Whether a process has ended; one that waits to be reaped has."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_ctrl_c_ends_the_workers_at_once_and_is_raised(busy: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = busy
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
    out, err = process.communicate(timeout=30)
    assert json.loads(out) == "interrupted"
    assert "Traceback" not in err
    assert all(map(gone, workers))


def test_workers_do_not_outlive_a_process_that_was_killed(busy: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = busy
    process.kill()
    deadline = time.monotonic() + 20
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, workers))
