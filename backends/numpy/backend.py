"""The NumPy backend: accelerated kernels, then the reference of every op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import deltaloom.backends.numpy.attention
import deltaloom.backends.numpy.convolution
import deltaloom.backends.numpy.delta_net
import deltaloom.backends.numpy.delta_rule
import deltaloom.backends.numpy.elementwise
import deltaloom.backends.numpy.linear
import deltaloom.backends.numpy.moe
import deltaloom.backends.numpy.norm
import deltaloom.backends.numpy.quantized
import deltaloom.backends.numpy.rope
import deltaloom.backends.numpy.serving
import deltaloom.backends.numpy.shape
import deltaloom.ops  # noqa: F401  the built-in ops
from deltaloom.backends.numpy.allocator import keep_freed_memory
from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import use_threads
from deltaloom.graph.errors import CompileError
from deltaloom.graph.op import Array, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.registry import ops
from deltaloom.graph.types import DType, f32, f64
from deltaloom.ops.fused import Fused
from deltaloom.passes.kernel import Appended, Kernel
from deltaloom.passes.memory import ALIGNMENT

_PORTABLE: dict[tuple[str, type[Op]], Kernel | None] = {}
"""By backend and op: kernels that are made when they are first asked for."""


class NumpyBackend:
    """Programs on the CPU with NumPy, in float32 or float64.

    ``threads``: see ``threads.use_threads``; it is a setting of the process, not of this object."""

    name = "numpy"
    device = "cpu"
    compiles = False

    def __init__(self, *, device: str | None = None, threads: int | None = None) -> None:
        if device not in (None, "cpu"):
            message = f"the {self.name} backend runs on the device 'cpu', not on '{device}'; give cpu, or --backend torch for a GPU"
            raise CompileError(message)
        self.threads = use_threads(threads).n
        keep_freed_memory()

    def kernels(self) -> Sequence[Kernel]:
        """The accelerated kernels, then a portable one for every built-in op that has a reference of its own."""
        made = map(self.portable, ops.built_in())
        return [*table.kernels, *(kernel for kernel in made if kernel is not None)]

    def portable(self, op: type[Op]) -> Kernel | None:
        """The op's reference, unless that is its decomposition."""
        key = (self.name, op)
        if key not in _PORTABLE:
            fits = op.reference is not None and not issubclass(op, Fused)
            made = Kernel(op.name, self.name, _by_reference(op), title="reference", quantised=True, portable=True)
            _PORTABLE[key] = made if fits else None
        return _PORTABLE[key]

    def compute_dtype(self, wanted: str) -> DType:
        """float32 or float64; ``CompileError`` for any other."""
        for dtype in (f32, f64):
            if wanted in (dtype.long_name, dtype.name):
                return dtype
        raise CompileError(
            f"the {self.name} backend computes in float32 or float64, not in '{wanted}': NumPy has no fast arithmetic for it; "
            "use --dtype float32 (weights stored otherwise are widened when they are loaded)"
        )

    def from_host(self, array: Array | QuantizedArray) -> Array | QuantizedArray:
        return array

    def to_host(self, tensor: Array) -> Array:
        return tensor

    def zeros(self, shape: Sequence[int], dtype: DType) -> Array:
        return np.zeros(tuple(shape), dtype.numpy)

    def arena(self, nbytes: int) -> Array:
        block = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        return block[start : start + nbytes]

    def part(self, arena: Array, offset: int, shape: Sequence[int], dtype: DType) -> Array:
        return np.ndarray(tuple(shape), dtype.numpy, arena, offset)

    def length(self, count: int) -> int:
        return count

    def finish(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return function


def _by_reference(op_class: type[Op]) -> Callable[..., Any]:
    """A kernel that calls the op's reference; append states are given as they are filled and get what was appended."""
    names = op_class.input_names()
    appended = [(names.index(name), axis, op_class.updates[name]) for name, axis in op_class.appends.items()]

    def reference(op: Op, *inputs: Any) -> Any:
        assert op.reference is not None
        with np.errstate(all="ignore"):
            if not appended:
                return op.reference(*inputs)
            filled = list(inputs)
            for position, axis, _ in appended:
                filled[position] = _along(inputs[position].data, axis, 0, int(inputs[position].length))
            results = op.reference(*filled)
        for position, axis, output in appended:
            _write_tail(inputs[position], axis, results[output])
        grown = {output for _, _, output in appended}
        kept = tuple(result for output, result in enumerate(results) if output not in grown)
        return kept[0] if len(kept) == 1 else kept

    return reference


def _write_tail(state: Appended, axis: int, value: Array) -> None:
    start, stop = int(state.length), value.shape[axis]
    _along(state.data, axis, start, stop)[...] = _along(value, axis, start, stop)


def _along(array: Array, axis: int, start: int, stop: int) -> Array:
    view: Array = array[(*[slice(None)] * axis, slice(start, stop))]
    return view
