"""Roofline: the least time that every op of a program can take on a device, and beside it the time that it does take.

An op takes at least as long as its operations at the device's peak, and as its bytes at the device's bandwidth; a whole program as
long as all of its operations, and as all of its bytes.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

import numpy as np

from deltaloom.graph.errors import RequestError, require
from deltaloom.graph.ir import Graph, Node
from deltaloom.graph.op import Array
from deltaloom.graph.types import DType
from deltaloom.passes.cost import NodeWork, Work, graph_work
from deltaloom.passes.driver import Variant
from deltaloom.runtime.compile import Kind
from deltaloom.runtime.device_profile import DeviceProfile
from deltaloom.runtime.model import Model
from deltaloom.runtime.observe import observe
from deltaloom.runtime.state import ModelState
from deltaloom.runtime.subject import OUTPUTS

Bound = Literal["operations", "bytes", "dispatch"]
REPETITIONS = (5, 50)
"""Least and most runs of which times are the median; as many as take ``ENOUGH`` seconds."""
ENOUGH = 0.5
WARM_UP = 2


@dataclass(frozen=True)
class Step:
    """One run of a program: ``tokens`` new ones for each of ``batch`` sequences whose states hold ``context`` tokens."""

    kind: Kind
    batch: int
    tokens: int
    context: int

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("tokens", 1), ("context", 0)):
            value = getattr(self, name)
            require(value >= least, f"{name} is {value}, expected at least {least}", RequestError)
        fits = (self.tokens == 1) == (self.kind == "decode")
        wanted = "1 (prefill takes more)" if self.kind == "decode" else "at least 2 (decode takes 1)"
        require(fits, f"tokens is {self.tokens}, and a {self.kind} step takes {wanted}", RequestError)

    @property
    def sizes(self) -> dict[str, int]:
        """The symbols of a program's types."""
        return {"batch": self.batch, "past": self.context, "seq": self.tokens}

    @property
    def variant(self) -> Variant:
        """The program that runs the step."""
        return Variant(self.kind == "decode", False, OUTPUTS)


@dataclass(frozen=True)
class Row:
    """All nodes of one op in one body of a program on one kernel, in all calls of the body: ``calls`` times ``nodes``.

    ``floor``: the least seconds that they take together, by operations or bytes; where starting a kernel takes longer, ``bound`` is
    dispatch. ``seconds``: what they took, None where nothing was run."""

    body: str
    op: str
    kernel: str
    nodes: tuple[str, ...]
    calls: int
    dtype: str
    work: Work
    floor: float
    bound: Bound
    seconds: float | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where one of them is missing."""
        return None if self.seconds is None or not self.floor else self.seconds / self.floor


@dataclass(frozen=True)
class Roofline:
    """What a step of a program takes at least, by op and in all; and, where it was run, what it takes.

    ``layers``: calls of bodies. ``kernels``: kernel calls of a step. ``seconds``: of a whole step run as usual; None where nothing
    was run. The rows' seconds come from runs node by node, each the median of its repetitions."""

    step: Step
    profile: DeviceProfile
    rows: tuple[Row, ...]
    layers: int
    kernels: int
    seconds: float | None = None

    @property
    def work(self) -> Work:
        """Of the whole step."""
        return sum((row.work for row in self.rows), start=Work())

    @property
    def floor(self) -> float:
        """Seconds that the step takes at least: all operations, each dtype at its peak, or all bytes, whichever is longer."""
        operations = sum(row.work.flops / self.profile.flops[row.dtype] for row in self.rows)
        return max(operations, self.work.bytes / self.profile.bandwidth)

    @property
    def dispatch(self) -> float:
        """Seconds that starting the kernels of a step takes, by the profile."""
        return self.kernels * self.profile.dispatch

    @property
    def observed(self) -> float | None:
        """Seconds of all kernels together, run node by node."""
        return sum(row.seconds or 0.0 for row in self.rows) if self.seconds is not None else None

    def body(self, name: str) -> tuple[Row, ...]:
        """The rows of one body."""
        return tuple(row for row in self.rows if row.body == name)

    @property
    def bodies(self) -> tuple[str, ...]:
        """Bodies by name, in the order of their first use."""
        return tuple(dict.fromkeys(row.body for row in self.rows))


def predict(graph: Graph, step: Step, profile: DeviceProfile) -> Roofline:
    """The roofline of a placed program's graph. ``ConfigError`` where the profile does not know a dtype of it."""
    counted = graph_work(graph, step.sizes)
    groups: dict[tuple[str, str, str, str], list[NodeWork]] = defaultdict(list)
    for one in counted.nodes:
        kernel = one.node.placement.kernel if one.node.placement else ""
        groups[one.body, one.node.op.name, kernel, one.dtype.long_name].append(one)
    rows = []
    for (body, op, kernel, dtype), nodes in groups.items():
        calls = counted.calls[body]
        work = sum((one.work for one in nodes), start=Work()) * calls
        floor = calls * sum(profile.seconds(one.work, one.dtype) for one in nodes)
        names = tuple(one.node.name for one in nodes)
        bound = _bound(work, floor / calls / len(nodes), profile, nodes[0].dtype)
        rows.append(Row(body, op, kernel, names, calls, dtype, work, floor, bound))
    layers = sum(1 for instance in graph.instances() if instance.prefix)
    return Roofline(step, profile, tuple(rows), layers, sum(row.calls * len(row.nodes) for row in rows))


def _bound(work: Work, floor: float, profile: DeviceProfile, dtype: DType) -> Bound:
    """What limits nodes of so much ``work`` together, each of which takes ``floor`` seconds at least."""
    if floor <= profile.dispatch:
        return "dispatch"
    return "operations" if work.flops / profile.peak(dtype) > work.bytes / profile.bandwidth else "bytes"


def measure(model: Model, step: Step, profile: DeviceProfile, *, repetitions: int | None = None) -> Roofline:
    """The roofline of a step of a loaded model with the time that it takes, warm. Every run starts from a copy of the same state of
    random tokens; times are the medians of ``repetitions`` (None: enough of them). Raises ``RequestError`` where the step does not
    fit the model's context."""
    require(repetitions is None or repetitions >= 1, f"repetitions is {repetitions}, expected at least 1", RequestError)
    generator = np.random.default_rng(0)
    state = model.new_state(step.batch)

    def tokens(count: int) -> Array:
        return generator.integers(0, model.config.vocab_size, (step.batch, count))

    total, most = step.context + step.tokens, model.max_model_len
    require(total <= most, f"{total} tokens are more than the maximum context length of {most}; take fewer", RequestError)
    if step.context:
        model.forward(tokens(step.context), state=state, logits=None)
    state.append(step.tokens)  # room now, so that no run grows a buffer
    inputs = {"token_ids": tokens(step.tokens)}
    graph = model.main.program(step.variant).graph
    if repetitions is None:
        least, most = REPETITIONS
        repetitions = min(most, max(least, round(ENOUGH / _whole(model, inputs, state, 1))))
    whole = _whole(model, inputs, state, repetitions)
    seconds = _observed(model, graph, inputs, state, repetitions)
    predicted = predict(graph, step, profile)
    rows = tuple(replace(row, seconds=sum(seconds[row.body, name] for name in row.nodes)) for row in predicted.rows)
    return replace(predicted, rows=rows, seconds=whole)


def _whole(model: Model, inputs: Mapping[str, Array], state: ModelState, repetitions: int) -> float:
    """Seconds of a step run as usual."""
    times = []
    for _ in range(WARM_UP + repetitions):
        own = state.copy()
        begun = perf_counter()
        model.main.run(inputs, own, None, OUTPUTS)
        times.append(perf_counter() - begun)
    return statistics.median(times[WARM_UP:])


def _observed(
    model: Model, graph: Graph, inputs: Mapping[str, Array], state: ModelState, repetitions: int
) -> Mapping[tuple[str, str], float]:
    """Body and node name -> seconds of all calls together, each the median of its runs."""
    places = {id(node): instance.graph.name for instance in graph.instances() for node in instance.graph.nodes}
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)

    def note(name: str, node: Node, outputs: Sequence[Any], seconds: float) -> None:
        found[places[id(node)], node.name, name].append(seconds)

    for number in range(WARM_UP + repetitions):
        if number == WARM_UP:
            found.clear()
        observe(model.main, inputs, state.copy(), None, OUTPUTS, note)
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for (body, node, _), times in found.items():
        sums[body, node] += statistics.median(times)
    return sums
