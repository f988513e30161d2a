"""What keeps a graph from being exported: all of it is collected, then told at once, before any file is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltaloom.backends.onnx.body import ELEMENTS
from deltaloom.graph.errors import ExportError
from deltaloom.graph.ir import Node
from deltaloom.graph.types import QuantType, TensorType, bf16

FIX = "give the op an `onnx(b, ...)` rule or a decomposition, or cut before this node (`--nodes`)"
FIX_DTYPE = "export with dtype 'float32' or 'float16', or cut before this node (`--nodes`)"
FIX_PLACED = "export the graph as it was before it was compiled"
MOST_NODES = 3
"""So many nodes of an op are named."""


@dataclass(frozen=True)
class Problem:
    """A node that cannot be exported, and why."""

    node: str
    source: str
    op: str
    reason: str
    fix: str = FIX


class UnexportableError(ExportError):
    """Nodes that cannot be exported; ``problems`` has all of them."""

    def __init__(self, problems: Sequence[Problem], profile: str, opset: int) -> None:
        self.problems = tuple(problems)
        groups: dict[tuple[str, str, str], list[Problem]] = {}
        for one in problems:
            groups.setdefault((one.op, one.reason, one.fix), []).append(one)
        super().__init__("\n\n".join(_block(found, f"(profile '{profile}', opset {opset})") for found in groups.values()))


def _block(found: Sequence[Problem], how: str) -> str:
    first = found[0]
    shown = [f"{one.node}" + (f"      (created at {one.source})" if one.source else "") for one in found[:MOST_NODES]]
    more = [f"and {len(found) - MOST_NODES} more"] if len(found) > MOST_NODES else []
    nodes = "\n          ".join(shown + more)
    return f"cannot export op '{first.op}' to ONNX {how}\n  node:   {nodes}\n  reason: {first.reason}\n  fix:    {first.fix}"


def checked(node: Node) -> Problem | None:
    """What can be said against a node without a look at its rule."""
    if node.placement is not None:
        reason = f"the graph is already lowered to backend '{node.placement.backend}'"
        return problem(node, reason, FIX_PLACED)
    for value in (*node.inputs, *node.outputs):
        quantised = isinstance(value.type.dtype, QuantType)
        if value.kind != "param" and (quantised or not exportable(value.type)):
            return problem(node, f"the dtype of {value}: {value.type} is not supported by ONNX Runtime", FIX_DTYPE)
    return None


def exportable(type_: TensorType) -> bool:
    """Whether ONNX Runtime computes with values of this type: with bfloat16 it does not."""
    return isinstance(type_.dtype, QuantType) or type_.dtype in ELEMENTS and type_.dtype != bf16


def problem(node: Node, reason: str, fix: str = FIX) -> Problem:
    """What is wrong with a node."""
    return Problem(node.name, node.source, node.op.name, reason, fix)
