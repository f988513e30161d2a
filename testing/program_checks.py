"""Whole programs on a backend: a small hybrid model against the interpreter in float64, its states from call to call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from deltaloom.backends import backend as named_backend
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array, Draw
from deltaloom.graph.types import DType, f32, f64
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Driver, plain_variants
from deltaloom.passes.kernel import Backend
from deltaloom.passes.pipeline import Context
from deltaloom.runtime.compile import CompiledModel
from deltaloom.runtime.executor import Executor
from deltaloom.runtime.state import ModelState
from deltaloom.testing.measure import assert_close
from deltaloom.testing.suite import Check
from deltaloom.testing.toy_models import DENSE, HYBRID, Oracle, random_weights, toy_graph

OUTPUT = "logits"
LAYERS = 3
"""Layers of the small model."""
ON_NUMPY = ("linear", "gated_delta_rule", "attention", "swiglu", "packed_swiglu", "add_rms_norm")
"""Ops that the mixed program runs on NumPy."""


class Programs:
    """The checks of ``backend`` with the small model computing in ``dtype``; programs are compiled when first needed."""

    def __init__(self, subject: str, backend: Backend, dtype: DType) -> None:
        self._subject = subject
        self._backend = backend
        self._dtype = dtype

    def checks(self) -> Iterator[Check]:
        for name, feature, run in (
            ("prefill", "", self._prefill),
            ("decode", "states", self._decode),
            ("chunks", "states", self._chunks),
            ("padding", "states", self._padding),
            ("copies of states", "states", self._copies),
        ):
            yield Check(self._subject, f"{name}, {self._dtype.long_name}", run, feature)
        if self._dtype in (f32, f64):  # those that NumPy computes in
            yield Check(self._subject, "mixed with numpy", self._mixed, "mixed", self._backend.name != "numpy")

    @cached_property
    def _config(self) -> Mapping[str, object]:
        return HYBRID if self._dtype in (f32, f64) else DENSE

    @cached_property
    def _graph(self) -> Graph:
        return toy_graph(self._config, self._dtype)

    @cached_property
    def _exact(self) -> Graph:
        return toy_graph(self._config, f64)

    @cached_property
    def _weights(self) -> dict[str, Array]:
        return random_weights(self._graph)

    @cached_property
    def _alone(self) -> Executor:
        return self._executor((self._backend,))

    @cached_property
    def _with_numpy(self) -> Executor:
        return self._executor((self._backend, named_backend("numpy", threads=1)))

    def _executor(self, backends: Sequence[Backend]) -> Executor:
        names = tuple(backend.name for backend in backends)
        kernels = dict.fromkeys(ON_NUMPY, names[::-1]) if len(names) > 1 else {}
        device = self._backend.device
        config = CompileConfig(names, dtype=self._dtype.long_name, device=device, threads=1, kernels=kernels)
        driver = Driver(self._graph, Context(config, tuple(backends)), planned=plain_variants((OUTPUT,)))
        return CompiledModel(self._graph, driver, outputs=(OUTPUT,)).bind(self._weights)

    def _pair(self, batch: int) -> tuple[Oracle, Oracle]:
        """The truth in float64, and what the definition gives in the dtype under test."""
        return Oracle(self._exact, self._weights, batch), Oracle(self._graph, self._weights, batch)

    def _step(self, executor: Executor, state: ModelState, pair: tuple[Oracle, Oracle], ids: Array, what: str) -> None:
        """One call of the program and of both oracles, whose logits must agree."""
        found = executor.run({"token_ids": ids}, state, None, (OUTPUT,))[OUTPUT]
        truth, rounded = (oracle.run(ids)[OUTPUT] for oracle in pair)
        assert_close(f"{OUTPUT} of {self._backend.name}, {what}", np.asarray(found), truth, rounded, depth=LAYERS)

    def _same_states(self, state: ModelState, pair: tuple[Oracle, Oracle], what: str) -> None:
        for name, array in state.arrays().items():
            title = f"state {name} of {self._backend.name}, {what}"
            assert_close(title, array, pair[0].states[name], pair[1].states[name], depth=LAYERS)

    def _prefill(self, draw: Draw) -> None:
        """Some tokens in one call."""
        batch, count = draw.integer(1, 3), draw.choice(1, 2, 5, 9)
        pair, state = self._pair(batch), self._alone.new_state(batch)
        self._step(self._alone, state, pair, _tokens(draw, batch, count), f"prefill of {count} tokens")

    def _decode(self, draw: Draw) -> None:
        """A prompt, then token by token; the states are compared after each call."""
        self._run_in_calls(self._alone, draw, [draw.choice(1, 3, 6), 1, 1, 1])

    def _chunks(self, draw: Draw) -> None:
        """A prompt in pieces of any sizes."""
        self._run_in_calls(self._alone, draw, [draw.integer(1, 4) for _ in range(draw.integer(2, 4))])

    def _mixed(self, draw: Draw) -> None:
        """Some ops run on NumPy, with copies in between."""
        self._run_in_calls(self._with_numpy, draw, [draw.choice(2, 5), 1, 1])

    def _run_in_calls(self, executor: Executor, draw: Draw, counts: Sequence[int]) -> None:
        batch = draw.integer(1, 2)
        pair, state = self._pair(batch), executor.new_state(batch)
        for number, count in enumerate(counts):
            what = f"call {number} of {counts} tokens"
            self._step(executor, state, pair, _tokens(draw, batch, count), what)
            self._same_states(state, pair, what)

    def _padding(self, draw: Draw) -> None:
        """A row with padding on its left gives what it gives alone, at once and at the next token."""
        short, width = draw.integer(1, 4), draw.integer(5, 7)
        ids, following = _tokens(draw, 2, width), _tokens(draw, 2, 1)
        mask = np.ones((2, width), bool)
        mask[1, : width - short] = False
        state = self._alone.new_state(2)
        first = self._alone.run({"token_ids": ids}, state, mask, (OUTPUT,))[OUTPUT]
        second = self._alone.run({"token_ids": following}, state, np.ones((2, 1), bool), (OUTPUT,))[OUTPUT]
        pair = self._pair(1)
        for part, found in ((ids[1:, width - short :], first[1:, width - short :]), (following[1:], second[1:])):
            truth, rounded = (oracle.run(part)[OUTPUT] for oracle in pair)
            assert_close(f"{OUTPUT} of a padded row on {self._backend.name}", np.asarray(found), truth, rounded, depth=LAYERS)

    def _copies(self, draw: Draw) -> None:
        """A copy of a state goes on as the state would have gone on, whatever becomes of the state."""
        pair, state = self._pair(1), self._alone.new_state(1)
        self._step(self._alone, state, pair, _tokens(draw, 1, draw.choice(2, 5)), "before a copy")
        kept = state.copy()
        for _ in range(2):
            self._alone.run({"token_ids": _tokens(draw, 1, 1)}, state, None, (OUTPUT,))
        self._same_states(kept, pair, "kept as a copy")
        self._step(self._alone, kept, pair, _tokens(draw, 1, 1), "from a copy of the state")


def _tokens(draw: Draw, batch: int, count: int) -> Array:
    size = HYBRID["vocab_size"]
    assert isinstance(size, int)
    return draw.integers(0, size - 1, batch, count)
