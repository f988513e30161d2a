"""Compiled programs of one NumPy backend, run on random weights and states: no checkpoint is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deltaloom.graph.op import Array
from deltaloom.graph.types import TensorType
from deltaloom.passes.emit import Program
from deltaloom.passes.kernel import Backend
from deltaloom.runtime.executor import positions
from deltaloom.runtime.state import ModelState

ROOM = 64
"""Tokens that a state has room for behind its length, so that a memory plan holds for some steps."""

SCALE = 0.05
"""Standard deviation of random weights: sums over some hundred of them stay near 1."""


class RandomRun:
    """A decode program with random weights and a state of ``length`` tokens; ``step`` runs one more."""

    def __init__(self, program: Program, home: Backend, *, batch: int, length: int, seed: int = 0) -> None:
        self.program = program
        self._rng = np.random.default_rng(seed)
        signatures = program.by_prefix()
        self.weights = {
            prefix: tuple(_stored(self._numbers(slot.value.type), slot.axes) for slot in signature.weights)
            for prefix, signature in signatures.items()
        }
        self.state = ModelState(batch, signatures, {home.name: home})
        self.state.append(length + ROOM)
        self.state.length = length
        for prefix, tensors in self.state.fixed.items():
            self.state.fixed[prefix] = tuple(self._fill(tensor) for tensor in tensors)
        for buffers in self.state.buffers.values():
            for buffer in buffers:
                self._fill(buffer.data)

    @property
    def sizes(self) -> dict[str, int]:
        """What a memory plan of the program needs to know."""
        return {"batch": self.state.batch, "past": self.state.capacity}

    def step(self, buffers: Mapping[str, tuple[Any, ...]] | None = None) -> tuple[Array, ...]:
        """One token for every row; ``buffers`` for a program that takes them."""
        state = self.state
        given: dict[str, Callable[[], Array]] = {
            "token_ids": lambda: self._rng.integers(0, 2, (state.batch, 1)),
            "positions": lambda: positions(None, state.batch, state.length, 1),
            "valid": lambda: np.ones((state.batch, state.length + 1), bool),
        }
        arguments = [given[value.name]() for value in self.program.graph.inputs]
        extra = () if buffers is None else (buffers,)
        results = self.program.run(*arguments, self.weights, state.fixed, state.append(1), *extra)
        state.length += 1
        return results

    def _numbers(self, type_: TensorType) -> Array:
        return self._rng.standard_normal(type_.static_shape(), np.float32).astype(type_.plain_dtype.numpy) * np.float32(SCALE)

    def _fill(self, array: Array) -> Array:
        array[...] = self._rng.standard_normal(array.shape) * SCALE
        return array


def _stored(array: Array, axes: tuple[int, ...]) -> Array:
    return np.ascontiguousarray(array.transpose(axes)) if axes else array
