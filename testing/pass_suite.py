"""What every pass is held to: a legal graph afterwards, its input left alone, the meaning kept, and a contract that can be met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from deltaloom.backends import backend as named_backend
from deltaloom.graph.errors import CompileError
from deltaloom.graph.interpret import Results
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array, Draw, Op
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.serialize import from_json, to_json
from deltaloom.graph.text import print_graph
from deltaloom.graph.types import DType
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.pipeline import Context, Pass, run_pipeline
from deltaloom.passes.table import makers_of, pass_class
from deltaloom.testing.measure import FLOOR, distance
from deltaloom.testing.samples import Sample, random_sample
from deltaloom.testing.suite import Check, Suite


class _Run(NamedTuple):
    """A pass that ran: on the graph ``given`` with its ``properties``."""

    sample: Sample
    given: Graph
    properties: frozenset[str]
    after: Graph


class PassSuite(Suite):
    """The checks of one pass.

    ``step``: its registered name, its class, or an instance with options. ``ops``: ops of which cases are among the graphs that it
    is run on. ``seq``: the number of tokens of these graphs' runs, for a pass that fixes it (None: any)."""

    step: str | type[Pass] | Pass
    ops: Sequence[type[Op]] = ()
    seq: int | None = None

    def subject(self) -> str:
        return f"pass {self.step if isinstance(self.step, str) else self.step.name}"

    def checks(self) -> Iterator[Check]:
        subject = self.subject()
        yield Check(subject, "contract", partial(_contract, self.made()), drawn=False)
        yield Check(subject, "order", self._order, drawn=False)
        yield Check(subject, "legal graph", self._legal)
        yield Check(subject, "input left alone", self._input_left_alone)
        yield Check(subject, "same again", self._same_again)
        yield Check(subject, "text and JSON", self._round_trip)
        yield Check(subject, "meaning", self._meaning, "meaning")
        yield Check(subject, "idempotent", self._idempotent, "idempotent", self._may_run_twice())

    def made(self, graph: Graph | None = None) -> Pass:
        """The pass, with what the compiler would give it for ``graph``."""
        if isinstance(self.step, Pass):
            return self.step
        cls = pass_class(self.step) if isinstance(self.step, str) else self.step
        if graph is not None and "outputs" in cls.given:
            return cls(**{"outputs": tuple(name for name, _ in graph.outputs)})
        return cls()

    def sample(self, draw: Draw) -> Sample:
        """A graph that the pass is run on, with arrays to evaluate it."""
        return random_sample(draw, ops=self.ops, seq=self.seq)

    def before(self, sample: Sample) -> tuple[Graph, frozenset[str]]:
        """The sample's graph after the passes that establish what this one requires, and what then holds."""
        step = self.made()
        steps = [cls_of(name) for name in needed(step.requires, (step.name,))]
        if not steps:
            return sample.graph, frozenset()
        done = run_pipeline(sample.graph, steps, _context())
        return done.graph, done.properties

    def _ran(self, draw: Draw) -> _Run:
        sample = self.sample(draw)
        given, properties = self.before(sample)
        step = self.made(given)
        try:
            after = run_pipeline(given, [step], _context(), properties=properties).graph
        except Exception as error:
            error.add_note(f"in pass {step.name} on\n{print_graph(given)}")
            raise
        return _Run(sample, given, properties, after)

    def _legal(self, draw: Draw) -> None:
        """The pipeline runs the pass on a legal graph and verifies what comes out."""
        self._ran(draw)

    def _input_left_alone(self, draw: Draw) -> None:
        """The graph that went in is the same afterwards."""
        given, properties = self.before(self.sample(draw))
        text = print_graph(given)
        run_pipeline(given, [self.made(given)], _context(), properties=properties)
        assert print_graph(given) == text, f"pass {self.made().name} changed the graph that it was given; edits go through Rewriter"

    def _same_again(self, draw: Draw) -> None:
        """The same graph gives the same result: nothing depends on the order of sets, the clock or a state of the pass."""
        _, given, properties, after = self._ran(draw)
        again = run_pipeline(given, [self.made(given)], _context(), properties=properties).graph
        assert print_graph(again) == print_graph(after), f"pass {self.made().name} gives another graph when it is run again"

    def _round_trip(self, draw: Draw) -> None:
        """What comes out survives its text and its JSON form."""
        after = self._ran(draw).after
        assert parse_graph(print_graph(after)) == after, f"a graph after pass {self.made().name} is another one when read from text"
        assert from_json(to_json(after)) == after, f"a graph after pass {self.made().name} is another one when read from JSON"

    def _meaning(self, draw: Draw) -> None:
        """Outputs and new states are the same before and after."""
        sample, given, _, after = self._ran(draw)
        same_results(f"pass {self.made().name}", given, after, sample)

    def _idempotent(self, draw: Draw) -> None:
        """Run on its own result, the pass changes nothing."""
        after = self._ran(draw).after
        step = self.made(after)
        properties = frozenset({*step.requires, *step.establishes}) - frozenset(step.excludes)
        twice = run_pipeline(after, [step], _context(), properties=properties).graph
        assert print_graph(twice) == print_graph(after), f"pass {step.name} changes its own result:\n{print_graph(after)}"

    def _may_run_twice(self) -> bool:
        step = self.made()
        return not set(step.excludes) & set(step.establishes)

    def _order(self, draw: Draw) -> None:
        """Where a required property is missing, or an excluded one holds, the pass is refused before it runs."""
        step, sample = self.made(), random_sample(draw, seq=self.seq)
        for missing in step.requires:
            _refused(step, sample.graph, frozenset(step.requires) - {missing}, missing)
        for late in step.excludes:
            _refused(step, sample.graph, frozenset({*step.requires, late}), late)


def needed(properties: Sequence[str], wanting: tuple[str, ...] = ()) -> list[str]:
    """Passes that establish ``properties`` of a graph that has none, in an order in which they may run; those in ``wanting`` are
    themselves waiting for them. ``AssertionError`` where nothing establishes one."""
    found: list[str] = []
    for goal in properties:
        makers = [name for name in makers_of(goal) if name not in wanting]
        assert makers, (
            f"no known pass establishes '{goal}', which {wanting[0] if wanting else 'a pass'} requires, so it can never run"
        )
        maker = makers[0]
        found += [name for name in (*needed(pass_class(maker).requires, (*wanting, maker)), maker) if name not in found]
    return found


def cls_of(name: str) -> Pass:
    """The registered pass with its defaults."""
    return pass_class(name)()


def same_results(what: str, before: Graph, after: Graph, sample: Sample) -> None:
    """``AssertionError`` unless both graphs compute the same from the arrays of ``sample``. Outputs that ``after`` has no more are
    not compared. The tolerance is that of the narrowest float dtype in the graph."""
    first, second = sample.evaluate(before), sample.evaluate(after)
    allowed = FLOOR[_narrowest(before)]
    for name, array in _results(second).items():
        _compare(f"{name} after {what}", array, _results(first)[name], allowed)
    lost = sorted(set(first.states) - set(second.states))
    assert not lost, f"after {what} the state {lost[0] if lost else ''} gets no new value"
    assert second.outputs or not first.outputs, f"after {what} no output is left of {', '.join(first.outputs)}"


def _results(results: Results) -> dict[str, Array]:
    return {**{f"output {n}": a for n, a in results.outputs.items()}, **{f"state {n}": a for n, a in results.states.items()}}


def _compare(name: str, found: Array, wanted: Array, allowed: float) -> None:
    if isinstance(found, QuantizedArray) or found.dtype.kind in "iub":
        assert np.array_equal(np.asarray(found), np.asarray(wanted)), f"{name} differs"
        return
    assert found.shape == wanted.shape, f"{name} has shape {list(found.shape)}, before it was {list(wanted.shape)}"
    far = distance(found, wanted.astype(np.float64))
    assert far <= allowed, f"{name} is {far:.3g} of its largest element from what it was before; allowed are {allowed:.3g}"


def _narrowest(graph: Graph) -> DType:
    bodies = (graph, *graph.regions.values())
    found = {value.type.dtype for body in bodies for node in body.nodes for value in (*node.inputs, *node.outputs)}
    return max((dtype for dtype in found if dtype in FLOOR), key=lambda dtype: FLOOR[dtype], default=next(iter(FLOOR)))


def _context() -> Context:
    return Context(CompileConfig(), (named_backend("numpy", threads=1),))


def _contract(step: Pass, draw: Draw) -> None:
    """The pass is plain data, and what it requires can be had."""
    cls = type(step)
    assert is_dataclass(cls), f"pass {step.name} is no dataclass; its fields are its options"
    assert cls.__dataclass_params__.frozen, f"pass {step.name} is not frozen; a pass has no state"  # type: ignore[attr-defined]
    names = [field.name for field in fields(step)]
    strange = [name for name in step.given if name not in names]
    assert not strange, f"pass {step.name} says that the compiler gives it {', '.join(strange)}, which is no field of it"
    for goal in step.requires:
        makers = [name for name in makers_of(goal) if name != step.name]
        assert makers, f"pass {step.name} requires '{goal}', which no known pass establishes"
    both = sorted(set(step.requires) & set(step.excludes))
    assert not both, f"pass {step.name} requires and excludes {', '.join(both)}, so it can never run"
    same = replace(step)
    assert same == step, f"pass {step.name} is not equal to another one with the same options"


def _refused(step: Pass, graph: Graph, properties: frozenset[str], name: str) -> None:
    try:
        run_pipeline(graph, [step], _context(), properties=properties)
    except CompileError as error:
        assert name in str(error), f"pass {step.name} is refused because of something else than '{name}': {error}"
    else:
        raise AssertionError(f"pass {step.name} runs although '{name}' {'is missing' if name in step.requires else 'holds'}")
