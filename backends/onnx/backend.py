"""The onnx backend: neighbouring nodes become one ONNX model, which ONNX Runtime executes on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

import deltaloom.ops  # noqa: F401  the built-in ops
from deltaloom.backends.numpy.threads import cores
from deltaloom.backends.onnx.kernels import kernel_of
from deltaloom.backends.onnx.segment import segment_model
from deltaloom.backends.onnx.session import SegmentSession
from deltaloom.graph.errors import CompileError, ConfigError
from deltaloom.graph.op import Array, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.registry import ops
from deltaloom.graph.types import DType, f32
from deltaloom.passes.kernel import Kernel
from deltaloom.passes.segment import Segment


class OnnxBackend:
    """Programs on the CPU with ONNX Runtime, in float32. Tensors are NumPy arrays, so nothing is copied at a border with NumPy.

    ``threads``: of each session, that is, of each run of neighbouring nodes; they work one after another. None: one a core that
    this process may use."""

    name = "onnx"
    device = "cpu"
    compiles = True

    def __init__(self, *, device: str | None = None, threads: int | None = None) -> None:
        """Raises ``CompileError`` for a device other than the CPU, ``ConfigError`` for a number of threads below 1."""
        if device not in (None, "cpu"):
            raise CompileError(
                f"the onnx backend runs on the device 'cpu', not on '{device}'; give cpu, or --backend torch for a GPU"
            )
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be 1 or more")
        self.threads = cores() if threads is None else threads
        self._made: dict[type[Op], Kernel | None] = {}

    def kernels(self) -> Sequence[Kernel]:
        """One for every built-in op that has an ``onnx`` rule or is made of other ops."""
        return self._kernels

    @cached_property
    def _kernels(self) -> list[Kernel]:
        return [kernel for kernel in map(self.portable, ops.built_in()) if kernel is not None]

    def portable(self, op: type[Op]) -> Kernel | None:
        """The op's ``onnx`` rule, or those of its parts."""
        if op not in self._made:
            self._made[op] = kernel_of(op, self.name, self.threads)
        return self._made[op]

    def compute_dtype(self, wanted: str) -> DType:
        """float32; ``CompileError`` for any other."""
        if wanted in (f32.long_name, f32.name):
            return f32
        raise CompileError(
            f"the onnx backend computes in float32, not in '{wanted}': ONNX Runtime has no complete set of ops for it on the CPU; "
            "use --dtype float32 (weights stored otherwise are widened when they are loaded)"
        )

    def from_host(self, array: Array | QuantizedArray) -> Array | QuantizedArray:
        return array

    def to_host(self, tensor: Array) -> Array:
        return tensor

    def zeros(self, shape: Sequence[int], dtype: DType) -> Array:
        return np.zeros(tuple(shape), dtype.numpy)

    def length(self, count: int) -> int:
        return count

    def finish(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return function

    def segment(self, segment: Segment) -> Callable[..., Any]:
        """The nodes as one model, made and given to ONNX Runtime when first called."""
        return SegmentSession(
            segment.name, lambda: segment_model(segment.name, segment.nodes, segment.inputs, segment.results), self.threads
        )
