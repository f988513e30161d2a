"""The JSON form of a graph, canonical and versioned, and the fingerprint made from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from deltaloom.graph.dims import Symbol
from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import FORMAT_VERSION, Call, Graph, Node, Placement, Refusal, State, Value, ValueKind
from deltaloom.graph.op import Attribute, Op
from deltaloom.graph.registry import OpRegistry, ops
from deltaloom.graph.types import parse_type
from deltaloom.graph.verify import verify

T = TypeVar("T")
Json = dict[str, Any]


def to_json(graph: Graph, *, sources: bool = True) -> str:
    """The graph as JSON with sorted keys: equal graphs give equal texts. Without ``sources`` the builder's lines are left
    out."""
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
    """The graph that ``to_json`` wrote, verified. Raises ``GraphError`` for what is no such text, a newer format and ops of
    another version."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise GraphError(f"the graph is not legal JSON: {error}") from error
    if not isinstance(document, dict):
        _wrong("the document", document, "an object")
    check_format(_get(document, "format", int, "the document"), "the JSON graph")
    symbols = {}
    for name, bounds in _get(document, "symbols", dict, "the document").items():
        if not (isinstance(bounds, list) and len(bounds) == 2 and type(bounds[0]) is int):
            _wrong(f"symbol '{name}'", bounds, "[low, high]")
        if type(bounds[1]) not in (int, NoneType):
            _wrong(f"symbol '{name}'", bounds, "[low, high]")
        symbols[name] = Symbol(name, bounds[0], bounds[1])
    graph = _Reader(symbols, registry).graph(_get(document, "graph", dict, "the document"))
    verify(graph)
    return graph


def check_format(version: int, what: str) -> None:
    """Refuse a format that this version does not know."""
    if not 1 <= version <= FORMAT_VERSION:
        raise GraphError(
            f"{what} has format {version}, and this deltaloom reads up to format {FORMAT_VERSION}; "
            "read it with a newer deltaloom or write it again"
        )


def make_op(name: str, version: int, attributes: Mapping[str, Attribute], registry: OpRegistry) -> Op:
    """The op with these attributes. Raises ``GraphError`` for an unknown op, another version of it, an attribute that is
    unknown or of a wrong type, or one that is missing and has no default."""
    cls = Call if name == Call.name else registry.get(name)
    if version != cls.version:
        raise GraphError(
            f"op {name} is stored in version {version}, and this deltaloom has version {cls.version}, whose meaning "
            "differs; build the graph again"
        )
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(attributes) - set(known)):
        raise GraphError(f"op {name} has no attribute '{unknown[0]}'; it has {', '.join(sorted(known)) or 'none'}")
    hints = get_type_hints(cls)
    for key, field in known.items():
        if key not in attributes and field.default is MISSING:
            raise GraphError(f"op {name} needs the attribute '{key}'")
        if key in attributes and not _fits(attributes[key], hints[key]):
            raise GraphError(f"attribute '{key}' of op {name} is {attributes[key]!r}, expected {field.type}")
    return cls(**attributes)


def _fits(value: Attribute, hint: Any) -> bool:
    """Whether ``value`` may stand for an attribute declared as ``hint``; an integer may stand for a float."""
    if isinstance(hint, UnionType) or get_origin(hint) is not tuple and get_args(hint):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(_fits(v, part) for v, part in zip(value, parts, strict=True))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _graph(graph: Graph, sources: bool) -> Json:
    body: Json = {
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
    return body


def _declaration(value: Value) -> Json:
    return {"name": value.name, "type": str(value.type)}
