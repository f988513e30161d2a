"""The cuda backend: the kernels of this folder, then torch's for what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from deltaloom.backends.cuda import attention, delta_net, linear, moe, norm, rope, router
from deltaloom.backends.cuda.step import DecodeStep
from deltaloom.backends.cuda.table import interpreted, table
from deltaloom.backends.cuda.timing import kernel_seconds
from deltaloom.backends.torch.backend import COMPUTE, TorchBackend
from deltaloom.backends.torch.host import torch_dtype
from deltaloom.backends.torch.portable import portable_kernels
from deltaloom.backends.torch.random_weights import RandomTensors
from deltaloom.backends.torch.table import table as torch_table
from deltaloom.backends.torch.transformers_peer import TransformersPeer
from deltaloom.backends.torch.weights import weights_of
from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.op import Array
from deltaloom.graph.types import DType, f64
from deltaloom.passes.emit import Program
from deltaloom.passes.kernel import Kernel

FAMILIES = (attention, delta_net, linear, moe, norm, rope, router)
"""The files whose kernels are in the table once they are imported."""


@contextmanager
def within_memory() -> Iterator[None]:
    """``MemoryError``, as everywhere, in the place of torch's own error for a GPU that is full."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(str(error).splitlines()[0]) from error


class CudaBackend(TorchBackend):
    """Triton kernels and torch on one GPU ("cuda", "cuda:1"; the default is the first).

    Where Triton's interpreter is switched on (TRITON_INTERPRET=1) it also runs on "cpu", slowly: for tests."""

    name = "cuda"

    def __init__(self, device: str | None = None, threads: int | None = None) -> None:
        """Raises ``CompileError`` without the GPU that is asked for."""
        found = device or "cuda"
        if found == "cpu" and not interpreted():
            raise CompileError(
                "backend cuda runs on an NVIDIA GPU, not on 'cpu'; give it one (--device cuda), or use the backend torch there"
            )
        if found.startswith("cuda") and not torch.cuda.is_available():
            raise CompileError(
                f"backend cuda needs an NVIDIA GPU, and this torch ({torch.__version__}) sees none; use the backend torch or numpy"
            )
        super().__init__(found, threads)

    @cached_property
    def _kernels(self) -> list[Kernel]:
        own = {kernel.op for kernel in table.kernels if not kernel.when}
        others = [
            replace(kernel, backend=self.name, title=f"torch_{kernel.title or kernel.run.__name__}")
            for kernel in torch_table.kernels
            if kernel.op not in own
        ]
        return [*table.kernels, *others, *portable_kernels(self.name, appending=self._appending)]

    @within_memory()
    def zeros(self, shape: Sequence[int], dtype: DType) -> torch.Tensor:
        """A new tensor of zeros on the device; ``MemoryError`` where it is full."""
        return super().zeros(shape, dtype)

    @within_memory()
    def evaluated(self, weights: Graph, value: Value, prefix: str, read: Callable[[str], Array], axes: tuple[int, ...]) -> Any:
        """A weight made on the device; ``MemoryError`` where it is full."""
        return super().evaluated(weights, value, prefix, read, axes)

    def compute_dtype(self, wanted: str) -> DType:
        """float32, bfloat16 or float16. ``CompileError`` for anything else."""
        found = super().compute_dtype(wanted)
        if found == f64:
            known = ", ".join(name for name in COMPUTE if name != f64.long_name)
            raise CompileError(f"backend cuda cannot compute in '{wanted}'; it can in {known}; the backend torch can")
        return found

    @within_memory()
    def decode_step(
        self,
        program: Program,
        weights: Mapping[str, tuple[Any, ...]],
        fixed: Mapping[str, tuple[Any, ...]],
        append: Mapping[str, tuple[Any, ...]],
        *,
        batch: int,
        max_blocks: int,
        allowed: int | None,
        sampled: bool,
    ) -> DecodeStep:
        """The recorded step of a serving program (``RecordsSteps``)."""
        made = DecodeStep(
            program,
            weights,
            fixed,
            append,
            batch=batch,
            max_blocks=max_blocks,
            device=self._device,
            allowed=allowed,
            sampled=sampled,
        )
        made.record()
        return made

    @within_memory()
    def random_weights(self, program: Program, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, tuple[Any, ...]]:
        """Weights of ``program`` made of checkpoint tensors that are drawn on the device in its dtype; see ``RandomTensors``."""
        dtype = next(value.type.plain_dtype for name, value in program.graph.outputs if name == program.outputs[0])
        tensors = RandomTensors(shapes, seed=seed, device=str(self._device), dtype=torch_dtype(dtype))
        made = weights_of(program, tensors.read)
        self._wait()
        return made

    @within_memory()
    def transformers_peer(
        self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str
    ) -> TransformersPeer:
        """transformers' model on the tensors that ``random_weights`` draws with this seed."""
        plain = torch_dtype(self.compute_dtype(dtype))
        tensors = RandomTensors(shapes, seed=seed, device=str(self._device), dtype=plain)
        return TransformersPeer(values, tensors.read, device=str(self._device), dtype=plain)

    def draw(self, tensor: torch.Tensor, scale: float) -> None:
        """Fill ``tensor`` with normal numbers."""
        tensor.normal_(std=scale)

    def allocated(self) -> int:
        """Bytes in use on the GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def peak(self) -> int:
        """The most bytes that were in use on the GPU since the process began; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def kernel_seconds(self, run: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> tuple[float, str]:
        """Seconds of one call of a kernel, and how it was timed; see ``deltaloom.backends.cuda.timing``."""
        return kernel_seconds(run, sets)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
