"""Reading the text form of a graph (see ``deltaloom.graph.text`` for its grammar)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaloom.graph.dims import Symbol
from deltaloom.graph.errors import GraphError, PluginError
from deltaloom.graph.ir import SIGILS, Graph, Node, Placement, Refusal, State, Value, ValueKind
from deltaloom.graph.op import Attribute, Op
from deltaloom.graph.registry import OpRegistry, ops
from deltaloom.graph.scan import Line
from deltaloom.graph.verify import verify
from deltaloom.graph.versions import check_format, make_op

SECTIONS = ("inputs", "params", "states", "nodes", "outputs", "updates")


def parse_graph(text: str, *, registry: OpRegistry = ops) -> Graph:
    """The graph that ``print_graph`` printed as ``text``, verified. Raises ``GraphError`` that shows the line at fault,
    also for a newer format and for ops of another version."""
    lines = [Line(number, line) for number, line in enumerate(text.split("\n"), 1)]
    lines = [line for line in lines if line.text.strip() and line.text.strip()[0] != "#"]
    if not lines:
        raise GraphError("the graph text is empty; it begins with 'graph NAME (format 1)'")
    header = lines[0]
    header.expect("graph")
    name = header.word("the graph's name")
    header.expect("(format")
    check_format(header.integer("the format's number"), f"the text of graph '{name}'")
    header.expect(")")
    header.end()
    symbols: dict[str, Symbol] = {}
    start = 1
    if len(lines) > 1 and lines[1].take("symbols"):
        symbols = _symbols(lines[1])
        start = 2
    reader = _Reader(lines, symbols, registry, start)
    graph = reader.graph(name, 0)
    if reader.next is not None:
        reader.next.fail(f"expected one of the sections {', '.join(SECTIONS)}, a weights or a region line")
    verify(graph)
    return graph


def _symbols(line: Line) -> dict[str, Symbol]:
    found: dict[str, Symbol] = {}
    while True:
        low = line.found(r"-?\d+(?= *<=)")
        if low is not None:
            line.expect("<=")
        name = line.found(r"\w+")
        if name is None or name in found:
            line.fail("expected a new symbol such as 'past >= 0' or '1 <= seq <= 64'")
        line.expect(">=" if low is None else "<=")
        bound = line.integer("a bound")
        found[name] = Symbol(name, bound) if low is None else Symbol(name, int(low), bound)
        if line.ended():
            return found
        line.expect(",")


@dataclass
class _Parts:
    """What has been read of one graph."""

    inputs: list[Value] = field(default_factory=list)
    params: list[Value] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[tuple[str, Value]] = field(default_factory=list)
    updates: list[tuple[str, Value]] = field(default_factory=list)
    regions: dict[str, Graph] = field(default_factory=dict)
    weights: Graph | None = None
    defined: dict[str, Value] = field(default_factory=dict)

    def use(self, line: Line) -> Value:
        """The value that is named next."""
        name = line.reference()
        if name not in self.defined:
            line.fail(f"{name} is not defined in the lines before")
        return self.defined[name]


class _Reader:
    """Reads the blocks of a text from line ``position`` on, by their indentation."""

    def __init__(self, lines: list[Line], symbols: Mapping[str, Symbol], registry: OpRegistry, position: int) -> None:
        self._lines = lines
        self._symbols = symbols
        self._registry = registry
        self._position = position

    @property
    def next(self) -> Line | None:
        """The line that comes next, None at the end."""
        return self._lines[self._position] if self._position < len(self._lines) else None

    def graph(self, name: str, indent: int) -> Graph:
        """The graph whose section titles stand at ``indent``."""
        parts = _Parts()
        while (line := self._line(indent)) is not None:
            if line.take("region"):
                key = line.word("the region's name")
                line.end()
                if key in parts.regions:
                    line.fail(f"there are two regions '{key}'")
                parts.regions[key] = self.graph(key, indent + 2)
            elif line.take("weights"):
                key = line.word("the weight graph's name")
                line.end()
                parts.weights = self.graph(key, indent + 2)
            else:
                title = next((title for title in SECTIONS if line.take(title)), None)
                if title is None:
                    line.fail(f"expected one of the sections {', '.join(SECTIONS)}, a weights or a region line")
                line.end()
                while (entry := self._line(indent + 2)) is not None:
                    self._entry(title, entry, parts)
                    entry.end()
        p = parts
        return Graph(
            name,
            tuple(p.inputs),
            tuple(p.params),
            tuple(p.states),
            tuple(p.nodes),
            tuple(p.outputs),
            tuple(p.updates),
            p.regions,
            p.weights,
        )

    def _line(self, indent: int) -> Line | None:
        line = self.next
        if line is None or line.indent < indent:
            return None
        if line.indent > indent:
            line.fail(f"this line is indented by {line.indent} blanks, expected {indent}")
        self._position += 1
        return line

    def _entry(self, title: str, line: Line, parts: _Parts) -> None:
        if title == "nodes":
            parts.nodes.append(self._node(line, parts))
        elif title in ("outputs", "updates"):
            name = line.word("a name")
            line.expect("=")
            (parts.outputs if title == "outputs" else parts.updates).append((name, parts.use(line)))
        elif title == "states":
            value = self._declaration(line, "state", parts)
            axis = line.integer("an axis") if line.take("append axis") else None
            parts.states.append(State(value, axis))
        else:
            value = self._declaration(line, "input" if title == "inputs" else "param", parts)
            (parts.inputs if title == "inputs" else parts.params).append(value)

    def _declaration(self, line: Line, kind: ValueKind, parts: _Parts) -> Value:
        name = line.reference()
        if name[0] != SIGILS[kind]:
            line.fail(f"{name} should begin with '{SIGILS[kind]}' here")
        if name in parts.defined:
            line.fail(f"{name} is defined twice")
        line.expect(":")
        value = Value(name[1:], line.type(self._symbols), kind, line.sharding())
        parts.defined[name] = value
        return value

    def _node(self, line: Line, parts: _Parts) -> Node:
        outputs = line.items(lambda: self._declaration(line, "node", parts), "=")
        for value in outputs:
            del parts.defined[str(value)]
        op_name = line.word("an op's name")
        version = line.integer("a version") if line.found(r"v(?=\d)") else 1
        line.expect("(")
        inputs = line.items(lambda: parts.use(line), ")")
        attributes = dict(line.items(lambda: _attribute(line), "}")) if line.take("{") else {}
        op = self._op(line, op_name, version, attributes)
        placement = _placement(line) if line.take("on") else None
        parts.defined.update({str(value): value for value in outputs})
        scope, source, origins = _comment(line)
        return Node(op, tuple(inputs), tuple(outputs), scope, source, origins, placement)

    def _op(self, line: Line, name: str, version: int, attributes: Mapping[str, Attribute]) -> Op:
        try:
            return make_op(name, version, attributes, self._registry)
        except (GraphError, PluginError) as error:
            line.fail(str(error))


def _attribute(line: Line) -> tuple[str, Attribute]:
    name = line.word("an attribute's name")
    line.expect("=")
    return name, line.literal()


def _placement(line: Line) -> Placement:
    backend, kernel = line.word("a backend"), line.word("a kernel")
    layouts: list[tuple[int, tuple[int, ...]]] = []
    refusals: list[Refusal] = []
    while line.take(","):
        if line.take("input"):
            position = line.integer("the position of an input")
            line.expect("stored (")
            layouts.append((position, tuple(line.items(lambda: line.integer("an axis"), ")"))))
        else:
            line.expect("not")
            refused = line.word("a kernel")
            line.expect(":")
            refusals.append(Refusal(refused, line.quoted("the reason")))
    return Placement(backend, kernel, tuple(refusals), tuple(layouts))


def _comment(line: Line) -> tuple[str, str, tuple[str, ...]]:
    """Scope, source and origins of a node."""
    if not line.take("#"):
        return "", "", ()
    scope = "" if line.ahead("at") or line.ahead("from") else line.word("a scope")
    source = line.word("the builder's line") if line.take("at") else ""
    origins: list[str] = []
    if line.take("from"):
        origins.append(line.word("the name of a value"))
        while line.take(","):
            origins.append(line.word("the name of a value"))
    return scope, source, tuple(origins)
