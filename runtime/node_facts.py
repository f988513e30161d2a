"""Everything known of one node: where it stands, what it costs, who runs it, and what it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Call, Graph, Node
from deltaloom.graph.op import Cost
from deltaloom.runtime.stages import Stages


@dataclass(frozen=True)
class NodeFacts:
    """A node of ``body``, which runs under each of ``prefixes``. ``cost`` has the symbols of its types; None for a call, whose cost
    is that of its region. ``made_from``: the nodes whose work this one does now, as they were given and after each pass of the
    shared part that changed some of them."""

    name: str
    body: str
    prefixes: tuple[str, ...]
    node: Node
    cost: Cost | None
    made_from: tuple[tuple[str, tuple[Node, ...]], ...]


@dataclass(frozen=True)
class Found:
    """A node that a name means, and its body."""

    body: Graph
    node: Node
    prefixes: tuple[str, ...]


def node_facts(stages: Stages, stage: str, name: str) -> NodeFacts:
    """The node that ``name`` means at a stage: its own name in its body (with or without %), that name behind the prefix of a call
    (``model.layers.3.mlp.router.ids``) or of its body (``linear_layer/mlp.router.ids``), or the name of an output of a node that
    it was made from. ``GraphError`` where that is none, or nodes of several bodies."""
    graph = stages.graph(stage)
    found = find_node(graph, name)
    return NodeFacts(name, found.body.name, found.prefixes, found.node, _cost(found.node), tuple(_history(stages, stage, found)))


def find_node(graph: Graph, name: str) -> Found:
    """See ``node_facts``."""
    wanted = name.removeprefix("%")
    bodies = list(_bodies(graph))
    for names in (_own_names, _origins):
        found = [one for body in bodies for one in _matches(body, wanted, names)]
        if len(found) > 1:
            which = ", ".join(f"{one.body.name}/{one.node.name}" for one in found)
            raise GraphError(f"'{name}' is a node of several bodies; say which: {which}")
        if found:
            return found[0]
    known = {key for body in bodies for node in body.body.nodes for key in (*_own_names(node), *_origins(node))}
    close = get_close_matches(wanted.rpartition("/")[2], sorted(known), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; `deltaloom inspect --after STAGE` prints all of them"
    raise GraphError(f"graph '{graph.name}' has no node '{name}'{hint}")


@dataclass(frozen=True)
class _Body:
    body: Graph
    prefixes: tuple[str, ...]


def _bodies(graph: Graph) -> Iterator[_Body]:
    prefixes: dict[str, list[str]] = {name: [] for name in graph.regions}
    for node in graph.nodes:
        if isinstance(node.op, Call):
            prefixes[node.op.region].append(node.op.prefix)
    yield _Body(graph, ("",))
    for name, region in graph.regions.items():
        yield _Body(region, tuple(prefixes[name]))
    for body in (graph, *graph.regions.values()):
        if body.weights is not None:
            yield _Body(body.weights, ("",) if body is graph else tuple(prefixes[body.name]))


def _matches(body: _Body, wanted: str, names: Callable[[Node], tuple[str, ...]]) -> Iterator[Found]:
    title, _, rest = wanted.rpartition("/")
    local = {rest} if title == body.body.name else set() if title else {wanted}
    if not title:
        local |= {wanted.removeprefix(prefix) for prefix in body.prefixes if prefix and wanted.startswith(prefix)}
    for node in body.body.nodes:
        if not local.isdisjoint(names(node)):
            yield Found(body.body, node, body.prefixes)


def _own_names(node: Node) -> tuple[str, ...]:
    return tuple(value.name for value in node.outputs)


def _origins(node: Node) -> tuple[str, ...]:
    return node.origins


def _cost(node: Node) -> Cost | None:
    if isinstance(node.op, Call):
        return None
    cost: Cost = node.op.cost(*(value.type for value in node.inputs))
    return cost


def _history(stages: Stages, stage: str, found: Found) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """How it was given, then after each pass that changed something of it."""
    shared = stages.shared()
    wanted = {*found.node.origins, *_own_names(found.node)}
    last: tuple[str, ...] = ()
    for earlier in shared[: shared.index(stage)] if stage in shared else shared:
        graph = stages.graph(earlier)
        body = next((one for one in (graph, *graph.regions.values()) if one.name == found.body.name), None)
        nodes = () if body is None else tuple(node for node in body.nodes if wanted & {*_own_names(node), *node.origins})
        lines = tuple(map(_line, nodes))
        if nodes and lines != last:
            yield earlier, nodes
            last = lines


def _line(node: Node) -> str:
    return f"{', '.join(_own_names(node))} = {node.op}({', '.join(map(str, node.inputs))})"
