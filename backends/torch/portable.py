"""Kernels made of the ops' own ``torch`` rules: every op that has one runs, plugins' ops too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.passes.kernel import Appended, Kernel

TITLE = "portable"


def portable_kernels(backend: str, *, appending: bool) -> list[Kernel]:
    """One kernel for each op with a ``torch`` rule, those with append states only if ``appending``."""
    found = [op for op in ops if op.torch is not None and (appending or not op.appends)]
    return [Kernel(op.name, backend, _adapter(op), title=TITLE) for op in found]


def _adapter(op: type[Op]) -> Callable[..., Any]:
    """A kernel function around the rule of ``op``; the rule is functional and knows nothing of buffers."""
    if not op.appends:
        return run
    names, updates, axes = op.input_names(), dict(op.updates), dict(op.appends)

    def run_appending(instance: Op, *inputs: Any) -> Any:
        """Gives the rule the filled part of every buffer, and writes what its result has more behind it."""
        given, buffers = list(inputs), {}
        for position, (name, value) in enumerate(zip(names, inputs)):
            if name in axes and isinstance(value, Appended):
                length = int(value.length)
                given[position] = value.data.narrow(axes[name], 0, length)
                buffers[updates[name]] = (value.data, axes[name], length)
        results = instance.torch(torch, *given)  # type: ignore[misc]
        for output, (data, axis, length) in buffers.items():
            more = results[output].shape[axis] - length
            data.narrow(axis, length, more).copy_(results[output].narrow(axis, length, more))
        kept = tuple(value for output, value in enumerate(results) if output not in buffers)
        return kept[0] if len(kept) == 1 else kept

    return run_appending


def run(op: Op, *inputs: Any) -> Any:
    """The rule of ``op`` on these tensors."""
    return op.torch(torch, *inputs)  # type: ignore[misc]
