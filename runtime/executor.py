"""Runs the programs of one model graph: picks the variant, gathers weights, advances the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from deltaloom.graph.errors import RequestError, require
from deltaloom.graph.ir import Value
from deltaloom.graph.op import Array
from deltaloom.passes.driver import AnyVariant, Driver, Variant
from deltaloom.passes.emit import Program
from deltaloom.passes.kernel import Tensor
from deltaloom.runtime.arena import Arenas
from deltaloom.runtime.state import ModelState, StateLayout, state_layout
from deltaloom.runtime.weights import WeightStore

Runner = Callable[..., tuple[Tensor, ...]]
"""Called with a program and what its ``run`` takes; gives what that gives."""


class Executor:
    """Programs, weights and states of one model graph (the main model, or an MTP head)."""

    def __init__(self, driver: Driver, store: WeightStore, *, planned: tuple[str, ...]) -> None:
        """``planned``: outputs of the programs that decided weight layouts."""
        self.name = driver.name
        self.ctx = ctx = driver.ctx
        self.driver = driver
        self.store = store
        self._planned = planned
        self._backends = {backend.name: backend for backend in ctx.backends}
        self._weights: dict[AnyVariant, dict[str, tuple[Tensor, ...]]] = {}
        self._layout: StateLayout | None = None
        self.arenas = Arenas(ctx.backends[0])

    def load(self) -> None:
        """Evaluate every weight of the planned programs now instead of at the first call."""
        for decode in (False, True):
            self.bound(Variant(decode, False, self._planned))

    def new_state(self, batch: int) -> ModelState:
        """A state at length 0 for ``batch`` sequences."""
        program = self.driver.program(Variant(True, False, self._planned))
        return ModelState(batch, program.by_prefix(), self._backends)

    def program(self, variant: Variant) -> Program:
        """The compiled program of a variant."""
        return self.driver.program(variant)

    def run(
        self,
        inputs: Mapping[str, Array],
        state: ModelState,
        new_valid: Array | None,
        outputs: tuple[str, ...],
        *,
        through: Runner | None = None,
    ) -> dict[str, Array]:
        """One program call on ``n`` new tokens of every row: advances ``state`` and gives the outputs as host arrays.

        ``inputs``: by name, each ``[batch, n, …]``, positions and padding excepted, which follow from ``new_valid`` bool
        ``[batch, n]`` (None: all real) unless ``positions`` is given. ``through`` runs the program in another way than its code.
        """
        require(not state.broken, f"this state is unusable: {state.broken}; start from a new one or from a copy()", RequestError)
        self._require_own(state)
        count = next(iter(inputs.values())).shape[1]
        valid = _extend(state, new_valid, count)
        variant = Variant(count == 1, valid is not None, outputs)
        program, weights = self.bound(variant)
        given: dict[str, Array] = {**inputs}
        given.setdefault("positions", positions(valid, state.batch, state.length, count))
        if valid is not None:
            given["valid"] = valid
        home = self.ctx.backends[0]
        arguments = [home.from_host(_as_typed(given[value.name], value)) for value in program.graph.inputs]
        append = state.append(count)
        state.broken = "a call on it failed, was interrupted half-way or is still under way"
        if through is not None:
            program = replace(program, run=partial(through, program))
        results = self._call(variant, program, (*arguments, weights, state.fixed, append), state)
        state.length += count
        state.valid = valid
        state.broken = ""
        return {name: home.to_host(tensor) for name, tensor in zip(program.outputs, results, strict=True)}

    def _call(self, variant: Variant, program: Program, arguments: tuple[Any, ...], state: ModelState) -> tuple[Tensor, ...]:
        """Run a program, in an arena if it takes buffers; results never lie in it. Exponentials of activations may overflow:
        what follows from infinity is right, so no warning is due."""
        with np.errstate(over="ignore"):
            if program.memory is None:
                return program.run(*arguments)
            arena = self.arenas.take(program, variant, {"batch": state.batch, "past": state.capacity})
            results = program.run(*arguments, arena.buffers)
        self.arenas.give(arena)
        return results

    def _require_own(self, state: ModelState) -> None:
        """Refuse a state whose tensors these programs cannot use: of another model, head, backend or dtype."""
        if self._layout is None:
            self._layout = state_layout(self.driver.program(Variant(True, False, self._planned)).by_prefix())
        if state.layout is self._layout:
            return
        require(
            state.layout == self._layout,
            f"this state belongs to another model, head, backend or dtype than {self.name} here; take one from its new_state()",
            RequestError,
        )
        state.layout = self._layout

    def bound(self, variant: AnyVariant) -> tuple[Program, dict[str, tuple[Tensor, ...]]]:
        """The compiled program of a variant, and its weights by call prefix, in the order of its signatures."""
        program = self.driver.program(variant)
        if variant not in self._weights:
            self._weights[variant] = {
                instance.prefix: tuple(
                    self.store.get(self.name, instance.prefix, instance.graph, slot)
                    for slot in program.signatures[program.function(instance.graph)].weights
                )
                for instance in program.graph.instances()
            }
        return program, self._weights[variant]


def _as_typed(array: Array, value: Value) -> Array:
    """``array`` in the dtype that the graph input has."""
    return array.astype(value.type.plain_dtype.numpy, copy=False)


def _extend(state: ModelState, new_valid: Array | None, count: int) -> Array | None:
    """The padding mask with ``count`` more columns; None while every row is real throughout."""
    if state.valid is None and (new_valid is None or new_valid.all()):
        return None
    before = np.ones((state.batch, state.length), bool) if state.valid is None else state.valid
    new = np.ones((state.batch, count), bool) if new_valid is None else new_valid
    return np.concatenate([before, new], axis=1)


def positions(valid: Array | None, batch: int, past: int, count: int) -> Array:
    """int64 ``[batch, count]``: the number of real tokens before each, as the specification (section 5.8) has it."""
    if valid is None:
        return np.broadcast_to(np.arange(past, past + count, dtype=np.int64), (batch, count))
    before = valid[:, :-count].sum(axis=1, dtype=np.int64)
    found: Array = np.maximum(before[:, None] + np.cumsum(valid[:, -count:], axis=1, dtype=np.int64) - 1, 0)
    return found


def describe(value: Any) -> str:
    """A value's type and shape for error messages."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {list(shape)}"
