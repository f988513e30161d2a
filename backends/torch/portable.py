"""Kernels made of the ops' own ``torch`` rules: every op that has one runs, plugins' ops too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.passes.kernel import Kernel

TITLE = "portable"


def portable_kernels(backend: str, *, appending: bool) -> list[Kernel]:
    """One kernel for each built-in op with a ``torch`` rule, those with append states only if ``appending``."""
    made = (portable_kernel(op, backend, appending=appending) for op in ops.built_in())
    return [kernel for kernel in made if kernel is not None]


def portable_kernel(op: type[Op], backend: str, *, appending: bool) -> Kernel | None:
    """The kernel made of the ``torch`` rule of an op, if it has one."""
    if op.torch is None or op.appends and not appending:
        return None
    return Kernel(op.name, backend, _adapter(op), title=TITLE, quantised=True, portable=True)


def _adapter(op: type[Op]) -> Callable[..., Any]:
    """A kernel function around the rule of ``op``; the rule is functional and knows nothing of buffers."""
    if not op.updates:
        return run
    names, updates, axes = op.input_names(), dict(op.updates), dict(op.appends)

    def run_updating(instance: Op, *inputs: Any) -> Any:
        """Gives the rule the filled part of every buffer, and writes what its result has more behind it. Fixed states are
        overwritten, so that a state stays where it is and is no view of something larger."""
        states = {name: position for position, name in enumerate(names) if name in updates}
        given = list(inputs)
        for name, axis in axes.items():
            data, length = inputs[states[name]]
            given[states[name]] = data.narrow(axis, 0, int(length))
        results = list(instance.torch(torch, *given))  # type: ignore[misc]
        for name, position in states.items():
            new = results[updates[name]]
            if name in axes:
                data, length = inputs[position][0], int(inputs[position][1])
                more = new.shape[axes[name]] - length
                data.narrow(axes[name], length, more).copy_(new.narrow(axes[name], length, more))
            else:
                results[updates[name]] = inputs[position].copy_(new)
        appended = {updates[name] for name in axes}
        kept = tuple(value for output, value in enumerate(results) if output not in appended)
        return kept[0] if len(kept) == 1 else kept

    return run_updating


def run(op: Op, *inputs: Any) -> Any:
    """The rule of ``op`` on these tensors."""
    return op.torch(torch, *inputs)  # type: ignore[misc]
