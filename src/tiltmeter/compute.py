"""Run one function over many items: in this process, in worker processes, or on Ray.

Results come back in the order of the items, whatever order they finish in. The first failure cancels what has
not begun and is raised here, as the exception that the job raised; Ctrl-C does the same and ends the workers
at once. Workers are spawned, not forked (a forked process inherits the locks of torch's threads), so the
function must be importable and a script that calls this needs the usual `if __name__ == "__main__":` guard.
The cores are divided among the workers: without that, each worker's torch starts a thread per core and all of
them wait for each other.

It knows nothing of models. Loading a model once per worker is the job function's business.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from pickle import PicklingError
from typing import Any, Literal, NamedTuple, TypeVar

from tiltmeter.errors import InputError, TiltmeterError, require

__all__ = ["JobError", "map_jobs"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int, str], None]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_END_SECONDS = 5.0


class JobError(TiltmeterError, RuntimeError):
    """A job was lost: its worker died, or its own exception cannot travel between processes."""


class _Done(NamedTuple):
    job: int
    result: Any


def map_jobs(
    fn: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    executor: Literal["local", "serial", "ray"] = "local",
    workers: int | None = None,
    progress: Progress | None = None,
    on_result: Callable[[int, Result], None] | None = None,
) -> list[Result]:
    """Apply `fn` to every item.

    Args:
        fn: a function that worker processes can import (not a lambda or a closure, except with "serial").
        items: what to apply it to; each must pickle, except with "serial".
        executor: "serial" here and now; "local" in worker processes; "ray" on the Ray cluster that is
            connected, or on one started on this machine.
        workers: at most this many jobs at a time; by default one per core ("ray": as many as the cluster
            takes).
        progress: called as (done, total, label) after each job, in this process.
        on_result: called as (index of the item, result) as soon as a job is done, in this process, in the
            order in which jobs finish: the place to write a record, so that an interrupted map loses nothing
            done.

    Returns:
        One result per item, in the order of the items.

    Raises:
        InputError: unknown executor, a number of workers below one, or a function that cannot be sent.
        MissingExtra: "ray" without Ray installed.
        JobError: a worker died (often: out of memory), or the job's own exception cannot be sent.
        Exception: whatever `fn` raised, for the first job that failed, with a note that names the item.
    """
    if executor not in ("local", "serial", "ray"):
        raise InputError(f"executor is {executor!r}; it must be 'local', 'serial' or 'ray'")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; it must be at least 1, or None for one per core")
    if executor == "ray":
        require("ray", extra="ray")
    if not items:
        return []
    if executor == "serial":
        finished = _serial(fn, items)
    else:
        _check_sendable(fn)
        run = _local if executor == "local" else _ray
        finished = run(fn, items, workers)
    results: dict[int, Result] = {}
    with ExitStack() as stack:
        stack.callback(finished.close)  # ends the workers when a callback below raises
        for done in finished:
            results[done.job] = done.result
            if on_result is not None:
                on_result(done.job, done.result)
            if progress is not None:
                progress(len(results), len(items), f"job {done.job + 1} of {len(items)} done")
    return [results[index] for index in range(len(items))]


def _serial(fn: Callable[[Item], Result], items: Sequence[Item]) -> Generator[_Done, None, None]:
    for index, item in enumerate(items):
        with _naming(index, len(items)):
            result = fn(item)
        yield _Done(index, result)


def _local(fn: Callable[[Item], Result], items: Sequence[Item], workers: int | None) -> Generator[_Done, None, None]:
    cores = _cores()
    count = min(workers or cores, len(items))
    context = _RecordingContext()
    threads = max(1, cores // count)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(threads,))
    complete = False
    try:
        futures: dict[Future[Result], int] = {pool.submit(_call, fn, item): i for i, item in enumerate(items)}
        for future in as_completed(futures):
            index = futures[future]
            with _naming(index, len(items)):
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise JobError(
                        f"a worker process died before its job was done ({error}); often memory ran out: use "
                        f"fewer workers (there were {count}), or executor='serial' to see the failure here"
                    ) from error
            yield _Done(index, result)
        complete = True
    finally:
        if complete:
            pool.shutdown()
        else:
            context.end_workers()
            pool.shutdown(wait=True, cancel_futures=True)


def _ray(fn: Callable[[Item], Result], items: Sequence[Item], workers: int | None) -> Generator[_Done, None, None]:
    ray: Any = require("ray", extra="ray")
    if not ray.is_initialized():
        # Workers on this machine find what this process can import; on a cluster that is its owner's
        # business.
        paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
        ray.init(include_dashboard=False, log_to_driver=False, runtime_env=paths)
    job = ray.remote(max_retries=0)(_call)
    waiting = list(enumerate(items))[::-1]
    running: dict[Any, int] = {}
    complete = False
    try:
        while waiting or running:
            while waiting and len(running) < (workers or len(items)):
                index, item = waiting.pop()
                running[job.remote(fn, item)] = index
            ready, _ = ray.wait(list(running), num_returns=1)
            index = running.pop(ready[0])
            with _naming(index, len(items)):
                result = _ray_result(ray, ready[0])
            yield _Done(index, result)
        complete = True
    finally:
        if not complete:
            for reference in running:
                ray.cancel(reference, force=True)


def _ray_result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception) and not isinstance(error.cause, ray.exceptions.RayError):
            raise error.cause from None
        raise JobError(f"a Ray task failed outside the job itself: {error}") from error
    except ray.exceptions.RayError as error:
        raise JobError(
            f"a Ray worker was lost before its job was done ({error}); often memory ran out: use fewer workers"
        ) from error


class _RecordingContext(SpawnContext):
    """Spawns processes and remembers them, so that a cancelled map can end the jobs that are running."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        process = SpawnProcess(*args, **kwargs)
        self._started.append(process)
        return process

    def end_workers(self) -> None:
        for process in self._started:
            if process.is_alive():
                process.terminate()
        for process in self._started:
            process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _start_worker(threads: int) -> None:
    # Ctrl-C reaches the whole process group; the parent decides, or every worker prints a traceback of its
    # own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(threads)
    # The caller's main module, imported again here, may have loaded torch before this line.
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job forever, with its memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _call(fn: Callable[[Item], Result], item: Item) -> Result:
    try:
        return fn(item)
    except Exception as error:
        if _travels(error):
            raise
        trace = "".join(traceback.format_exception(error))
        raise JobError(
            f"the job raised {type(error).__name__}: {error}, an exception that cannot be sent between "
            f"processes; its trace was:\n{trace}"
        ) from None


def _travels(error: Exception) -> bool:
    # An exception whose __init__ wants other arguments pickles, and then breaks the whole pool when it is
    # read.
    try:
        return type(ForkingPickler.loads(ForkingPickler.dumps(error))) is type(error)
    except Exception:  # noqa: BLE001 - a foreign exception's own code runs here; any failure of it means "no"
        return False


def _check_sendable(fn: Callable[..., Any]) -> None:
    try:
        ForkingPickler.dumps(fn)
    except (AttributeError, TypeError, ValueError, PicklingError) as error:
        raise InputError(
            f"{fn!r} cannot be sent to a worker process ({error}); use a function defined at the top of a "
            "module, or executor='serial'"
        ) from error


@contextmanager
def _naming(index: int, total: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"while running job {index + 1} of {total}")
        raise


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use, not those of the machine
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
