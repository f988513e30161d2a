"""Two ways to run a model, side by side: the first value that parts, by name, and why.

Values are aligned by name: a fused node's outputs keep the names of what they replace. How far two may be apart is measured by the
definition: as far as the reference in the dtype is from the reference in float64, times a small constant, and a floor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from deltaloom.graph.errors import ConfigError, RequestError, require
from deltaloom.graph.op import Array
from deltaloom.graph.types import dtype_named
from deltaloom.models.build import build_graph
from deltaloom.models.bundled import model_folder
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import read_config
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.load import ModelReference, load
from deltaloom.runtime.locate import Cause, fault_of
from deltaloom.runtime.node_check import Difference, difference
from deltaloom.runtime.sides import Place, ProgramSide, RanksSide, ReferenceSide, Side, Step
from deltaloom.runtime.subject import read_subject
from deltaloom.runtime.weight_check import weight_faults

REFERENCE = "reference"
"""In place of a configuration: the model's own graph by the definitions of its ops, in float64."""
Way = CompileConfig | Literal["reference"]
FUSIONS = ("fold", "pack_siblings", "fuse", "border_fusion")
"""Passes that are left out where ranks are compared, because what they make does not say how it is divided."""
STEPS = 3
"""Decode steps after the prompt unless said otherwise."""


@dataclass(frozen=True)
class Where:
    """The node of one side that makes a value."""

    op: str
    kernel: str
    body: str
    source: str
    origins: tuple[str, ...]
    rules: tuple[str, ...] = ()
    """The rewrites that made it: ``fuse: add_rms_norm``, pass and rule."""

    @classmethod
    def of(cls, place: Place, side: Side) -> Where:
        """The facts of a place."""
        node = place.node
        kernel = node.placement.kernel if node.placement else ""
        rules = side.rewrites(place) if isinstance(side, ProgramSide) else ()
        return cls(str(node.op), kernel, place.body.name, node.source, node.origins, rules)


@dataclass(frozen=True)
class Finding:
    """The first value that parts: a ``value``, a ``state`` after a step, or a ``weight``; ``step`` 0 is the prompt."""

    kind: Literal["value", "state", "weight"]
    name: str
    step: int
    difference: Difference
    nodes: Mapping[str, Where]
    """By title of the side."""
    cause: Cause


@dataclass
class Comparison:
    """What was compared, and what was found. ``values`` and ``states``: how many were compared; ``unmatched``: names that only one
    side has; ``largest``: by step, the value with the largest error relative to what is allowed."""

    a: str
    b: str
    tokens: list[int]
    steps: int
    values: int = 0
    states: int = 0
    unmatched: dict[str, int] = field(default_factory=dict)
    largest: list[tuple[str, Difference]] = field(default_factory=list)
    finding: Finding | None = None


def compare(
    model: ModelReference,
    a: Way,
    b: Way,
    *,
    ids: Sequence[int],
    steps: int = STEPS,
    titles: tuple[str, str] | None = None,
    hf_overrides: Mapping[str, object] | None = None,
) -> Comparison:
    """Run ``model`` in two ways on the prompt ``ids`` and ``steps`` tokens that ``b`` finds likeliest, until a value, a state or a
    weight parts. A way is a configuration (with a mesh: all ranks in lock step, in float64, without fusions) or "reference".
    Raises ``ConfigError`` for two equal ways, ``RequestError`` for no or too few tokens, and what loading raises."""
    require(a != b, f"both ways are {_title(a)}; there is nothing to compare", ConfigError)
    require(steps >= 0, f"steps is {steps}, expected at least 0", RequestError)
    folder = model_folder(model)
    shape = read_config(folder, hf_overrides)
    known = [i for i in ids if 0 <= i < shape.vocab_size]
    require(
        bool(ids) and len(known) == len(ids),
        f"token ids are {list(ids)[:8]}, expected some of 0..{shape.vocab_size - 1}",
        RequestError,
    )
    shown = titles or (_title(a), _title(b))
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(folder))
        world = _World(model, hf_overrides, checkpoint)
        run = _Run(world, Comparison(*shown, list(ids), steps), world.side(shown[0], a, b), world.side(shown[1], b, a))
        run.measure_with(world, [way for way in (a, b) if isinstance(way, CompileConfig)])
        return run.go()


@dataclass(frozen=True)
class _World:
    """A model's files."""

    model: ModelReference
    hf_overrides: Mapping[str, object] | None
    checkpoint: Checkpoint

    def side(self, title: str, way: Way, other: Way) -> Side:
        """A way to run it, ready to start."""
        if not isinstance(way, CompileConfig):
            return self.reference(title, "float64", other if isinstance(other, CompileConfig) else None)
        if way.mesh:
            plain = replace(way, dtype="float64", skip=tuple(dict.fromkeys((*way.skip, *FUSIONS))))
            subject = read_subject(str(self.model), self.hf_overrides, plain)
            return RanksSide(title, subject.compiled().graph("shared"), way.mesh, self.checkpoint)
        return ProgramSide(title, load(self.model, config=way, hf_overrides=self.hf_overrides))

    def reference(self, title: str, dtype: str, quantised_as: CompileConfig | None = None) -> ReferenceSide:
        """The graph as it was built; with quantised weights, if the configuration asks for some, what its shared passes make."""
        if quantised_as is not None and (quantised_as.quantise or quantised_as.keep_quantized):
            plain = replace(quantised_as, backends=("numpy",), kernels={}, dtype=dtype if dtype == "float64" else "float32")
            graph = read_subject(str(self.model), self.hf_overrides, replace(plain, mesh={})).compiled().graph("shared")
        else:
            shape = read_config(model_folder(self.model), self.hf_overrides)
            graph = build_graph(shape, dtype=dtype_named(dtype), names=self.checkpoint.names()).main
        return ReferenceSide(title, graph, self.checkpoint)


class _Run:
    """Two sides, step by step."""

    def __init__(self, world: _World, found: Comparison, a: Side, b: Side) -> None:
        self._world = world
        self._found = found
        self._a = a
        self._b = b
        self._truth: Side | None = None
        self._rounded: Side | None = None
        self._chunks: list[Array] = []

    def measure_with(self, world: _World, ways: Sequence[CompileConfig]) -> None:
        """Take the noise of rounding from the reference, in float64 and in the narrowest dtype of ``ways``."""
        quantised = next((way for way in ways if way.quantise or way.keep_quantized), None)
        models = [side.model for side in (self._a, self._b) if isinstance(side, ProgramSide)]
        dtypes = sorted((dtype_named(model.ctx.config.dtype) for model in models), key=lambda dtype: dtype.itemsize)
        if dtypes:
            self._truth = world.reference("float64", "float64", quantised)
            self._rounded = world.reference("rounded", dtypes[0].long_name, quantised)

    def go(self) -> Comparison:
        """Every step until something parts."""
        if (fault := self._weights()) is not None:
            self._found.finding = fault
            return self._found
        ids = np.asarray([self._found.tokens], np.int64)
        for number in range(self._found.steps + 1):
            self._chunks.append(ids)
            sides = [side for side in (self._a, self._b, self._truth, self._rounded) if side is not None]
            made = {id(side): side.step(ids) for side in sides}
            a, b = made[id(self._a)], made[id(self._b)]
            truth, rounded = (made[id(side)] if side is not None else None for side in (self._truth, self._rounded))
            self._found.finding = self._values(number, a, b, truth, rounded) or self._states(number, a, b, truth, rounded)
            if self._found.finding is not None:
                break
            ids = b.logits[:, -1].argmax(axis=-1).astype(np.int64)[:, None]
        return self._found

    def _weights(self) -> Finding | None:
        """Weights that kernels get and that are not the checkpoint's."""
        for side in (self._a, self._b):
            if not isinstance(side, ProgramSide):
                continue
            for name, node, type_, how in weight_faults(side.model, self._world.checkpoint):
                made = f"its last step is {node.op} at {node.source}" if node else "it is read as it is stored"
                sentence = f"the weight {name}: {type_} is not the checkpoint's: {how}; {made}"
                where = {} if node is None else {side.title: Where(str(node.op), "", "weights", node.source, node.origins)}
                return Finding("weight", name, 0, how, where, Cause("weight", side.title, name, sentence, how))
        return None

    def _values(self, number: int, a: Step, b: Step, truth: Step | None, rounded: Step | None) -> Finding | None:
        self._found.unmatched = {
            self._found.a: len(a.values.keys() - b.values.keys()),
            self._found.b: len(b.values.keys() - a.values.keys()),
        }
        worst: tuple[float, str, Difference] | None = None
        depth = 1
        for name, array in a.values.items():
            if (layer := re.match(r"layers\.(\d+)\.", name)) is not None:
                depth = max(depth, int(layer[1]) + 2)
            for side, step in ((self._a, a), (self._b, b)):
                if name in step.faults:
                    return self._finding("value", name, number, Difference(np.inf, np.inf, np.inf, 0.0, 0.0), a, b, side)
            if name not in b.values:
                continue
            self._found.values += 1
            how = _between(name, array, b.values, truth.values if truth else None, rounded.values if rounded else None, depth)
            if how.parts:
                return self._finding("value", name, number, how, a, b)
            if how.allowed and (worst is None or how.error / how.allowed > worst[0]):
                worst = (how.error / how.allowed, name, how)
        if worst is not None:
            self._found.largest.append(worst[1:])
        return None

    def _states(self, number: int, a: Step, b: Step, truth: Step | None, rounded: Step | None) -> Finding | None:
        depth = 2 + max((int(found[1]) for name in a.states if (found := re.search(r"layers\.(\d+)\.", name))), default=0)
        for name, array in a.states.items():
            if name not in b.states:
                continue
            self._found.states += 1
            how = _between(name, array, b.states, truth.states if truth else None, rounded.states if rounded else None, depth)
            if how.parts:
                return self._finding("state", name, number, how, a, b)
        return None

    def _finding(
        self, kind: Literal["value", "state"], name: str, number: int, how: Difference, a: Step, b: Step, at: Side | None = None
    ) -> Finding:
        nodes = {}
        for side, step in ((self._a, a), (self._b, b)):
            place = side.updater(name) if kind == "state" else step.places.get(name)
            if place is not None:
                nodes[side.title] = Where.of(place, side)
        return Finding(kind, name, number, how, nodes, self._cause(kind, name, how, a, b, at))

    def _cause(self, kind: str, name: str, how: Difference, a: Step, b: Step, at: Side | None) -> Cause:
        for side in (self._a, self._b):
            if isinstance(side, ProgramSide):
                fault = fault_of(side.model, side.title, self._chunks, None if kind == "state" else name)
                if fault is not None:
                    return fault
        for side, step in ((self._a, a), (self._b, b)):
            place = side.updater(name) if kind == "state" else step.places.get(name)
            if isinstance(side, RanksSide) and place is not None and at in (None, side):
                types = [value.type for value in place.node.inputs]
                text = place.node.op.factors(*types)
                found = step.faults.get(name, f"put together from the ranks it is off by {how}")
                says = f"its sharding string is {text!r}" if text else "it has no sharding string"
                sentence = f"%{name} = {place.node.op.name} is not what one rank computes: {found}; {says}"
                return Cause("ranks", side.title, name, sentence, how)
        if kind == "value" and a.values[name].dtype.kind in "iu":
            sentence = f"every kernel is right, but %{name} is a choice, and its numbers are so close that rounding decides"
            return Cause("choice", self._found.a, name, sentence, how)
        sentence = (
            f"every kernel up to %{name} computes what its op means, so the graphs differ in meaning: a rewrite or a pass is wrong"
        )
        return Cause("graph", self._found.a, name, f"{sentence}; `deltaloom bisect` says which", how)


def _between(
    name: str,
    array: Array,
    other: Mapping[str, Array],
    truth: Mapping[str, Array] | None,
    rounded: Mapping[str, Array] | None,
    depth: int,
) -> Difference:
    """How far one value is from the same of the other side."""
    if truth is None or rounded is None or name not in truth:
        return difference(array, other[name], depth=depth)
    return difference(array, other[name], rounded[name], truth_exact=truth[name], depth=depth)


def _title(way: Way) -> str:
    """A way in short: its backends, and what of it is not as usual."""
    if not isinstance(way, CompileConfig):
        return REFERENCE
    usual = CompileConfig()
    shown = {
        key: getattr(way, key)
        for key in ("dtype", "skip", "fuel", "mesh", "quantise", "keep_quantized", "kernels")
        if getattr(way, key) != getattr(usual, key)
    }
    return " ".join([",".join(way.backends), *(f"{key}={_short(value)}" for key, value in shown.items())])


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_short(one)}" for key, one in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

