"""The JSON form of a graph, canonical and versioned, and the fingerprint made from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from deltaloom.graph.dims import Symbol
from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import FORMAT_VERSION, SIGILS, Graph, Node, Placement, Refusal, State, Value, ValueKind
from deltaloom.graph.op import Attribute
from deltaloom.graph.registry import OpRegistry, ops
from deltaloom.graph.types import parse_type
from deltaloom.graph.verify import verify
from deltaloom.graph.versions import check_format, make_op

T = TypeVar("T")
Json = dict[str, Any]


def to_json(graph: Graph, *, sources: bool = True) -> str:
    """The graph as JSON with sorted keys: equal graphs give equal texts. Without ``sources`` the builder's lines are
    left out."""
    document = {
        "format": FORMAT_VERSION,
        "symbols": {name: [s.low, s.high] for name, s in graph.symbols().items()},
        "graph": _graph(graph, sources),
    }
    return json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"


def fingerprint(graph: Graph) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON without the builder's lines."""
    return hashlib.sha256(to_json(graph, sources=False).encode()).hexdigest()


def from_json(text: str, *, registry: OpRegistry = ops) -> Graph:
    """The graph that ``to_json`` wrote, verified. Raises ``GraphError`` for what is no such text, a newer format and
    ops of another version."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise GraphError(f"the graph is not legal JSON: {error}") from error
    if not isinstance(document, dict):
        raise GraphError(f"the JSON graph is {type(document).__name__}, expected an object")
    check_format(_get(document, "format", int, "the document"), "the JSON graph")
    symbols = {}
    for name, limits in _get(document, "symbols", dict, "the document").items():
        low, high = limits if isinstance(limits, list) and len(limits) == 2 else (None, None)
        if type(low) is not int or not (high is None or type(high) is int):
            raise GraphError(f"symbol '{name}' of the JSON graph is {limits!r}, expected [low, high]")
        symbols[name] = Symbol(name, low, high)
    graph = _Reader(symbols, registry).graph(_get(document, "graph", dict, "the document"))
    verify(graph)
    return graph


def _graph(graph: Graph, sources: bool) -> Json:
    return {
        "name": graph.name,
        "inputs": [_declaration(value) for value in graph.inputs],
        "params": [_declaration(value) for value in graph.params],
        "states": [{**_declaration(s.value), "append_axis": s.append_axis} for s in graph.states],
        "nodes": [_node(node, sources) for node in graph.nodes],
        "outputs": [[name, str(value)] for name, value in graph.outputs],
        "updates": [[name, str(value)] for name, value in graph.updates],
        "regions": {name: _graph(region, sources) for name, region in graph.regions.items()},
        "weights": None if graph.weights is None else _graph(graph.weights, sources),
    }


def _declaration(value: Value) -> Json:
    divided = {"sharding": value.sharding} if value.sharding else {}
    return {"name": value.name, "type": str(value.type), **divided}


def _node(node: Node, sources: bool) -> Json:
    document: Json = {
        "op": node.op.name,
        "version": node.op.version,
        "attributes": {name: _stored(value) for name, value in node.op.attributes().items()},
        "inputs": [str(value) for value in node.inputs],
        "outputs": [_declaration(value) for value in node.outputs],
        "scope": node.scope,
        "origins": list(node.origins),
        "placement": None,
    }
    if sources:
        document["source"] = node.source
    if (placed := node.placement) is not None:
        document["placement"] = {
            "backend": placed.backend,
            "kernel": placed.kernel,
            "refusals": [[r.kernel, r.reason] for r in placed.refusals],
            "layouts": [[position, list(axes)] for position, axes in placed.layouts],
        }
    return document


def _stored(attribute: Attribute) -> Any:
    """Tuples as lists; an infinite number as ``{"float": "inf"}``, because JSON has none."""
    if isinstance(attribute, tuple):
        return [_stored(part) for part in attribute]
    if isinstance(attribute, float) and not math.isfinite(attribute):
        return {"float": repr(attribute)}
    return attribute


def _restored(stored: object, where: str) -> Attribute:
    if isinstance(stored, list):
        return tuple(_restored(part, where) for part in stored)
    if stored == {"float": "inf"} or stored == {"float": "-inf"}:
        return math.inf if stored == {"float": "inf"} else -math.inf
    if stored is None or isinstance(stored, (bool, int, float, str)):
        return stored
    raise GraphError(f"{where} is {stored!r}, expected a number, a text, true, false, null or a list of these")


class _Reader:
    """Reads the graphs of one document."""

    def __init__(self, symbols: Mapping[str, Symbol], registry: OpRegistry) -> None:
        self._symbols = symbols
        self._registry = registry

    def graph(self, document: Json) -> Graph:
        name = _get(document, "name", str, "a graph")
        where = f"graph '{name}'"
        inputs = [self._value(d, "input", where) for d in _get(document, "inputs", list, where)]
        params = [self._value(d, "param", where) for d in _get(document, "params", list, where)]
        states = [self._state(d, where) for d in _get(document, "states", list, where)]
        defined = {str(value): value for value in (*inputs, *params, *(state.value for state in states))}
        nodes = [self._node(d, defined, where) for d in _get(document, "nodes", list, where)]
        weights = None if document.get("weights") is None else _get(document, "weights", dict, where)
        return Graph(
            name,
            tuple(inputs),
            tuple(params),
            tuple(states),
            tuple(nodes),
            tuple(_results(document, "outputs", defined, where)),
            tuple(_results(document, "updates", defined, where)),
            {name: self.graph(d) for name, d in _get(document, "regions", dict, where).items()},
            None if weights is None else self.graph(weights),
        )

    def _value(self, document: Json, kind: ValueKind, where: str) -> Value:
        name = _get(document, "name", str, f"{kind} of {where}")
        type_ = parse_type(_get(document, "type", str, f"{SIGILS[kind]}{name} of {where}"), self._symbols)
        sharding = _get(document, "sharding", str, f"{SIGILS[kind]}{name} of {where}") if "sharding" in document else ""
        return Value(name, type_, kind, sharding)

    def _state(self, document: Json, where: str) -> State:
        value = self._value(document, "state", where)
        grows = document.get("append_axis") is not None
        return State(value, _get(document, "append_axis", int, f"state '{value.name}'") if grows else None)

    def _node(self, document: Json, defined: dict[str, Value], where: str) -> Node:
        outputs = tuple(self._value(d, "node", where) for d in _get(document, "outputs", list, f"a node of {where}"))
        here = f"%{outputs[0].name} of {where}" if outputs else f"a node of {where}"
        inputs = tuple(_use(name, defined, here) for name in _get(document, "inputs", list, here))
        attributes = _get(document, "attributes", dict, here)
        op = make_op(
            _get(document, "op", str, here),
            _get(document, "version", int, here),
            {key: _restored(value, f"attribute '{key}' of {here}") for key, value in attributes.items()},
            self._registry,
        )
        defined.update({str(value): value for value in outputs})
        return Node(
            op,
            inputs,
            outputs,
            _get(document, "scope", str, here),
            _get(document, "source", str, here) if "source" in document else "",
            tuple(map(str, _get(document, "origins", list, here))),
            None if document.get("placement") is None else _placement(_get(document, "placement", dict, here), here),
        )


def _placement(document: Json, where: str) -> Placement:
    try:
        refusals = tuple(Refusal(str(kernel), str(reason)) for kernel, reason in _get(document, "refusals", list, where))
        layouts = tuple(
            (int(position), tuple(int(axis) for axis in axes)) for position, axes in _get(document, "layouts", list, where)
        )
    except (TypeError, ValueError) as error:
        raise GraphError(f"the placement of {where} has refusals or layouts that are not lists of pairs: {error}") from error
    backend, kernel = _get(document, "backend", str, where), _get(document, "kernel", str, where)
    return Placement(backend, kernel, refusals, layouts)


def _results(document: Json, key: str, defined: Mapping[str, Value], where: str) -> list[tuple[str, Value]]:
    found = []
    for pair in _get(document, key, list, where):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise GraphError(f"'{key}' of {where} has {pair!r}, expected [name, value]")
        found.append((pair[0], _use(pair[1], defined, f"'{key}' of {where}")))
    return found


def _use(name: object, defined: Mapping[str, Value], where: str) -> Value:
    if not isinstance(name, str) or name not in defined:
        raise GraphError(f"{where} uses {name}, which is not defined before it")
    return defined[name]


def _get(document: object, key: str, kind: type[T], where: str) -> T:
    """``document[key]``, which must exist and be a ``kind``."""
    if not isinstance(document, dict) or key not in document:
        raise GraphError(f"{where} in the JSON graph has no '{key}'")
    value = document[key]
    if type(value) is not kind:
        raise GraphError(f"'{key}' of {where} is {value!r} in the JSON graph, expected {kind.__name__}")
    return value
