"""Partition: the graph that every rank runs, from the graph of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltaloom.graph.errors import CompileError, GraphError, require
from deltaloom.graph.ir import Call, Graph, Node, State, Value
from deltaloom.graph.naming import free_name
from deltaloom.graph.op import Op
from deltaloom.ops.factors import Operand
from deltaloom.passes.pipeline import Context, Pass
from deltaloom.passes.shard.convert import Converter
from deltaloom.passes.shard.cuts import Cut, Division, factor_cuts
from deltaloom.passes.shard.layout import WHOLE, Layout
from deltaloom.passes.shard.plan import Plan, check_mesh
from deltaloom.passes.shard.propagate import Propagation, node_factors, node_sizes


@dataclass(frozen=True)
class Shard(Pass):
    """Rewrite a graph into the one that each rank of ``mesh`` runs; values become local, collectives are nodes, and
    parameters stay the checkpoint's, cut by ``shard`` nodes that are lifted with the weights."""

    name = "shard"
    requires = ("canonical",)
    establishes = ("sharded",)
    excludes = ("packed", "lifted")
    given = ("mesh", "plan")
    mesh: tuple[tuple[str, int], ...] = ()
    plan: Plan = ()

    @property
    def idle(self) -> bool:
        return not check_mesh(dict(self.mesh))

    def run(self, graph: Graph, ctx: Context) -> Graph:
        planned = sorted({line.mesh for line in self.plan})
        for axis, ranks in check_mesh(dict(self.mesh)).items():
            has = f"it divides over {', '.join(planned)}" if planned else "it is empty"
            require(axis in planned, f"the plan divides nothing over the mesh axis '{axis}'; {has}", CompileError)
            regions = {name: partition(region, axis, ranks, self.plan) for name, region in graph.regions.items()}
            graph = partition(replace(graph, regions=regions), axis, ranks, self.plan)
        return graph


def partition(graph: Graph, mesh: str, ranks: int, plan: Plan) -> Graph:
    """One graph or region, divided over the ranks of one mesh axis. Its inputs and outputs stay whole."""
    propagation = Propagation(graph, mesh, ranks)
    propagation.run(plan)
    return _Partition(graph, propagation).graph()


class _Partition:
    """Writes the new graph, node by node. ``made`` holds, of each old value, the new one and its layout."""

    def __init__(self, graph: Graph, propagation: Propagation) -> None:
        self.old = graph
        self.propagation = propagation
        self.mesh, self.ranks = propagation.mesh, propagation.ranks
        self.made: dict[Value, tuple[Value, Layout]] = {}
        self.weights: dict[tuple[Value, Layout], Value] = {}
        names = {value.name for node in graph.nodes for value in node.outputs} | {value.name for value in graph.inputs}
        self.convert = Converter(self.mesh, self.ranks, names)

    def graph(self) -> Graph:
        """The graph of one rank."""
        self.made.update({value: (value, WHOLE) for value in self.old.inputs})
        states = tuple(self._state(state) for state in self.old.states)
        for node in self.old.nodes:
            if node.name not in self.propagation.weight_nodes:
                self._node(node)
        outputs = tuple((name, self._obtain(value, WHOLE)) for name, value in self.old.outputs)
        updates = tuple((name, self._update(name, value)) for name, value in self.old.updates)
        return replace(self.old, states=states, nodes=tuple(self.convert.nodes), outputs=outputs, updates=updates)

    def _state(self, state: State) -> State:
        layout = Layout(self.propagation.state_cuts(state.value))
        value = self._local(state.value, layout)
        self.made[state.value] = (value, layout)
        return replace(state, value=value)

    def _update(self, name: str, value: Value) -> Value:
        old = next(state.value for state in self.old.states if state.name == name)
        return self._obtain(value, self.made[old][1])

    def _local(self, value: Value, layout: Layout) -> Value:
        """The value on one rank, its type with what it says of the whole one."""
        text = ", ".join(filter(None, (value.sharding, layout.text(self.mesh, self.ranks))))
        return replace(value, type=layout.local(value.type), sharding=text)

    def _node(self, node: Node) -> None:
        division = self.propagation.divisions.get(node.name)
        if division is None:
            inputs = [self._obtain(value, WHOLE) for value in node.inputs]
            self._emit(node, node.op, inputs, [WHOLE] * len(node.outputs))
            return
        factors = self.propagation.factors[node.name]
        summed = any(factors.summed(factor) for factor in division.cuts)
        partial = summed or self._passes_partial(node, factors.inputs, division)
        inputs = []
        for value, operand in zip(node.inputs, factors.inputs):
            layout = Layout(_cuts(value, operand, division))
            alone = operand.added and partial and not (summed and any(operand.has(f) for f in division.cuts))
            inputs.append(self._obtain(value, Layout(partial=True) if alone else layout))
        outputs = [Layout(_cuts(v, o, division), partial) for v, o in zip(node.outputs, factors.outputs)]
        self._emit(node, node.op, inputs, outputs)

    def _passes_partial(self, node: Node, operands: Sequence[Operand], division: Division) -> bool:
        """Whether all summands of a node are partial sums, so that the result may be one too."""
        layouts = [self.made[value][1] if value in self.made else WHOLE for value in node.inputs]
        partial = [operand.added for operand in operands] == [layout.partial for layout in layouts]
        return partial and any(layout.partial for layout in layouts) and not division.cuts

    def _emit(self, node: Node, op: Op, inputs: list[Value], layouts: list[Layout]) -> None:
        outputs = [self._local(value, layout) for value, layout in zip(node.outputs, layouts)]
        op = op.resized(*(value.type for value in outputs))
        self._check(node, op, inputs, outputs)
        self.convert.nodes.append(
            replace(node, op=op, inputs=tuple(inputs), outputs=tuple(outputs), origins=node.origins or (node.name,))
        )
        self.made.update({old: (new, layout) for old, new, layout in zip(node.outputs, outputs, layouts)})

    def _check(self, node: Node, op: Op, inputs: list[Value], outputs: list[Value]) -> None:
        """The op must agree with what its sharding string says of its results."""
        if isinstance(op, Call):
            return
        said = tuple(value.type for value in outputs)
        try:
            found = op.output_types(*(value.type for value in inputs))
        except GraphError as error:
            error.add_note(f"on one of {self.ranks} ranks of '{self.mesh}', for %{node.name} in '{self.old.name}'")
            raise
        if found != said:
            text = node.op.factors(*(value.type for value in node.inputs))
            raise CompileError(
                f"%{node.name} = {node.op.name} in '{self.old.name}' gives {', '.join(map(str, found))} on one of {self.ranks} "
                f"ranks, but its sharding string '{text}' says {', '.join(map(str, said))}"
            )

    def _obtain(self, value: Value, layout: Layout) -> Value:
        """``value`` in the form asked for."""
        if value in self.propagation.weights:
            weight = self._weight(value, Layout(layout.cuts))
            return self.convert(weight, WHOLE, layout) if layout.partial else weight
        made, own = self.made[value]
        return self.convert(made, own, layout)

    def _weight(self, value: Value, layout: Layout) -> Value:
        """A weight cut as asked for, as early as its computation allows, so that a rank need not read what it has no use for."""
        key = (value, layout)
        if key not in self.weights:
            self.weights[key] = self._make_weight(value, layout)
        return self.weights[key]

    def _make_weight(self, value: Value, layout: Layout) -> Value:
        if value.kind == "param":
            return self.convert(value, WHOLE, layout)
        node = self.old.producers[value.name]
        if layout.whole:
            made = self._weight_node(node, [WHOLE] * len(node.inputs), [WHOLE] * len(node.outputs))
            self.weights.update({(old, WHOLE): new for old, new in zip(node.outputs, made)})
            return self.weights[value, WHOLE]
        inputs = _weight_inputs(node, layout)
        if inputs is None:
            return self.convert(self._weight(value, WHOLE), WHOLE, layout)
        return self._weight_node(node, inputs, [layout])[0]

    def _weight_node(self, node: Node, inputs: Sequence[Layout], layouts: Sequence[Layout]) -> tuple[Value, ...]:
        given = [self._weight(value, layout) for value, layout in zip(node.inputs, inputs)]
        outputs = []
        for value, layout in zip(node.outputs, layouts):
            name = value.name if layout.whole else free_name(f"{value.name}.cut", self.convert.taken)
            self.convert.taken.add(name)
            outputs.append(replace(self._local(value, layout), name=name))
        op = node.op.resized(*(value.type for value in outputs))
        self._check(node, op, given, outputs)
        origins = node.origins or (node.name,)
        self.convert.nodes.append(replace(node, op=op, inputs=tuple(given), outputs=tuple(outputs), origins=origins))
        return tuple(outputs)


def _cuts(value: Value, operand: Operand, division: Division) -> dict[int, Cut]:
    """How the axes of an operand are divided; an axis of size 1 never is."""
    axes = ((axis, division.axis(f)) for axis, (size, f) in enumerate(zip(value.type.shape, operand.axes)) if size != 1)
    return {axis: cut for axis, cut in axes if cut}


def _weight_inputs(node: Node, layout: Layout) -> list[Layout] | None:
    """The inputs that give the one output of a node in ``layout``; None if the node cannot give it so."""
    factors = node_factors(node)
    if factors is None or len(node.outputs) > 1:
        return None
    sizes, cuts = node_sizes(node, factors), dict[str, Cut]()
    for axis, cut in layout.cuts.items():
        wanted = factor_cuts(factors.outputs[0].axes[axis], cut, sizes)
        if wanted is None or not all(factor in factors.cuttable for factor in wanted):
            return None
        cuts.update(wanted)
    division = Division(sizes, cuts)
    operands = (*factors.inputs, *factors.outputs)
    if any(division.axis(axis) is None for operand in operands for axis in operand.axes):
        return None
    return [Layout(_cuts(value, operand, division)) for value, operand in zip(node.inputs, factors.inputs)]
