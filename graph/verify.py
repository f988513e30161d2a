"""The verifier: every rule of the IR, checked after every edit and pass. Errors show the lines around the fault."""

from __future__ import annotations

import math
import re
from typing import NoReturn

from deltaloom.graph.dims import Symbol, bounds
from deltaloom.graph.errors import GraphError, VerifyError
from deltaloom.graph.ir import Call, Graph, Node, State, Value, ValueKind, names_apart
from deltaloom.graph.neighbourhood import Fault, neighbourhood
from deltaloom.graph.op import Attribute
from deltaloom.graph.text import declaration
from deltaloom.graph.types import TensorType

NAME = re.compile(r"[\w./-]+")
_PASSED = "_verified"


def verify(graph: Graph, *, after: str = "") -> None:
    """Raise ``VerifyError`` unless ``graph`` and its regions keep every rule; ``after`` names the pass that made it.

    Graphs never change, so one that has passed is not looked at again."""
    if graph.__dict__.get(_PASSED):
        return
    symbols: dict[str, Symbol] = {}
    top = _Check(graph, graph, after, symbols)
    for name, region in graph.regions.items():
        check = _Check(region, graph, after, symbols)
        check.require(region.name == name, f"the region called '{name}' names itself '{region.name}'")
        check.require(not region.regions, f"region '{name}' owns regions itself, which only the top level may")
        check.require(bool(region.outputs), f"region '{name}' has no outputs")
        check.run()
    top.run()
    _check_calls(top)
    for owner in (graph, *graph.regions.values()):
        if owner.weights is not None:
            verify(owner.weights, after=after)
            _check_weights(_Check(owner, graph, after, symbols), owner.weights)
    graph.__dict__[_PASSED] = True


class _Check:
    """The rules of one graph or region."""

    def __init__(self, graph: Graph, top: Graph, after: str, symbols: dict[str, Symbol]) -> None:
        self.graph = graph
        self.top = top
        self.after = after
        self.symbols = symbols
        self.defined: dict[str, Value] = {}

    def run(self) -> None:
        """Check everything but what calls share."""
        self.require(bool(NAME.fullmatch(self.graph.name)), _name_rule("graph", self.graph.name))
        for kind, values in self._declared().items():
            for value in values:
                self.require(value.kind == kind, f"{value} is declared with the {kind}s, but calls itself a {value.kind}", value)
                self._define(value, value)
        for node in self.graph.nodes:
            self._check_node(node)
        self._check_outputs()
        self._check_updates()

    def require(self, condition: bool, message: str, fault: Fault = None) -> None:
        """``fail`` unless ``condition`` holds."""
        if not condition:
            self.fail(message, fault)

    def fail(self, message: str, fault: Fault = None) -> NoReturn:
        """Raise a ``VerifyError`` with the lines around ``fault`` and where it was built."""
        where = f"graph '{self.graph.name}'" if self.graph is self.top else f"region '{self.graph.name}' of '{self.top.name}'"
        after = f" after pass '{self.after}'" if self.after else ""
        text = f"{where}{after}: {message}" + neighbourhood(self.graph, fault)
        if isinstance(fault, Node):
            history = [f"built at {fault.source}"] if fault.source else []
            history += ["replaced " + ", ".join(f"%{name}" for name in fault.origins)] if fault.origins else []
            text += f"\n  {', '.join(history)}" if history else ""
        raise VerifyError(text)

    def _declared(self) -> dict[ValueKind, list[Value]]:
        states = [state.value for state in self.graph.states]
        return {"input": list(self.graph.inputs), "param": list(self.graph.params), "state": states}

    def _define(self, value: Value, fault: Fault) -> None:
        # Thousands of weights come by here, so messages are written only where they are needed.
        text = str(value)
        if not NAME.fullmatch(value.name):
            self.fail(_name_rule(value.kind, value.name), fault)
        if text in self.defined:
            self.fail(f"{value} is defined twice", fault)
        if value.sharding and set(value.sharding) & set("{}"):
            self.fail(f"the sharding of {value} is '{value.sharding}', which may have no braces", fault)
        self.defined[text] = value
        for symbol in value.type.ordered_symbols:
            known = self.symbols.setdefault(symbol.name, symbol)
            if symbol is not known and symbol != known:
                self.fail(f"symbol '{symbol.name}' is {_range(symbol)} in {declaration(value)}, but {_range(known)} before", fault)

    def _check_use(self, value: Value, user: str, fault: Fault) -> None:
        known = self.defined.get(str(value))
        if known is None:
            makers = [node for node in self.graph.nodes if str(value) in map(str, node.outputs)]
            later = "is used before it is defined" if makers else "is not defined"
            self.fail(f"{user} uses {value}, which {later}", fault)
        if known != value:
            self.require(
                known.type == value.type,
                f"{user} uses {value} as {value.type}, but it was defined as {known.type}",
                fault,
            )
            self.fail(f"{user} uses {value} as {value.kind}, but it was defined as {known.kind}", fault)

    def _check_node(self, node: Node) -> None:
        if not node.outputs:
            self.fail(f"{node.op.name} has no outputs", node)
        for value in node.inputs:
            if str(value) not in self.defined or self.defined[str(value)] is not value:
                self._check_use(value, f"%{node.name}", node)
        if not node.__dict__.get(_PASSED):
            self._check_alone(node)
        for value in node.outputs:
            self._define(value, node)

    def _check_alone(self, node: Node) -> None:
        """What holds of a node wherever it stands. Most nodes of a graph come from the one before, where they have passed."""
        for name, attribute in node.op.attributes().items():
            self._check_attribute(attribute, f"attribute '{name}' of %{node.name} = {node.op.name}", node)
        self._check_types(node)
        for value in node.outputs:
            if value.kind != "node":
                self.fail(f"{value} is made by a node, but calls itself a {value.kind}", node)
        if not isinstance(node.op, Call):  # whose types are those of a region
            node.__dict__[_PASSED] = True

    def _check_attribute(self, attribute: Attribute, where: str, node: Node) -> None:
        if isinstance(attribute, tuple):
            for part in attribute:
                self._check_attribute(part, where, node)
            return
        plain = type(attribute) in (int, float, bool, str, type(None))
        self.require(
            plain,
            f"{where} is a {type(attribute).__name__}; expected numbers, strings, booleans, None or tuples of them",
            node,
        )
        self.require(not (isinstance(attribute, float) and math.isnan(attribute)), f"{where} is not a number", node)

    def _check_types(self, node: Node) -> None:
        if isinstance(node.op, Call):
            self._check_call(node, node.op)
        try:
            types = self.graph.node_types(node)
        except GraphError as error:
            self.fail(f"%{node.name} is refused: {error}", node)
        if len(types) != len(node.outputs):
            self.fail(f"%{node.name} has {len(node.outputs)} outputs, but {_op_text(node)} gives {len(types)}", node)
        for value, type_ in zip(node.outputs, types, strict=True):
            if value.type != type_:
                self.fail(f"{value} has type {value.type}, but {_op_text(node)} gives {type_}", node)

    def _check_call(self, node: Node, call: Call) -> None:
        self.require(self.graph is self.top, f"%{node.name} calls region '{call.region}' from a region; calls do not nest", node)
        if call.region not in self.top.regions:
            has = ", ".join(self.top.regions) or "none"
            self.fail(f"%{node.name} calls region '{call.region}', which does not exist; there is {has}", node)
        region = self.top.regions[call.region]
        if len(node.inputs) != len(region.inputs):
            self.fail(
                f"%{node.name} gives {len(node.inputs)} inputs to {_op_text(node)}, which takes {len(region.inputs)}",
                node,
            )
        for given, wanted in zip(node.inputs, region.inputs, strict=True):
            self.require(
                given.type == wanted.type,
                f"%{node.name} gives {declaration(given)} to {_op_text(node)}, whose input is {declaration(wanted)}",
                node,
            )

    def _check_outputs(self) -> None:
        seen: set[str] = set()
        for name, value in self.graph.outputs:
            fault = f"output {name}"
            self.require(bool(NAME.fullmatch(name)), _name_rule("output", name), fault)
            self.require(name not in seen, f"output '{name}' is given twice", fault)
            seen.add(name)
            self._check_use(value, f"output '{name}'", fault)

    def _check_updates(self) -> None:
        states = {state.name: state for state in self.graph.states}
        seen: set[str] = set()
        for name, value in self.graph.updates:
            fault = f"update {name}"
            self.require(name in states, f"'{name}' is updated, but is no state", fault)
            self.require(name not in seen, f"state '{name}' is updated twice", fault)
            seen.add(name)
            self._check_use(value, f"the update of state '{name}'", fault)
            self._check_growth(states[name], value, fault)
        for name, state in states.items():
            self.require(name in seen, f"state '{name}' is never updated", state.value)

    def _check_growth(self, state: State, new: Value, fault: str) -> None:
        old, axis = state.value.type, state.append_axis
        if axis is None:
            self.require(new.type == old, f"state '{state.name}' is {old} and of fixed size, but its update is {new.type}", fault)
            return
        self.require(0 <= axis < old.rank, f"state '{state.name}': {old} has no axis {axis} to append to", state.value)
        same = new.type.dtype == old.dtype and new.type.rank == old.rank
        rest = same and all(new.type.shape[i] == old.shape[i] for i in range(old.rank) if i != axis)
        self.require(
            rest and _grows(old, new.type, axis),
            f"state '{state.name}' is {old} and grows along axis {axis}, but its update is {new.type}",
            fault,
        )


def _check_calls(check: _Check) -> None:
    """Prefixes differ, no state has two owners, a parameter's type is the same for all, every region is called."""
    graph = check.graph
    prefixes: dict[str, str] = {}
    apart = names_apart(graph)
    owners = {state.name: "the top level" for state in graph.states}
    params = {value.name: value.type for value in graph.params}
    for node in graph.nodes:
        if not isinstance(node.op, Call):
            continue
        prefix = node.op.prefix
        check.require(prefix not in prefixes, f"%{node.name} and %{prefixes.get(prefix)} share the prefix '{prefix}'", node)
        prefixes[prefix] = node.name
        region = graph.regions[node.op.region]
        for state in region.states:
            full = prefix + state.name
            check.require(full not in owners, f"%{node.name} shares state '{full}' with {owners.get(full)}", node)
            owners[full] = f"%{node.name}"
        for value in () if apart else region.params:
            known = params.setdefault(prefix + value.name, value.type)
            if known is not value.type and known != value.type:
                check.fail(f"%{node.name} has parameter '{prefix}{value.name}' as {value.type}, another use as {known}", node)
    called = {node.op.region for node in graph.nodes if isinstance(node.op, Call)}
    for name in graph.regions:
        check.require(name in called, f"region '{name}' is never called")


def _check_weights(check: _Check, weights: Graph) -> None:
    """A weight graph computes parameters of its owner from parameters alone."""
    label = f"the weight graph '{weights.name}'"
    check.require(not weights.inputs and not weights.states, f"{label} has inputs or states; it may have parameters only")
    params = {value.name: value for value in check.graph.params}
    made = {name for name, _ in weights.outputs}
    for value in check.graph.params:
        check.require(value.name in made, f"{label} does not give {value}", value)
    for name, value in weights.outputs:
        check.require(name in params, f"{label} gives '{name}', which is no parameter")
        wanted = params[name]
        check.require(value.type == wanted.type, f"{label} gives '{name}' as {value.type}, not {wanted.type}", wanted)


def _grows(old: TensorType, new: TensorType, axis: int) -> bool:
    try:
        return bounds(new.shape[axis] - old.shape[axis])[0] >= 0
    except GraphError:
        return False


def _name_rule(kind: str, name: str) -> str:
    return f"the {kind} name '{name}' is not legal; names have letters, digits and . _ - /, at least one"


def _range(symbol: Symbol) -> str:
    return f"{symbol.low} or more" if symbol.high is None else f"{symbol.low} to {symbol.high}"


def _op_text(node: Node) -> str:
    return f"region '{node.op.region}'" if isinstance(node.op, Call) else node.op.name
