"""Threads of the NumPy backend: a small pool above a single-threaded BLAS.

Why not BLAS's own threads: its workers spin between calls and split every product, however small; a program knows better what
is independent (halves of output columns, experts, key heads). Measured on two cores: prefill 1.8 to 1.9 times one thread.

The number of threads belongs to the *process*, because BLAS's own number does: ``use_threads(n)`` sets BLAS to one thread and
the pool to ``n``, and the last call wins, whichever model made it. Where BLAS cannot be told (it is not OpenBLAS), it
keeps its own threads and the pool stays at one, so that the two never multiply.

One pool works for one caller at a time: if two threads of the process run programs at once, the second finds the pool taken and
does its work alone. So there is never a wait for the pool, no deadlock from a nested call and no more running threads than
cores were asked for plus the callers that run alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from deltaloom.graph.errors import ConfigError

Item = TypeVar("Item")

SWITCH_INTERVAL = 1e-5
"""Seconds until a thread that waits for the interpreter gets it, while a pool works (Python's default of 5 ms is as long as a
whole decode step)."""


class Pool:
    """``n`` threads that work together: the caller and ``n - 1`` workers, which are started when first needed."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ConfigError(f"threads is {n}; it must be 1 or more")
        self.n = n
        self._busy = threading.Lock()
        self._workers: list[_Worker] = []

    def map(self, run: Callable[[Item], object], items: Iterable[Item]) -> None:
        """Call ``run`` on every item, each on whichever thread is free next; returns when all are done, and raises the first
        error. Results go into arrays that ``run`` writes; two items must not write the same place."""
        work = deque(items)
        if self.n == 1 or len(work) < 2 or not self._busy.acquire(blocking=False):
            while work:
                run(work.popleft())
            return
        errors: list[BaseException] = []
        interval = sys.getswitchinterval()
        try:
            sys.setswitchinterval(SWITCH_INTERVAL)
            workers = self._started(min(self.n, len(work)) - 1)

            def drain() -> None:
                try:
                    while True:
                        try:
                            item = work.popleft()
                        except IndexError:
                            return
                        run(item)
                except BaseException as error:
                    errors.append(error)
                    work.clear()

            for worker in workers:
                worker.start(drain)
            drain()
            for worker in workers:
                worker.wait()
        except BaseException:
            # Interrupted (Ctrl-C) while workers run: they finish what they hold and go; the next call starts others.
            work.clear()
            for worker in self._workers:
                worker.retired = True
            self._workers = []
            raise
        finally:
            sys.setswitchinterval(interval)
            self._busy.release()
        if errors:
            raise errors[0]

    def _started(self, count: int) -> Sequence[_Worker]:
        while len(self._workers) < count:
            self._workers.append(_Worker())
        return self._workers[:count]


class _Worker:
    """A daemon thread that sleeps on a lock until it gets a task."""

    def __init__(self) -> None:
        self.retired = False
        self._task: Callable[[], None] | None = None
        self._go = threading.Lock()
        self._done = threading.Lock()
        self._go.acquire()
        self._done.acquire()
        threading.Thread(target=self._loop, name="deltaloom-numpy", daemon=True).start()

    def start(self, task: Callable[[], None]) -> None:
        self._task = task
        self._go.release()

    def wait(self) -> None:
        self._done.acquire()

    def _loop(self) -> None:
        np.seterr(all="ignore")
        while not self.retired:
            self._go.acquire()
            if self._task is not None:
                self._task()
            self._task = None
            self._done.release()


def slices(length: int, count: int, unit: int = 1) -> list[slice]:
    """``length`` cut into at most ``count`` nearly equal slices with borders at multiples of ``unit``."""
    units = -(-length // unit)
    count = max(1, min(count, units))
    borders = [units * i // count * unit for i in range(count)] + [length]
    return [slice(a, b) for a, b in zip(borders, borders[1:])]


_pool = Pool(1)
_alone = Pool(1)


def pool() -> Pool:
    """The pool of the process."""
    return _pool


def team(worth: bool) -> Pool:
    """The pool of the process for work that is worth handing over, else the caller alone."""
    return _pool if worth else _alone


def share(run: Callable[[slice], object], length: int, *, worth: bool) -> None:
    """``run`` over ``length`` at once on the caller's thread, or, if it is ``worth`` it, in equal slices over the pool."""
    if worth and _pool.n > 1:
        _pool.map(run, slices(length, _pool.n))
    else:
        run(slice(0, length))


def use_threads(n: int | None) -> Pool:
    """Make the process compute with ``n`` threads (None: one a core that this process may use, at most 8) and return its pool.
    ``ConfigError`` for a number below 1."""
    global _pool
    wanted = n if n is not None else min(cores(), 8)
    found = _pool if _pool.n == wanted else Pool(wanted)
    _pool = found if single_threaded_blas() else Pool(1)
    return _pool


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def single_threaded_blas() -> bool:
    """Set NumPy's OpenBLAS to one thread; False where NumPy uses another BLAS, which is then left as it is."""
    for path in _openblas_files():
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            setter = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
            if setter is not None:
                setter(ctypes.c_int(1))
                return True
    return False


def _openblas_files() -> list[Path]:
    """NumPy's bundled OpenBLAS, or else one that the process has mapped (a distribution's)."""
    home = Path(np.__file__).parent
    folders = (home.parent / "numpy.libs", home / ".dylibs", home / ".libs")
    bundled = [path for folder in folders for path in folder.glob("*openblas*")]
    if bundled or not os.path.exists("/proc/self/maps"):
        return bundled
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return sorted({Path(line.split(maxsplit=5)[5].strip()) for line in maps if "openblas" in line or "libblas" in line})


def _forget() -> None:
    """A forked child has no worker threads: it starts with a pool of its own."""
    global _pool
    _pool = Pool(_pool.n)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
