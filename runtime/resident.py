"""Anonymous memory of this process, as the system counts it: what it really holds, without the pages of files that it maps."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from deltaloom.runtime.model import Model

STATUS = Path("/proc/self/status")
INTERVAL = 0.005
"""Seconds between two looks."""


def anonymous() -> int:
    """RssAnon of this process in bytes, 0 where the system does not tell (it is not Linux)."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


class Peak:
    """The most anonymous memory while the context is open, in bytes: ``start`` at its beginning, ``most`` at any time."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.most = max(self.most, anonymous())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, anonymous())


@dataclass(frozen=True)
class Resident:
    """Bytes that a model took. ``held`` and ``mapped`` weights, ``states``, ``arenas``: as they were allocated. ``start``,
    ``loaded``, ``most``: anonymous memory before and after loading, and at most; 0 where the system does not tell."""

    held: int
    mapped: int
    states: int
    arenas: int
    start: int
    loaded: int
    most: int

    @property
    def over(self) -> float | None:
        """The peak over weights and states, as a fraction of them: 0.1 is a tenth more. None where the system does not tell."""
        needed = self.held + self.states
        return (self.most - self.start) / needed - 1 if self.most and needed else None


def measured(make: Callable[[], Model], *, batch: int, context: int) -> Resident:
    """Load a model, give each of ``batch`` sequences a prompt of ``context`` random tokens, decode one more, and watch the memory.

    Raises what ``make`` raises, and ``RequestError`` where the context does not fit the model's."""
    gc.collect()
    start = anonymous()
    with Peak() as peak:
        model = make()
        loaded = anonymous()
        generator = np.random.default_rng(0)
        state = model.new_state(batch)
        for count in (context, 1) if context else (1,):
            model.forward(generator.integers(0, model.config.vocab_size, (batch, count)), state=state, logits="last")
    store = model.main.store
    return Resident(store.held, store.mapped, state.nbytes, model.main.arenas.nbytes, start, loaded, peak.most)
