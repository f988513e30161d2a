"""Passes are data with a contract; the pipeline runs them in order and verifies the graph after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from deltaloom.graph.errors import CompileError, DeltaloomError
from deltaloom.graph.ir import Graph
from deltaloom.graph.serialize import to_json
from deltaloom.graph.text import print_graph
from deltaloom.graph.verify import verify
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.kernel import Backend
from deltaloom.passes.table import check_order


@dataclass(frozen=True)
class Event:
    """What a rule did at a node, or why it did nothing there. A *near miss* is a node of the op that the rule begins with. A node
    *taken apart* is one that no kernel runs whole; its ``rule`` is its op, and the reason what kernels said."""

    kind: Literal["hit", "refused", "near miss", "out of fuel", "taken apart"]
    rule: str
    graph: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.rule} at {self.node} of '{self.graph}': {self.reason}"


@dataclass
class Fuel:
    """How many rewrites are left; None: any number. To find the one that breaks a program, halve it."""

    left: int | None = None

    def burn(self) -> bool:
        """Take one; False when there is none."""
        if self.left is not None:
            if self.left <= 0:
                return False
            self.left -= 1
        return True


@dataclass(frozen=True)
class Context:
    """What passes may use: the configuration and the backends it names, in order. ``events`` is where a pass notes what it did;
    the pipeline puts it into the pass's ledger row; ``fuel`` is shared by all passes that rewrite."""

    config: CompileConfig = field(default_factory=CompileConfig)
    backends: tuple[Backend, ...] = ()
    events: list[Event] = field(default_factory=list, compare=False, repr=False)
    fuel: Fuel = field(default_factory=Fuel, compare=False, repr=False)

    def backend(self, name: str) -> Backend:
        """The backend called ``name``."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise CompileError(f"backend '{name}' is not among those of this configuration: {[b.name for b in self.backends]}")


@dataclass(frozen=True)
class Pass:
    """One sentence of work on a graph. Fields are options; ``requires`` and ``establishes`` are property names."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    establishes: ClassVar[tuple[str, ...]] = ()
    excludes: ClassVar[tuple[str, ...]] = ()
    """Properties that must not hold yet: the pass has to run before what establishes them."""
    given: ClassVar[tuple[str, ...]] = ()
    """Fields that the driver fills: facts about a program or of the configuration, which are no options of a pipeline's step."""

    @property
    def idle(self) -> bool:
        """Whether these options ask for nothing, so that the pass can be left out."""
        return False

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The new graph; the given one stays as it is."""
        raise CompileError(f"pass {self.name} has no run")

    def each(self, graph: Graph, ctx: Context) -> Graph:
        """``region`` applied to the top level and to every region."""
        changed = graph.map_regions(lambda region: self.region(region, ctx))
        return self.region(changed, ctx)

    def region(self, graph: Graph, ctx: Context) -> Graph:
        """The work on one graph or region, for passes that do the same to all of them."""
        return graph


@dataclass(frozen=True)
class LedgerRow:
    """What one pass did: nodes of each body before and after, its time, and what it noted."""

    name: str
    before: dict[str, int]
    after: dict[str, int]
    seconds: float
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """The graph after a pipeline, the properties it has, and one ledger row a pass."""

    graph: Graph
    properties: frozenset[str]
    ledger: tuple[LedgerRow, ...]


Watch = Callable[[str, Graph], None]
"""Called after a pass with its name and the graph that it gave."""


def run_pipeline(
    graph: Graph,
    passes: Sequence[Pass],
    ctx: Context,
    *,
    properties: frozenset[str] = frozenset(),
    title: str = "shared",
    watch: Watch | None = None,
) -> Compiled:
    """Run ``passes`` in order; ``title`` names the program in dumps, ``watch`` sees the graph after each pass. Raises
    ``CompileError`` for an order whose ``requires`` are not met, before running any pass."""
    check_order(passes, properties)
    ledger = []
    verify(graph)
    for step in passes:
        start = time.perf_counter()
        before = graph
        events: list[Event] = []
        try:
            graph = step.run(before, replace(ctx, events=events))
            verify(graph, after=step.name)
        except DeltaloomError as error:
            folder = _repro(before, step, ctx.config)
            saved = f"; its input is in {folder}" if folder else ""
            error.add_note(f"in pass '{step.name}' on graph '{before.name}'{saved}")
            raise
        seconds = time.perf_counter() - start
        ledger.append(LedgerRow(step.name, node_counts(before), node_counts(graph), seconds, tuple(events)))
        properties = properties.union(step.establishes)
        if watch is not None:
            watch(step.name, graph)
        if ctx.config.dump and graph != before:
            _dump(graph, f"{title}-{len(ledger):02d}-{step.name}", Path(ctx.config.dump))
    return Compiled(graph, properties, tuple(ledger))


def node_counts(graph: Graph) -> dict[str, int]:
    """Nodes of the top level and of each region."""
    return {graph.name: len(graph.nodes), **{name: len(region.nodes) for name, region in graph.regions.items()}}


def _dump(graph: Graph, title: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{graph.name}-{title}.txt").write_text(print_graph(graph), encoding="utf-8")
    except OSError as error:
        raise CompileError(f"cannot write the graph dump to {folder}: {error.strerror}; choose another folder for dump") from error


def _repro(graph: Graph, step: Pass, config: CompileConfig) -> Path | None:
    """With a dump folder configured, leave the failing pass's input as text, JSON and a script that runs it again."""
    if not config.dump:
        return None
    folder = Path(config.dump) / "repro" / step.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "graph.txt").write_text(print_graph(graph), encoding="utf-8")
        (folder / "graph.json").write_text(to_json(graph), encoding="utf-8")
        imports = "\n".join(sorted(set(_imports(step))))
        script = _SCRIPT.format(imports=imports, step=step, config=replace(config, dump=None))
        (folder / "run.py").write_text(script, encoding="utf-8")
    except OSError:
        return None
    return folder


def _imports(value: object) -> Iterator[str]:
    """What a script has to import where ``value`` stands in it as its representation."""
    if is_dataclass(value) and not isinstance(value, type):
        yield f"from {type(value).__module__} import {type(value).__qualname__}"
        for field_ in fields(value):
            yield from _imports(getattr(value, field_.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _imports(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _imports(item)


_SCRIPT = '''"""Run the failing pass again on its saved input."""
import pathlib

import deltaloom.ops
from deltaloom.backends import backend
from deltaloom.graph.serialize import from_json
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.pipeline import Context, run_pipeline
{imports}

config = {config!r}
backends = tuple(backend(name, device=config.device, threads=config.threads, use=config.use) for name in config.backends)
step = {step!r}
graph = from_json((pathlib.Path(__file__).parent / "graph.json").read_text())
print(run_pipeline(graph, [step], Context(config, backends), properties=frozenset(step.requires)).graph)
'''
