"""Times decode steps of any config on random weights, which the device draws by itself, so that no checkpoint is
needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
from deltaloom.runtime.footprint import footprint
from deltaloom.runtime.host_steps import HostSteps
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

    def peak(self) -> int:
        """The most bytes that were ever in use."""

    def transformers_peer(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str) -> Any:
        """transformers' model of a config on the tensors that ``random_weights`` draws."""


@dataclass(frozen=True)
class Memory:
    """Bytes of all weights, of the keys and values of a token, and of the fixed states of a sequence."""

    weights: int
    token: int
    sequence: int


@dataclass(frozen=True)
class DecodeTime:
    """A decode step of ``batch`` sequences at ``context`` tokens: ``seconds`` is the median of ``steps`` steps, ``fastest`` the
    least; ``floor`` what the roofline asks for, None without a profile of the device. ``record``: seconds that recording took.
    ``states``: bytes of the pools; ``checked``: steps whose logits were looked at, all that were taken; ``finite``: whether every
    one of them was. ``allocated``, ``peak``: bytes in use on the device (or by the process) after the steps, and at most."""

    batch: int
    context: int
    layers: int
    steps: int
    seconds: float
    fastest: float
    floor: float | None
    record: float
    states: int
    checked: int
    finite: bool
    allocated: int
    peak: int

    @property
    def layer(self) -> float:
        """Seconds a layer, embedding and head shared out."""
        return self.seconds / self.layers

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.seconds


@dataclass(frozen=True)
class Throughput:
    """Steady decode of ``batch`` sequences, as a client sees it: ``gaps`` are the seconds between the tokens of a sequence as they
    reach the host, which looks at a step while the next is under way."""

    batch: int
    context: int
    gaps: tuple[float, ...]
    floor: float | None
    checked: int
    finite: bool
    allocated: int
    peak: int

    @property
    def step(self) -> float:
        """Seconds a token of each sequence, the mean (TPOT)."""
        return sum(self.gaps) / len(self.gaps)

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.step


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
        """``CompileError`` for several backends."""
        home = subject.context.backends[0]
        found = ", ".join(one.name for one in subject.context.backends)
        require(len(subject.context.backends) == 1, f"decode steps run on one backend, not on {found}; name one", CompileError)
        records = isinstance(home, RecordsSteps) and isinstance(home, DrawsWeights)
        self._home = cast(Any, home if records else HostSteps(home))
        self.backend = home
        self.context = subject.context
        self._subject = subject
        started = perf_counter()
        graph = subject.graphs.main
        variant = ServingVariant("decode", OUTPUTS)
        self._driver = Driver(graph, subject.context, planned=(variant,))
        self.program = self._driver.program(variant)
        compiled = perf_counter()
        needs = footprint({"decode": self.base(1, 0)}, home, batch=1, context=0, tokens=1)
        self.planned = Memory(needs.held, needs.token, needs.fixed)
        """What is needed, by types alone, before anything is loaded."""
        planned = perf_counter()
        self._shapes = {name: stored.shape for name, stored in checkpoint_tensors(graph).items()}
        self._seed = seed
        before = self._home.allocated()
        self.weight_tensors = self._home.random_weights(self.program, self._shapes, seed)
        self.weights = self._home.allocated() - before
        """Bytes of the weights on the device."""
        self.phases = {"compile": compiled - started, "plan": planned - compiled, "weights": perf_counter() - planned}
        self._rng = np.random.default_rng(seed)

    def ready(self, batch: int, context: int, *, steps: int) -> tuple[Any, StatePools, float]:
        """A step of ``batch`` sequences at ``context`` tokens with room for ``steps`` more and some to warm up, its pools, and the
        seconds that recording took. ``ConfigError`` for sizes that cannot be."""
        for name, value, least in (("batch", batch, 1), ("context", context, 0), ("steps", steps, 1)):
            require(value >= least, f"{name} is {value}, expected at least {least}", ConfigError)
        needed = -(-(context + steps + WARM + 1) // BLOCK_SIZE)
        backends = {self.backend.name: self.backend}
        pools = StatePools([self.program], backends, slots=batch + 1, blocks=batch * needed + 1)
        for pool in (pool for group in pools.fixed.values() for pool in group):
            self._home.draw(pool, 0.1)
        started = perf_counter()
        step = self._home.decode_step(
            self.program,
            self.weight_tensors,
            pools.fixed,
            pools.append,
            batch=batch,
            max_blocks=needed,
            allowed=None,
            sampled=False,
        )
        record = perf_counter() - started
        slots = np.arange(1, batch + 1)
        step.set("token_ids", self._rng.integers(0, self._subject.shape.vocab_size, (1, batch)))
        step.set("block_tables", 1 + self._rng.permutation(batch * needed).reshape(batch, needed))
        for name, values in (("positions", context), ("context_lengths", context), ("read_slots", slots), ("write_slots", slots)):
            step.set(name, np.broadcast_to(values, (batch,)))
        return step, pools, record

    def time(self, batch: int, context: int, *, steps: int, profile: DeviceProfile | None) -> DecodeTime:
        """Time ``steps`` steps, in which the context grows by one token each. ``ConfigError`` for sizes that cannot be."""
        step, pools, record = self.ready(batch, context, steps=steps)
        step.seconds(WARM)
        times = step.seconds(steps)
        finite = step.broken() == 0
        layers = self._subject.shape.num_hidden_layers
        floor = None if profile is None else self._floor(batch, context, profile)
        held = self._home.allocated(), self._home.peak()
        return DecodeTime(
            batch, context, layers, steps, median(times), min(times), floor, record, pools.nbytes, WARM + steps, finite, *held
        )

    def throughput(self, batch: int, context: int, *, steps: int, profile: DeviceProfile | None) -> Throughput:
        """``steps`` tokens of every sequence one after the other, read by the host one step late."""
        step, _, _ = self.ready(batch, context, steps=steps + 1)
        step.seconds(WARM)
        before = step.run()
        arrived = []
        for _ in range(steps + 1):
            now = step.run()
            step.tokens(before)
            arrived.append(perf_counter())
            before = now
        floor = None if profile is None else self._floor(batch, context, profile)
        gaps = tuple(later - earlier for earlier, later in pairwise(arrived))
        finite = step.broken() == 0
        return Throughput(batch, context, gaps, floor, WARM + 2 + steps, finite, self._home.allocated(), self._home.peak())

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
        return predict(self.base(batch, context).graph, Step("decode", batch, 1, context), profile).floor

    def base(self, batch: int, context: int) -> Program:
        """The program of the same step over rows of one length, without pools."""
        return self._driver.program(Step("decode", batch, 1, context).variant)
