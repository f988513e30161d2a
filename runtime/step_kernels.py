"""Every kernel of a decode step alone: its time beside what it has to move and to compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from deltaloom.graph.ir import Node
from deltaloom.passes.cost import Work, graph_work
from deltaloom.runtime.decode_bench import DecodeBench
from deltaloom.runtime.device_profile import DeviceProfile
from deltaloom.runtime.observe import node_runner, observe_program
from deltaloom.runtime.roofline import Step

MOST_SETS = 8
"""Calls of a body whose arguments a kernel is timed on in turn: their weights are others."""
REPETITIONS = 7


@runtime_checkable
class TimesKernels(Protocol):
    """A backend that times kernels on its device."""

    def kernel_seconds(self, run: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> tuple[float, str]:
        """Seconds of a call on the arguments of each of ``sets`` in turn, and how it was timed."""


@dataclass(frozen=True)
class KernelTime:
    """A node of a body, which runs ``calls`` times a step: ``seconds`` and ``work`` of one call. ``floor``: the least seconds of a
    call, None without a profile; ``timed``: by "graph" replays, "launched" one by one, or by the clock of the "host"."""

    body: str
    node: str
    op: str
    kernel: str
    calls: int
    work: Work
    seconds: float
    floor: float | None
    timed: str

    @property
    def total(self) -> float:
        """Seconds of all calls of a step."""
        return self.calls * self.seconds


def kernel_times(bench: DecodeBench, batch: int, context: int, *, profile: DeviceProfile | None) -> list[KernelTime]:
    """The kernels of a step of ``batch`` sequences at ``context`` tokens, those that take longest together first. Raises
    ``ConfigError`` for sizes that cannot be."""
    step, pools, _ = bench.ready(batch, context, steps=1)
    bodies = {id(node): instance.graph.name for instance in bench.program.graph.instances() for node in instance.graph.nodes}
    found: dict[tuple[str, str], tuple[Node, list[list[Any]]]] = {}

    def note(name: str, node: Node, arguments: Sequence[Any]) -> None:
        _, sets = found.setdefault((bodies[id(node)], node.name), (node, []))
        if len(sets) < MOST_SETS:
            sets.append(list(arguments))

    arguments = (*step.arguments, bench.weight_tensors, dict(pools.fixed), dict(pools.append))
    observe_program(bench.program, bench.context, arguments, lambda *_: None, note)
    counted = graph_work(bench.base(batch, context).graph, Step("decode", batch, 1, context).sizes)
    works = {(one.body, one.node.name): one for one in counted.nodes}
    home = bench.backend
    rows = []
    for (body, name), (node, sets) in found.items():
        run = node_runner(bench.context, node)
        seconds, timed = home.kernel_seconds(run, sets) if isinstance(home, TimesKernels) else _by_clock(run, sets)
        one, calls = works.get((body, name)), counted.calls[body]
        work = Work() if one is None else one.work
        floor = None if profile is None or one is None else profile.seconds(work, one.dtype)
        kernel = node.placement.kernel if node.placement else ""
        rows.append(KernelTime(body, name, node.op.name, kernel, calls, work, seconds, floor, timed))
    return sorted(rows, key=lambda row: -row.total)


def summed(rows: Sequence[KernelTime]) -> dict[str, float]:
    """Seconds of a step by kernel, the longest first."""
    totals: dict[str, float] = defaultdict(float)
    for row in rows:
        totals[row.kernel] += row.total
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _by_clock(run: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> tuple[float, str]:
    for arguments in sets:
        run(*arguments)
    times = []
    for _ in range(REPETITIONS):
        for arguments in sets:
            started = perf_counter()
            run(*arguments)
            times.append(perf_counter() - started)
    return median(times), "host"
