"""Which rules each op has, and which kernels of each backend run it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deltaloom.backends import TABLE, backend
from deltaloom.backends import names as backend_names
from deltaloom.graph.errors import DeltaloomError
from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.ops import TABLE as BUILT_IN
from deltaloom.passes.kernel import Backend, Kernel, kernels_for

RULES = ("reference", "decompose", "torch", "onnx", "cost", "sharding", "laws", "cases")
Reach = Literal["any", "some", "parts", "none"]
"""Of an op on a backend: a kernel that takes any node, kernels for some nodes, its parts only, or nothing."""
COMPUTE_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class OpCoverage:
    """An op: its rules, and by backend its kernels, in the order in which they are asked, and what they reach."""

    op: type[Op]
    rules: tuple[str, ...]
    kernels: Mapping[str, tuple[str, ...]]
    reach: Mapping[str, Reach]

    @property
    def formula(self) -> str:
        """The first sentence of the op's documentation."""
        return (inspect.getdoc(self.op) or "").partition("\n")[0]


@dataclass(frozen=True)
class Limitation:
    """What a backend does not do. ``op`` "": of all ops."""

    backend: str
    op: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """All ops and the backends that can be used here; ``missing``: why others cannot."""

    ops: tuple[OpCoverage, ...]
    backends: tuple[str, ...]
    limitations: tuple[Limitation, ...]
    missing: Mapping[str, str]


def coverage(names: Iterable[str] | None = None, *, backends: Sequence[str] | None = None, plugins: bool = True) -> Coverage:
    """The ops ``names``, or all, on ``backends``, or all; without ``plugins`` the built-in ones, and no kernels of plugins.
    ``GraphError`` for an op that does not exist."""
    wanted = sorted(BUILT_IN) if names is None and not plugins else names
    chosen = list(ops) if wanted is None else [ops.get(name) for name in wanted]
    found: dict[str, Backend] = {}
    missing: dict[str, str] = {}
    for name in (backend_names() if plugins else TABLE) if backends is None else backends:
        try:
            found[name] = backend(name)
        except DeltaloomError as error:
            missing[name] = str(error)
    rows = tuple(_op_coverage(op, {name: _kernels(one, op, plugins) for name, one in found.items()}) for op in chosen)
    limits = [limit for name, one in found.items() for limit in _dtype_limits(name, one)]
    limits += [limit for row in rows for limit in _op_limits(row)]
    return Coverage(rows, tuple(found), tuple(limits), missing)


def rules_of(op: type[Op]) -> tuple[str, ...]:
    """Those of ``RULES`` that an op has."""
    has = {rule: getattr(op, rule) is not None for rule in RULES if rule not in ("cost", "sharding", "laws")}
    has["cost"] = op.cost is not Op.cost
    has["sharding"] = op.sharding is not None or op.factors is not Op.factors
    has["laws"] = bool(op.laws)
    return tuple(rule for rule in RULES if has[rule])


def _kernels(one: Backend, op: type[Op], plugins: bool) -> Sequence[Kernel]:
    return kernels_for(one, op.name) if plugins else [kernel for kernel in one.kernels() if kernel.op == op.name]


def _op_coverage(op: type[Op], own: Mapping[str, Sequence[Kernel]]) -> OpCoverage:
    titles = {name: tuple(kernel.name.partition(".")[2] for kernel in table) for name, table in own.items()}
    return OpCoverage(op, rules_of(op), titles, {name: _reach(op, table) for name, table in own.items()})


def _reach(op: type[Op], kernels: Sequence[Kernel]) -> Reach:
    if any(kernel.portable or not kernel.when for kernel in kernels):  # guards of the former only say what the backend says
        return "any"
    if kernels:
        return "some"
    return "parts" if op.decompose is not None else "none"


def _op_limits(row: OpCoverage) -> list[Limitation]:
    reasons = {
        "none": "it has no kernel and no parts",
        "some": "it runs where the guards of {} accept it" + (", in parts elsewhere" if "decompose" in row.rules else ""),
    }
    return [
        Limitation(backend, row.op.name, reasons[reach].format(", ".join(row.kernels[backend])))
        for backend, reach in row.reach.items()
        if reach in reasons
    ]


def _dtype_limits(name: str, one: Backend) -> list[Limitation]:
    limits = []
    for dtype in COMPUTE_DTYPES:
        try:
            one.compute_dtype(dtype)
        except DeltaloomError as error:
            limits.append(Limitation(name, "", str(error)))
    return limits
