"""Many calls of one function in other processes, one thread each: on this machine, or on a Ray cluster.

Results come as they are done. A process that dies, or hangs, costs what it was working on: that is tried again, in the
end alone, so that one bad task is told from the others; what was done stays done.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from graphopt.errors import GraphoptError

_BREAKS = 2  # of the pool, before what is left is tried task by task
_IDLE = 300  # seconds after which a process that nobody asks ends
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GRACE = 5.0  # seconds beyond a time-out, after which a process that does not hear is ended


class Work(Protocol):
    """What is done in every process. It is sent with every task, so it should be small: paths and the user's function.

    Attributes:
        key: digest of what `load` returns; loaded once in each process.
    """

    @property
    def key(self) -> str: ...

    def load(self) -> Callable[[Any], Any]:
        """Return the function that is called with each task."""


@dataclass(frozen=True)
class Lost:
    """The result of a task that no process lived to finish, with the reason."""

    reason: str


@dataclass(frozen=True)
class Pool:
    """Where tasks are done.

    Attributes:
        workers: processes; 1: in this one, unless `timeout` asks for another that can be stopped.
        cluster: "": this machine; "ray": the Ray cluster that this process is connected to, or else one of its own.
            What work names by path must lie where every node sees it.
        timeout: seconds that a task may take, once its process has loaded what it needs.
    """

    workers: int = 1
    cluster: Literal["", "ray"] = ""
    timeout: float | None = None

    def run(self, work: Work, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the index of each task with its result, as they are done.

        What the function raises is raised here, after which the other tasks are dropped. GraphoptError where a worker
        lacks a package, or there is no such cluster.
        """
        if self.workers == 1 and not self.cluster and self.timeout is None:
            yield from _here(work, tasks)
            return
        elsewhere = self._on_ray if self.cluster == "ray" else self._on_this_machine
        left, breaks = dict(enumerate(tasks)), 0
        while left and breaks < _BREAKS:
            try:
                for index, result in elsewhere(work, left, self.workers):
                    del left[index]
                    yield index, result
            except _broken():
                breaks += 1
            except ModuleNotFoundError as error:
                raise GraphoptError(
                    f"a worker lacks the package {error.name}; install there what is installed here"
                ) from error
        for index, task in list(left.items()):
            try:
                ((_, result),) = elsewhere(work, {index: task}, 1)
            except _broken():
                result = Lost("its process died; it may need more memory than there is")
            yield index, result

    def warm(self) -> None:
        """Start the processes of this machine while there is other work to do: that takes seconds."""
        if (self.workers > 1 or self.timeout is not None) and not self.cluster:
            executor = _executor(self.workers)
            for _ in range(self.workers):
                executor.submit(_started)

    def _on_this_machine(self, work: Work, tasks: Mapping[int, Any], workers: int) -> Iterator[tuple[int, Any]]:
        executor, left = _executor(workers), iter(list(tasks.items()))
        waiting: set[Any] = set()
        try:
            while True:
                # Few at a time: what waits in a process that dies is lost with it.
                for item in itertools.islice(left, 2 * workers - len(waiting)):
                    waiting.add(executor.submit(_call, work, *item, self.timeout))
                if not waiting:
                    return
                done, waiting = futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
                for each in sorted(done, key=lambda each: each.exception() is not None):  # what was done, first
                    yield each.result()
        finally:
            for each in waiting:
                each.cancel()

    def _on_ray(self, work: Work, tasks: Mapping[int, Any], workers: int) -> Iterator[tuple[int, Any]]:
        """joblib's backend for Ray returns all results or none, so this one asks Ray itself."""
        ray = _ray()
        call, shared = ray.remote(max_retries=0)(_call), ray.put(work)
        waiting: list[Any] = []
        left = iter(list(tasks.items()))
        try:
            while True:
                free = itertools.islice(left, workers - len(waiting))
                waiting += [call.remote(shared, *item, self.timeout) for item in free]
                if not waiting:
                    return
                done, waiting = ray.wait(waiting, num_returns=1)
                yield ray.get(done[0])
        finally:
            for each in waiting:
                ray.cancel(each, force=True)


def _executor(workers: int) -> Any:
    """Return joblib's processes, those of before where they are alive."""
    from joblib.externals.loky import get_reusable_executor

    return get_reusable_executor(max_workers=workers, timeout=_IDLE, env=dict.fromkeys(_THREADS, "1"))


def _started() -> None:
    """In a worker: import what tasks need, this module and torch with it."""
    from graphopt.pipeline import pass_classes

    pass_classes()


def _here(work: Work, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    call = work.load()
    for index, task in enumerate(tasks):
        with one_thread():
            result = call(task)
        yield index, result


def _ray() -> Any:
    """Return the module, connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise GraphoptError("a Ray cluster needs the package ray; pip install 'graphopt[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise GraphoptError(f"cannot connect to a Ray cluster: {error}; see `ray status`") from error
    return ray


@functools.cache
def _broken() -> tuple[type[BaseException], ...]:
    """What says that a process died."""
    from joblib.externals.loky.process_executor import BrokenProcessPool, TerminatedWorkerError

    known = [TerminatedWorkerError, BrokenProcessPool]
    with contextlib.suppress(ImportError):
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        known += [NodeDiedError, OutOfMemoryError, WorkerCrashedError]
    return tuple(known)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums come out alike whatever the number of processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_loaded: dict[str, Callable[[Any], Any]] = {}  # in a worker: what it was given last


def _call(work: Work, index: int, task: Any, timeout: float | None) -> tuple[int, Any]:
    torch.set_num_threads(1)
    if work.key not in _loaded:
        _loaded.clear()
        _loaded[work.key] = work.load()
    if timeout is None:
        return index, _loaded[work.key](task)
    try:
        with _deadline(timeout):
            return index, _loaded[work.key](task)
    except _Late:
        return index, Lost(f"it took longer than {timeout:g} s")


class _Late(BaseException):
    """No Exception: the user's function may catch these."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer; a process that is stuck where Python does not hear of it is ended."""

    def late(*_: Any) -> None:
        raise _Late

    watch = threading.Timer(seconds + _GRACE, os._exit, (1,))
    watch.daemon = True
    before = signal.signal(signal.SIGALRM, late)
    watch.start()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watch.cancel()
