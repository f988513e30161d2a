"""Times recorded decode steps of any config on random weights, which the device draws by itself, so that no checkpoint is
needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from deltaloom.graph.errors import CompileError, ConfigError, require
from deltaloom.models.inventory import checkpoint_tensors
from deltaloom.passes.driver import Driver
from deltaloom.passes.emit import Program
from deltaloom.passes.serving_layout import BLOCK_SIZE, ServingVariant
from deltaloom.runtime.device_profile import DeviceProfile
from deltaloom.runtime.pools import StatePools
from deltaloom.runtime.recorded import RecordsSteps
from deltaloom.runtime.roofline import Step, predict
from deltaloom.runtime.subject import OUTPUTS, Subject

WARM = 5
"""Steps before those that are timed."""


@runtime_checkable
class DrawsWeights(Protocol):
    """A backend that makes weights and states of its own, for measurements."""

    def random_weights(self, program: Program, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, tuple[Any, ...]]:
        """The weights of a program by call prefix, of checkpoint tensors of these shapes that are drawn on the device."""

    def draw(self, tensor: Any, scale: float) -> None:
        """Fill a tensor with normal numbers of a standard deviation of ``scale``."""

    def allocated(self) -> int:
        """Bytes of the device's memory that are in use."""

    def transformers_peer(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str) -> Any:
        """transformers' model of a config on the tensors that ``random_weights`` draws."""


@dataclass(frozen=True)
class DecodeTime:
    """A decode step of ``batch`` sequences at ``context`` tokens: ``seconds`` is the median of ``steps`` steps, ``fastest`` the
    least; ``floor`` what the roofline asks for, None without a profile of the device. ``record``: seconds that recording took.
    ``states``: bytes of the pools; ``finite``: whether the logits of the first
    and the last step were; a state that is not finite stays so."""

    batch: int
    context: int
    layers: int
    steps: int
    seconds: float
    fastest: float
    floor: float | None
    record: float
    states: int
    finite: bool

    @property
    def layer(self) -> float:
        """Seconds a layer, embedding and head shared out."""
        return self.seconds / self.layers

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.seconds


@dataclass(frozen=True)
class PeerTime:
    """A decode step of another engine: the median ``seconds``."""

    engine: str
    batch: int
    context: int
    seconds: float


class DecodeBench:
    """The serving program ``decode`` of a subject on random weights; ``phases`` are the seconds that it took to come there."""

    def __init__(self, subject: Subject, *, seed: int = 0) -> None:
        """``CompileError`` for a backend that does not record steps."""
        home = subject.context.backends[0]
        fits = len(subject.context.backends) == 1 and isinstance(home, RecordsSteps) and isinstance(home, DrawsWeights)
        found = ", ".join(one.name for one in subject.context.backends)
        require(fits, f"the backend {found} records no decode steps; use --backend cuda on a machine with a GPU", CompileError)
        self._home = cast(Any, home)
        self._subject = subject
        started = perf_counter()
        graph = subject.graphs.main
        variant = ServingVariant("decode", OUTPUTS)
        self._driver = Driver(graph, subject.context, planned=(variant,))
        self.program = self._driver.program(variant)
        compiled = perf_counter()
        self._shapes = {name: stored.shape for name, stored in checkpoint_tensors(graph).items()}
        self._seed = seed
        before = self._home.allocated()
        self._weights = self._home.random_weights(self.program, self._shapes, seed)
        self.weights = self._home.allocated() - before
        """Bytes of the weights on the device."""
        self.phases = {"compile": compiled - started, "weights": perf_counter() - compiled}
        self._rng = np.random.default_rng(seed)

    def time(self, batch: int, context: int, *, steps: int, profile: DeviceProfile | None) -> DecodeTime:
        """Time ``steps`` steps, in which the context grows by one token each. ``ConfigError`` for sizes that cannot be."""
        for name, value, least in (("batch", batch, 1), ("context", context, 0), ("steps", steps, 1)):
            require(value >= least, f"{name} is {value}, expected at least {least}", ConfigError)
        needed = -(-(context + steps + WARM + 1) // BLOCK_SIZE)
        pools = StatePools([self.program], {self._home.name: self._home}, slots=batch + 1, blocks=batch * needed + 1)
        for pool in (pool for group in pools.fixed.values() for pool in group):
            self._home.draw(pool, 0.1)
        started = perf_counter()
        step = self._home.decode_step(
            self.program, self._weights, pools.fixed, pools.append, batch=batch, max_blocks=needed, allowed=None, sampled=False
        )
        record = perf_counter() - started
        slots = np.arange(1, batch + 1)
        step.set("token_ids", self._rng.integers(0, self._subject.shape.vocab_size, (1, batch)))
        step.set("block_tables", 1 + self._rng.permutation(batch * needed).reshape(batch, needed))
        for name, values in (("positions", context), ("context_lengths", context), ("read_slots", slots), ("write_slots", slots)):
            step.set(name, np.broadcast_to(values, (batch,)))
        finite = min(step.tokens(step.run())) >= 0
        step.seconds(WARM - 1)
        times = step.seconds(steps)
        finite = finite and min(step.tokens(WARM + steps - 1)) >= 0
        layers = self._subject.shape.num_hidden_layers
        floor = None if profile is None else self._floor(batch, context, profile)
        return DecodeTime(batch, context, layers, steps, median(times), min(times), floor, record, pools.nbytes, finite)

    def times(
        self, batches: Sequence[int], contexts: Sequence[int], *, steps: int, profile: DeviceProfile | None
    ) -> Iterator[DecodeTime]:
        """``time`` for every batch at every context."""
        for context in contexts:
            for batch in batches:
                yield self.time(batch, context, steps=steps, profile=profile)

    def peer_times(
        self, values: Mapping[str, Any], batches: Sequence[int], contexts: Sequence[int], *, steps: int
    ) -> Iterator[PeerTime]:
        """transformers' time for every batch at every context, as it comes and compiled, on the same tensors. ``values``: the
        fields of config.json."""
        fields = {**values, "num_hidden_layers": self._subject.shape.num_hidden_layers}
        if len(fields.get("layer_types") or ()) != fields["num_hidden_layers"]:
            fields.pop("layer_types", None)
        peer = self._home.transformers_peer(fields, self._shapes, self._seed, self._subject.context.config.dtype)
        for context in contexts:
            for batch in batches:
                for compiled in (False, True):
                    found = peer.seconds(batch, context, steps=steps, compiled=compiled)
                    yield PeerTime("transformers, compiled" if compiled else "transformers", batch, context, found)

    def _floor(self, batch: int, context: int, profile: DeviceProfile) -> float:
        """By the base program, whose costs know how many tokens a state holds."""
        step = Step("decode", batch, 1, context)
        return predict(self._driver.program(step.variant).graph, step, profile).floor
