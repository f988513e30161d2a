"""Propagation: from a few factors that a plan divides to how every node of a graph is divided, forwards and backwards.

A node tells its neighbours through the values that it shares with them. What a node's sharding string does not allow, it does
not take over; there the value changes its form later (``deltaloom.passes.shard.partition``). Weights take no part: they are cut
at load as their reader needs them, which costs nothing. Inputs of a graph and results of calls are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import combinations

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import CompileError, GraphError
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.ops.factors import Factors, Operand, parse_factors
from deltaloom.passes.shard.cuts import Cut, Division, Piece, complete, disjoint, factor_cuts, join
from deltaloom.passes.shard.plan import Plan


def node_factors(node: Node) -> Factors | None:
    """The sharding string of a node, read for its types; None where it has none. Raises ``GraphError``."""
    inputs, outputs = [v.type for v in node.inputs], [v.type for v in node.outputs]
    text = None if isinstance(node.op, Call) else node.op.factors(*inputs)
    if text is None:
        return None
    return parse_factors(text, tuple(t.rank for t in inputs), tuple(t.rank for t in outputs))


def node_sizes(node: Node, factors: Factors) -> dict[str, Dim]:
    """The size of every factor of a node."""
    return factors.sizes([v.type.shape for v in node.inputs], [v.type.shape for v in node.outputs])


class Propagation:
    """How the nodes of one graph (a region or the top level) are divided over ``ranks`` ranks of a mesh axis."""

    def __init__(self, graph: Graph, mesh: str, ranks: int) -> None:
        self.graph = graph
        self.mesh = mesh
        self.ranks = ranks
        self.known: dict[Value, dict[int, Cut]] = {}
        """How the axes of values are divided, as far as their producer and their readers would have it."""
        self.factors: dict[str, Factors] = {}
        self.divisions: dict[str, Division] = {}
        for node in graph.nodes:
            factors = None if node.name in self.weight_nodes else node_factors(node)
            if factors is not None:
                self.factors[node.name] = factors
                self.divisions[node.name] = Division(node_sizes(node, factors), {})

    @cached_property
    def weights(self) -> dict[Value, frozenset[str]]:
        """The values that depend on parameters alone, and on which."""
        found = {value: frozenset([value.name]) for value in self.graph.params}
        for node in self.graph.nodes:
            if node.inputs and not isinstance(node.op, Call) and all(value in found for value in node.inputs):
                names = frozenset[str]().union(*(found[value] for value in node.inputs))
                found.update(dict.fromkeys(node.outputs, names))
        return found

    @cached_property
    def weight_nodes(self) -> frozenset[str]:
        """The nodes that make such values, by name."""
        return frozenset(node.name for node in self.graph.nodes if node.outputs[0] in self.weights)

    def run(self, plan: Plan) -> None:
        """Divide what the plan says, and what follows from it. Raises ``CompileError`` where that is impossible."""
        for node, factor in self._seeds(plan):
            size = self.divisions[node.name].sizes[factor]
            assert isinstance(size, int)
            self._accept(node, {factor: (Piece(size, self.ranks),)})
        nodes = [node for node in self.graph.nodes if node.name in self.divisions]
        while sum(self._visit(node) for node in (*nodes, *reversed(nodes))):
            pass

    def _seeds(self, plan: Plan) -> Iterator[tuple[Node, str]]:
        for line in plan:
            if line.mesh != self.mesh:
                continue
            readers = [node for node in self.graph.nodes if node.name in self.factors and self._reads(node, line.params)]
            having = [node for node in readers if self._reads(node, line.params, line.factor)]
            if readers and not having and line.needed:
                raise CompileError(
                    f"the plan divides '{line.params}' in '{self.graph.name}' along factor {line.factor}, but no op that reads it "
                    f"has such a factor: {', '.join(f'%{node.name} = {node.op.name}' for node in readers)}"
                )
            yield from ((node, line.factor) for node in having if self._divides(node, line.factor, needed=line.needed))

    def _reads(self, node: Node, params: str, factor: str = "") -> bool:
        """Whether a node has a weight made of such parameters, and that has the factor ``factor``, if any, which may be divided."""
        factors = self.factors[node.name]
        if factor and factor not in factors.cuttable:
            return False
        return any(
            fnmatchcase(name, params) and (not factor or operand.has(factor))
            for value, operand in zip(node.inputs, factors.inputs)
            for name in self.weights.get(value, ())
        )

    def _divides(self, node: Node, factor: str, *, needed: bool) -> bool:
        size = self.divisions[node.name].sizes[factor]
        if isinstance(size, int) and size % self.ranks == 0:
            return True
        if needed:
            raise CompileError(
                f"factor {factor} of %{node.name} = {node.op.name} in '{self.graph.name}' has size {size}, which "
                f"{self.ranks} ranks of '{self.mesh}' do not divide; choose another number of ranks"
            )
        return False

    def _visit(self, node: Node) -> bool:
        """Take over what the neighbours say, and tell them; whether anything is new to them."""
        division = self.divisions[node.name]
        for value, axis, factors in self._axes(node):
            if cut := self.known.get(value, {}).get(axis):
                if wanted := factor_cuts(factors, cut, division.sizes):
                    self._accept(node, wanted)
        division, news = self.divisions[node.name], False
        for value, axis, factors in self._axes(node):
            if not self._free(value) or not (cut := division.axis(factors)):
                continue
            known = self.known.setdefault(value, {})
            joined = join(known[axis], cut) if axis in known else cut
            news |= joined != known.get(axis)
            known[axis] = joined
        return news

    def _axes(self, node: Node) -> Iterator[tuple[Value, int, tuple[tuple[str, ...], ...]]]:
        """The axes of a node's values that may be divided, with their factors."""
        factors = self.factors[node.name]
        operands: tuple[Operand, ...] = (*factors.inputs, *factors.outputs)
        for value, operand in zip((*node.inputs, *node.outputs), operands):
            for axis, (size, own) in enumerate(zip(value.type.shape, operand.axes)):
                if isinstance(size, int) and size > 1:
                    yield value, axis, own

    def _free(self, value: Value) -> bool:
        """Whether a value may be divided, its producer willing."""
        return value.kind == "state" or value.kind == "node" and value not in self.weights and not self._called(value)

    def _called(self, value: Value) -> bool:
        return isinstance(self.graph.producers[value.name].op, Call)

    def _accept(self, node: Node, wanted: dict[str, Cut]) -> None:
        """Divide the factors of a node by what is ``wanted`` too, if its string allows all of it."""
        factors, division = self.factors[node.name], self.divisions[node.name]
        if not all(factor in factors.cuttable for factor in wanted):
            return
        cuts = dict(division.cuts)
        for factor, cut in wanted.items():
            cuts[factor] = join(cuts[factor], cut) if factor in cuts else cut
            if factors.summed(factor) and not complete(cuts[factor], self.ranks):
                return
        together = [(f, g) for f, g in combinations(cuts, 2) if not factors.alternatives(f, g)]
        if not all(disjoint(cuts[f], cuts[g]) for f, g in together):
            return
        new = Division(division.sizes, cuts)
        if all(new.axis(own) is not None for _, _, own in self._axes(node)):
            self.divisions[node.name] = new

    def state_cuts(self, value: Value) -> dict[int, Cut]:
        """How a state is divided: as the node that carries it on needs it."""
        cuts = self.known.get(value, {})
        for node in self.graph.users.get(value, ()):
            if node.name in self.divisions:
                own = {axis: self.divisions[node.name].axis(f) for v, axis, f in self._axes(node) if v == value}
                return {axis: cut for axis, cut in own.items() if cut}
        if cuts:
            raise GraphError(f"{value} is divided, but nothing reads it")
        return {}
