"""A toy backend for pass tests: every op by its reference, under any name, with chosen extras."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import deltaloom.ops  # noqa: F401
from deltaloom.graph.registry import ops
from deltaloom.graph.types import DType, dtype_named
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.kernel import Kernel
from deltaloom.passes.pipeline import Context


def by_reference(op: Any, *arrays: Any) -> Any:
    """Run an op by its definition."""
    return op.reference(*arrays)


class Toy:
    """Tensors are NumPy arrays; ``only`` restricts the ops it offers, ``first`` are kernels preferred to the references."""

    device = "cpu"
    compiles = False

    def __init__(self, name: str, *, only: Sequence[str] | None = None, first: Sequence[Kernel] = ()) -> None:
        self.name = name
        self.finished: list[str] = []
        names = [op.name for op in ops if only is None or op.name in only]
        self._kernels = [*first, *(Kernel(op, name, by_reference, title="reference", quantised=True) for op in names)]

    def kernels(self) -> Sequence[Kernel]:
        return self._kernels

    def compute_dtype(self, wanted: str) -> DType:
        return dtype_named(wanted)

    def from_host(self, array: Any) -> Any:
        return array

    def to_host(self, tensor: Any) -> Any:
        return tensor

    def zeros(self, shape: Sequence[int], dtype: DType) -> Any:
        return np.zeros(shape, dtype.numpy)

    def length(self, count: int) -> Any:
        return count

    def finish(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        self.finished.append(name)
        return function


def toy_context(*backends: Toy, **config: Any) -> Context:
    """A context over toy backends."""
    return Context(CompileConfig(backends=tuple(b.name for b in backends), **config), backends)
