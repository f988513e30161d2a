"""Which pass, and which rewrite of it, changes what a model computes: found by halving.

The graph after each pass is interpreted by the definitions of its ops in float64, on the same tokens and states, so that no kernel
and no rounding has a part in it. A pass that rewrites is run again with less and less fuel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deltaloom.graph.errors import CompileError, ConfigError, RequestError, require
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Variant
from deltaloom.passes.fuse.passes import Fuse
from deltaloom.passes.pipeline import Context, Event, Fuel, Pass, run_pipeline
from deltaloom.runtime.load import ModelReference
from deltaloom.runtime.node_check import Difference, difference
from deltaloom.runtime.sides import LAST, ReferenceSide, Weights, places, step_inputs
from deltaloom.runtime.stages import numbered
from deltaloom.runtime.subject import Subject, read_subject

Good = Callable[[CompileConfig], bool]
"""Whether what a configuration gives is right."""
PLENTY = 1 << 60
"""Fuel where the configuration sets no limit: so that what is burned can be counted."""
CHANGES_NUMBERS = "quantise"
"""The pass that may change what is computed: what follows is compared with its result."""


@dataclass(frozen=True)
class Trial:
    """One question on the way: the stage or the fuel, and whether it was right."""

    what: str
    good: bool


@dataclass(frozen=True)
class Question:
    """One step of a model: its inputs' tokens, and the states before it."""

    ids: Array
    past: int
    states: Mapping[str, Array]


@dataclass(frozen=True)
class Culprit:
    """The pass that breaks a program (``"shared"`` for all of them) and, where it rewrites by rules, the rewrite: its number
    counted from 1 as fuel does, its rule, the node and the body that it changed. ``value`` is the first value after the pass that
    parts from the same before it. ``before`` is a graph that ``step`` breaks."""

    program: str
    pass_name: str
    rewrite: int | None = None
    rule: str = ""
    node: str = ""
    body: str = ""
    value: str = ""
    source: str = ""
    difference: Difference | None = None
    before: Graph | None = field(default=None, repr=False)
    step: Pass | None = field(default=None, repr=False)
    question: Question | None = field(default=None, repr=False)

    def __str__(self) -> str:
        whose = "every program" if self.program == "shared" else self.program
        rewrite = f", in rewrite {self.rewrite}: rule {self.rule} at %{self.node} of '{self.body}'" if self.rewrite else ""
        value = f"; the first value that parts is %{self.value}: {self.difference}" if self.value else ""
        return f"pass '{self.pass_name}' changes what {whose} computes{rewrite}{value}"


@dataclass
class Bisection:
    """What was asked, in order, and what was found; None where nothing changes what is computed."""

    rewrites: int
    trials: list[Trial] = field(default_factory=list)
    culprit: Culprit | None = None


def bisect(
    model: ModelReference,
    good: Good | None = None,
    *,
    config: CompileConfig | None = None,
    ids: Sequence[int] = (1, 2, 3, 4, 5, 6, 7),
    hf_overrides: Mapping[str, object] | None = None,
) -> Bisection:
    """Find the first pass after which ``model`` computes something else, and its first rewrite that is at fault.

    ``good`` replaces the interpreter as the judge: it is called with configurations of less and less ``fuel``, and says whether
    what they give is right; passes that use no fuel are not told apart then. ``ids`` is the prompt; a decode step follows it.
    Raises ``ConfigError`` for a mesh, ``RequestError`` for ids outside the vocabulary, and what compiling raises."""
    options = config or CompileConfig()
    require(not options.mesh, "bisect compares graphs of one rank; leave mesh out, or compare the mesh with one rank", ConfigError)
    if good is not None:
        return _by_judge(str(model), good, options, hf_overrides)
    subject = read_subject(str(model), hf_overrides, replace(options, dtype="float64"))
    size = subject.shape.vocab_size
    fits = len(ids) > 1 and all(0 <= i < size for i in ids)
    require(fits, f"token ids are {list(ids)[:8]}, expected at least two of 0..{size - 1}", RequestError)
    with Checkpoint.open(subject.folder) as checkpoint:
        return _Search(subject, checkpoint, np.asarray([list(ids)], np.int64)).run()


def _by_judge(model: str, good: Good, config: CompileConfig, hf_overrides: Mapping[str, object] | None) -> Bisection:
    stages = _Stages(read_subject(model, hf_overrides, replace(config, dump=None)))
    every = [*stages.shared(None), *stages.program(None, decode=True)]
    rewrites = [(stage, event) for stage in every for event in stage.rewrites]
    found = Bisection(len(rewrites))

    def right(fuel: int) -> bool:
        answer = good(replace(config, fuel=fuel))
        found.trials.append(Trial(f"fuel {fuel}", answer))
        return answer

    if not rewrites:
        require(good(config), "it is wrong, but no rule rewrites anything in this configuration", CompileError)
        return found
    if right(len(rewrites)):
        return found
    require(right(0), "without any rewrite it is wrong as well, so no rewrite is to blame", CompileError)
    number = _halve(0, len(rewrites), right)
    stage, event = rewrites[number - 1]
    found.culprit = Culprit(stage.program, stage.name, number, event.rule, event.node, event.graph)
    return found


def _halve(low: int, high: int, right: Callable[[int], bool]) -> int:
    """The first number that is wrong, where ``low`` is right and ``high`` is wrong."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if right(middle) else (low, middle)
    return high


@dataclass(frozen=True)
class _Stage:
    """The graph after a pass, the pass, and the rewrites for which it burned fuel."""

    program: str
    name: str
    graph: Graph
    step: Pass | None = None
    rewrites: tuple[Event, ...] = ()

    @property
    def title(self) -> str:
        """The stage as ``deltaloom diff`` names it."""
        return self.name if self.program == "shared" else f"{self.program}.{self.name}"


class _Stages:
    """Runs the passes of a model with so much fuel."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._driver = subject.compiled().driver

    def shared(self, fuel: int | None) -> list[_Stage]:
        """The stages that all programs share; ``fuel``: None for what the configuration has."""
        return self._run("shared", self._subject.graphs.main, None, self._context(fuel), frozenset())

    def program(self, fuel: int | None, *, decode: bool) -> list[_Stage]:
        """The stages of a program after the shared ones."""
        ctx = self._context(fuel)
        shared = self._run("shared", self._subject.graphs.main, None, ctx, frozenset())
        known = frozenset(name for stage in shared if stage.step for name in stage.step.establishes)
        variant = Variant(decode, False, (LAST,))
        return self._run("decode" if decode else "prefill", shared[-1].graph, variant, ctx, known)

    def _context(self, fuel: int | None) -> Context:
        context = self._subject.context
        chosen = context.config.fuel if fuel is None else fuel
        return replace(context, fuel=Fuel(PLENTY if chosen is None else chosen))

    def _run(self, title: str, graph: Graph, variant: Variant | None, ctx: Context, known: frozenset[str]) -> list[_Stage]:
        steps = self._driver.steps(variant)
        graphs: list[Graph] = []
        left = [ctx.fuel.left or 0]

        def watch(name: str, made: Graph) -> None:
            graphs.append(made)
            left.append(ctx.fuel.left or 0)

        done = run_pipeline(graph, steps, ctx, properties=known, title=title, watch=watch)
        stages = []
        for number, name in enumerate(numbered(step.name for step in steps)):
            hits = tuple(event for event in done.ledger[number].events if event.kind == "hit")
            burned = left[number] - left[number + 1]
            stages.append(_Stage(title, name, graphs[number], steps[number], hits[:burned]))
        return stages


class _Search:
    """A model, stage by stage."""

    def __init__(self, subject: Subject, checkpoint: Checkpoint, ids: Array) -> None:
        self._stages = _Stages(subject)
        self._checkpoint = checkpoint
        reference = ReferenceSide("given", subject.graphs.main, checkpoint)
        start = reference.states
        token = reference.step(ids).logits[:, -1].argmax(axis=-1).astype(np.int64)[:, None]
        self._questions = {"prefill": Question(ids, 0, start), "decode": Question(token, ids.shape[1], reference.states)}
        self._given = _Stage("shared", "given", subject.graphs.main)

    def run(self) -> Bisection:
        """Every stage until one differs."""
        shared = self._stages.shared(None)
        programs = [self._stages.program(None, decode=decode) for decode in (False, True)]
        found = Bisection(sum(len(stage.rewrites) for stage in (*shared, *programs[-1])))
        for part in (shared, *programs):
            before = self._given if part is shared else shared[-1]
            for stage in part:
                question = self._differing(before, stage, found)
                if question is not None:
                    earlier = sum(len(one.rewrites) for one in (*(() if part is shared else shared), *part[: part.index(stage)]))
                    found.culprit = self._culprit(before, stage, question, earlier, found)
                    return found
                before = stage
        return found

    def _differing(self, before: _Stage, after: _Stage, found: Bisection) -> Question | None:
        """A question to which the two stages give different answers."""
        asked = list(self._questions.values()) if after.program == "shared" else [self._questions[after.program]]
        if after.graph == before.graph or after.name == CHANGES_NUMBERS:
            asked = []
        wrong = next((one for one in asked if self._parts(before.graph, after.graph, one)), None)
        found.trials.append(Trial(after.title, wrong is None))
        return wrong

    def _parts(self, before: Graph, after: Graph, question: Question) -> bool:
        """Whether a result parts: the last logits, or a state."""
        one, other = (evaluate(graph, self._checkpoint, question) for graph in (before, after))
        pairs = [(other.outputs[LAST], one.outputs[LAST]), *((other.states[name], one.states[name]) for name in other.states)]
        return any(difference(made, wanted, depth=_depth(before)).parts for made, wanted in pairs)

    def _culprit(self, before: _Stage, after: _Stage, question: Question, earlier: int, found: Bisection) -> Culprit:
        """The pass, and the rewrite of it that is wrong."""
        whole = Culprit(after.program, after.name, before=before.graph, step=after.step)
        if not after.rewrites:
            return self._told(whole, before.graph, after.graph, question)

        def at(fuel: int) -> Graph:
            shared = after.program == "shared"
            stages = self._stages.shared(fuel) if shared else self._stages.program(fuel, decode=after.program == "decode")
            return next(stage.graph for stage in stages if stage.name == after.name)

        def right(fuel: int) -> bool:
            answer = not self._parts(before.graph, at(fuel), question)
            found.trials.append(Trial(f"fuel {fuel}", answer))
            return answer

        number = _halve(earlier, earlier + len(after.rewrites), right)
        event = after.rewrites[number - earlier - 1]
        made = replace(whole, rewrite=number, rule=event.rule, node=event.node, body=event.graph)
        source = at(number - 1)
        if isinstance(after.step, Fuse):
            made = replace(made, before=source, step=replace(after.step, fuel=1))
        return self._told(made, source, at(number), question)

    def _told(self, culprit: Culprit, before: Graph, after: Graph, question: Question) -> Culprit:
        """``culprit`` with the first value that parts."""
        wanted, made = (values_of(graph, self._checkpoint, question) for graph in (before, after))
        known = dict(places(after).values())
        for name, array in made.items():
            if name in wanted and wanted[name].shape == array.shape:
                how = difference(array, wanted[name], depth=_depth(before))
                if how.parts:
                    return replace(culprit, value=name, difference=how, source=known[name].node.source, question=question)
        return replace(culprit, question=question)


@dataclass(frozen=True)
class Evaluated:
    """What a graph gives: its last logits by name, and its new states."""

    outputs: Mapping[str, Array]
    states: Mapping[str, Array]


def evaluate(graph: Graph, checkpoint: Any, question: Question) -> Evaluated:
    """One step of a graph by definition."""
    inputs = step_inputs(graph, question.ids, question.past)
    results = interpret(graph, inputs, Weights(graph, checkpoint), question.states)
    return Evaluated(results.outputs, results.states)


def values_of(graph: Graph, checkpoint: Any, question: Question) -> dict[str, Array]:
    """Every value of one step of a graph by definition, by the name that is shown."""
    known, found = places(graph), {}

    def note(name: str, array: Any) -> None:
        if name in known and not isinstance(array, QuantizedArray):
            found[known[name][0]] = array

    inputs = step_inputs(graph, question.ids, question.past)
    interpret(graph, inputs, Weights(graph, checkpoint), question.states, observe=note)
    return found


def _depth(graph: Graph) -> int:
    return 1 + len(list(graph.instances()))
