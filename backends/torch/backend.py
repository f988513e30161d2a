"""The eager torch backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from deltaloom.backends.torch import (
    attention,
    convolution,
    delta_net,
    delta_rule,
    linear,
    moe,
    norm,
    quantized,
    rope,
    serving,
    swiglu,
)
from deltaloom.backends.torch.host import to_array, to_tensor, torch_dtype
from deltaloom.backends.torch.portable import portable_kernel, portable_kernels
from deltaloom.backends.torch.table import table
from deltaloom.backends.torch.upload import Upload
from deltaloom.backends.torch.weights import evaluated, stored_names
from deltaloom.graph.errors import CompileError, ConfigError
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.op import Array, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DType, bf16, f16, f32, f64
from deltaloom.passes.kernel import Kernel

FAMILIES = (attention, convolution, delta_net, delta_rule, linear, moe, norm, quantized, rope, serving, swiglu)
"""The files whose kernels are in the table once they are imported."""

COMPUTE = {dtype.long_name: dtype for dtype in (f32, bf16, f16, f64)}


class TorchBackend:
    """Runs kernels one by one on ``device`` ("cpu", "cuda", "cuda:1").

    ``threads`` is torch's number of threads inside an op; torch has one such number a *process*, and the last backend made with one
    sets it. float32 products are full float32 on a GPU as long as the process leaves torch's defaults alone
    (``torch.set_float32_matmul_precision`` is the process's too; this backend neither reads nor sets it)."""

    name = "torch"
    compiles = True
    _appending = True
    """Whether rules of ops with append states are run."""

    def __init__(self, device: str | None = None, threads: int | None = None) -> None:
        """Raises ``CompileError`` for a device that this torch does not have, ``ConfigError`` for a number of threads below 1."""
        self.device = "cpu" if device is None else device
        self._device = _device(self.device)
        if threads is not None:
            if threads < 1:
                raise ConfigError(f"threads is {threads}; it must be 1 or more")
            torch.set_num_threads(threads)

    def kernels(self) -> Sequence[Kernel]:
        """Kernels of this folder, then every op's own ``torch`` rule."""
        return self._kernels

    def portable(self, op: type[Op]) -> Kernel | None:
        """The op's own ``torch`` rule."""
        return portable_kernel(op, self.name, appending=self._appending)

    @cached_property
    def _kernels(self) -> list[Kernel]:
        return [*table.kernels, *portable_kernels(self.name, appending=self._appending)]

    def compute_dtype(self, wanted: str) -> DType:
        """float32, bfloat16, float16 or float64. ``CompileError`` for anything else."""
        if wanted not in COMPUTE:
            raise CompileError(f"backend {self.name} cannot compute in '{wanted}'; it can in {', '.join(COMPUTE)}")
        return COMPUTE[wanted]

    def from_host(self, array: Array | QuantizedArray) -> Any:
        """A tensor on the array's memory where the device is the CPU; never written unless it is a state."""
        if isinstance(array, QuantizedArray):
            return replace(array, data=self.from_host(array.data), scale=self.from_host(array.scale))
        return to_tensor(array).to(self._device)

    def evaluated(self, weights: Graph, value: Value, prefix: str, read: Callable[[str], Array], axes: tuple[int, ...]) -> Any:
        """A weight made on the device of all the checkpoint tensors that it needs, which ``read`` gives."""
        stored = self._upload.tensors({name: read(name) for name in stored_names(weights, value, prefix)})
        return evaluated(weights, value, prefix, stored.__getitem__, axes)

    @cached_property
    def _upload(self) -> Upload:
        return Upload(self._device)

    def to_host(self, tensor: Any) -> Any:
        """An array on the tensor's memory where that is the CPU's; bfloat16 through ml_dtypes."""
        if isinstance(tensor, QuantizedArray):
            return replace(tensor, data=to_array(tensor.data), scale=to_array(tensor.scale))
        return to_array(tensor)

    def zeros(self, shape: Sequence[int], dtype: DType) -> torch.Tensor:
        """A new tensor of zeros on the device."""
        return torch.zeros(tuple(shape), dtype=torch_dtype(dtype), device=self._device)

    def length(self, count: int) -> Any:
        """Kernels get the plain number."""
        return count

    def finish(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """In inference mode, where an op costs less to start (a token of a model that is all dispatch: 3.5 ms against 4.0)."""
        return self.alone(function)

    def alone(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """In inference mode too."""
        return torch.inference_mode()(function)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CompileError(f"'{name}' is not a device of torch; give 'cpu', 'cuda' or 'cuda:<number>'") from error
    if device.type not in ("cpu", "cuda") or device.type == "cpu" and device.index:
        raise CompileError(f"backend torch runs on 'cpu' or 'cuda', not on '{name}'")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise CompileError(f"device '{name}' was asked for, but this torch ({torch.__version__}) sees {count} CUDA devices")
    return device
