"""Why programs are as they are: who runs each node and who refused, what rules did and did not, which layouts lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from deltaloom.graph.ir import Graph, Node, Refusal
from deltaloom.ops.fused import Fused
from deltaloom.passes.assign import parts_of
from deltaloom.passes.driver import AnyVariant, Driver
from deltaloom.passes.emit import Program
from deltaloom.passes.kernel import CountsCompilations
from deltaloom.passes.pipeline import Event
from deltaloom.passes.prepack import Conflict
from deltaloom.passes.segment import TRANSFER


@dataclass(frozen=True)
class KernelRow:
    """Nodes of one body of a program that run the same op on the same kernel, refused by the same others."""

    body: str
    op: str
    nodes: tuple[str, ...]
    kernel: str
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class RuleCount:
    """What a rule did to one graph, how often, and why: a *hit*, *refused*, a *near miss*, or *out of fuel*."""

    kind: str
    rule: str
    graph: str
    reason: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class ProgramReasons:
    """Of one program: the kernels, the nodes that were taken apart because nobody runs them whole, the nodes that copy from one
    backend to another, and by backend the emitted functions that it gives to a compiler."""

    kernels: tuple[KernelRow, ...]
    taken_apart: tuple[RuleCount, ...]
    transfers: tuple[str, ...]
    compiled: Mapping[str, tuple[str, ...]]
    calls: Mapping[str, int]
    """How often each body runs in a step."""


@dataclass(frozen=True)
class Explanation:
    """Of some programs of a model, and of the passes that they share."""

    programs: Mapping[str, ProgramReasons]
    rules: tuple[RuleCount, ...]
    conflicts: tuple[Conflict, ...]
    budgets: Mapping[str, int] = field(default_factory=dict)
    """How often a backend may compile one function, for those that do. Each function is one graph: what the compiler cannot take is
    an error and no graph break."""

    def about(self, *, op: str | None = None, nodes: Iterable[str] | None = None, body: str | None = None) -> Explanation:
        """The part that is about an op, or about the nodes of these names (without the prefix of a call) of ``body``, or of all."""
        names = None if nodes is None else set(nodes)

        def chosen(name: str, where: str, inside: tuple[str, ...]) -> bool:
            right_node = names is None or not names.isdisjoint(inside)
            return op in (None, name) and body in (None, where) and right_node

        programs = {}
        about = set(names or ())
        for title, one in self.programs.items():
            kernels = tuple(row for row in one.kernels if chosen(row.op, row.body, row.nodes))
            apart = tuple(row for row in one.taken_apart if chosen(row.rule, row.graph, row.nodes))
            programs[title] = ProgramReasons(kernels, apart, (), {}, one.calls)
            about |= {name for nodes_ in (*(k.nodes for k in kernels), *(a.nodes for a in apart)) for name in nodes_}
        rules = tuple(rule for rule in self.rules if body in (None, rule.graph) and not about.isdisjoint(rule.nodes))
        return Explanation(programs, rules, ())


def explanation(driver: Driver, variants: Mapping[str, AnyVariant]) -> Explanation:
    """Why the programs of ``variants`` are as they are."""
    budgets = {one.name: one.budget for one in driver.ctx.backends if isinstance(one, CountsCompilations)}
    programs = {name: program_reasons(driver.program(one), _events(driver, one.title), budgets) for name, one in variants.items()}
    titles = ["shared", *(one.title for one in variants.values())]
    events = [event for title in titles for event in _events(driver, title) if event.kind != "taken apart"]
    return Explanation(programs, tuple(rule_counts(events)), driver.conflicts, budgets)


def _events(driver: Driver, title: str) -> list[Event]:
    return [event for row in driver.ledgers[title] for event in row.events]


def program_reasons(program: Program, events: Iterable[Event], compilers: Container[str] = ()) -> ProgramReasons:
    """Kernels, transfers and compiled functions of a program; ``events`` of its passes; ``compilers``: backends that compile."""
    instances = list(program.graph.instances())
    bodies = {instance.graph.name: instance.graph for instance in instances}
    calls = Counter(instance.graph.name for instance in instances)
    transfers = tuple(f"{body.name}/{node.name}" for body in bodies.values() for node in body.nodes if node.op.name == TRANSFER)
    compiled: dict[str, tuple[str, ...]] = {}
    for function, backend in program.finished:
        if backend in compilers:
            compiled[backend] = (*compiled.get(backend, ()), function)
    apart = tuple(rule_counts(event for event in events if event.kind == "taken apart"))
    return ProgramReasons(tuple(kernel_rows(program)), apart, transfers, compiled, dict(calls))


def kernel_rows(program: Program) -> list[KernelRow]:
    """The kernels of every body of a program; the bodies by first use, the ops by name."""
    rows: list[KernelRow] = []
    bodies = {instance.graph.name: instance.graph for instance in program.graph.instances()}
    for name, body in bodies.items():
        kinds: dict[tuple[str, str, tuple[Refusal, ...]], list[str]] = {}
        for node in body.nodes:
            if (place := node.placement) is not None:
                kinds.setdefault((node.op.name, place.kernel, place.refusals), []).append(node.name)
        found = sorted(kinds.items(), key=lambda item: (item[0][0], item[0][1], str(item[0][2])))
        rows += [KernelRow(name, op, tuple(nodes), kernel, refusals) for (op, kernel, refusals), nodes in found]
    return rows


def rule_counts(events: Iterable[Event]) -> Iterator[RuleCount]:
    """Events that differ only in their node as one; hits first."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for event in sorted(events, key=lambda event: event.kind != "hit"):
        reason = "" if event.kind == "hit" else event.reason
        found.setdefault((event.kind, event.rule, event.graph, reason), []).append(event.node)
    for (kind, rule, graph, reason), nodes in found.items():
        yield RuleCount(kind, rule, graph, reason, tuple(dict.fromkeys(nodes)))


def unfolded(node: Node) -> Graph | None:
    """What a fused node stands for, as a graph of its parts; None for one that is not fused."""
    return parts_of(node) if isinstance(node.op, Fused) else None
