"""The inductor backend: emitted functions under ``torch.compile(fullgraph=True)``.

Budget: an emitted function is compiled once for each of {one sequence, more} and {one token, more} that it meets (torch makes sizes
of 1 constants). Everything else that changes between calls (batch, tokens, columns of the padding mask, capacity of a cache) is
marked as dynamic before the first call of such a class, and the length of a cache is a tensor. ``compilations`` counts.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError
from torch.fx.experimental import _config as shape_config

from deltaloom.backends.torch import compiled, compiled_fused, quantized_compiled  # noqa: F401  (the others add to the first's table)
from deltaloom.backends.torch.backend import TorchBackend
from deltaloom.backends.torch.portable import portable_kernels
from deltaloom.graph.errors import CompileError
from deltaloom.passes.kernel import Appended, Kernel

WEIGHT = "w_"
"""How the names of a segment function's parameters begin where they are weights: those have the same sizes in every call."""


class InductorBackend(TorchBackend):
    """The torch backend with compiled segments. Raises ``CompileError`` without a C++ compiler, which torch needs on a CPU."""

    name = "inductor"
    compiles = True
    _appending = False
    budget = 4
    """One sequence or more, times one token or more."""

    def __init__(self, device: str | None = "cpu", threads: int | None = None) -> None:
        super().__init__(device, threads)
        if self._device.type == "cpu":
            _require_compiler()
        self._compilations: Counter[str] = Counter()

    @cached_property
    def _kernels(self) -> list[Kernel]:
        return [*compiled.table.kernels, *portable_kernels(self.name, appending=self._appending)]

    def length(self, count: int) -> torch.Tensor:
        """A number on the host that no compiled code depends on."""
        return torch.tensor(count)

    def finish(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Compiled when first called; what torch cannot compile is a ``CompileError`` that names the function."""
        return CompiledFunction(function, name, self._compilations)

    def compilations(self) -> dict[str, int]:
        """How often torch compiled, by name of the emitted function (functions of several programs can share a name)."""
        return dict(self._compilations)

    def graph_breaks(self) -> int:
        """Of this process, by any of its code under ``torch.compile``; those of emitted functions would be errors."""
        return sum(counters["graph_break"].values())


class CompiledFunction:
    """An emitted function under ``torch.compile``. Arguments are weights (named ``w_…``), other tensors and ``Appended``."""

    def __init__(self, function: Callable[..., Any], name: str, compilations: Counter[str]) -> None:
        self._name = name
        self._weights = [parameter.startswith(WEIGHT) for parameter in inspect.signature(function).parameters]
        self._axes: tuple[tuple[int, int], ...] | None = None
        self._seen: set[tuple[bool, ...]] = set()

        def compile_counted(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            compilations[name] += 1
            return compile_fx(module, inputs)

        self._run: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=compile_counted)

    def __call__(self, *arguments: Any) -> Any:
        if self._axes is None:
            self._axes = tuple(_changing(arguments, self._weights))
        tensors = [a.data if isinstance(a, Appended) else a for a in arguments]
        kind = tuple(tensors[position].shape[axis] == 1 for position, axis in self._axes)
        with torch.no_grad():
            if kind in self._seen:
                return self._run(*arguments)
            result = self._first(arguments, self._axes)
        self._seen.add(kind)
        return result

    def _first(self, arguments: Sequence[Any], axes: Sequence[tuple[int, int]]) -> Any:
        """The first call of a class of sizes: on aliases that carry the marks, which torch would otherwise find on tensors that
        live on and take as a reason to compile again."""
        marked = [a if w else _alias(a) for a, w in zip(arguments, self._weights, strict=True)]
        tensors = [a.data if isinstance(a, Appended) else a for a in marked]
        for position, axis in axes:
            if tensors[position].shape[axis] > 1:
                maybe_mark_dynamic(tensors[position], axis)
        try:
            with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return self._run(*marked)
        except (TorchDynamoException, InductorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CompileError(f"torch.compile cannot compile '{self._name}' (torch {torch.__version__}): {reason}") from error
        finally:
            for position, _ in axes:
                tensors[position].__dict__.clear()  # torch keeps its marks there, and a state that is returned must not have any


def _changing(arguments: Sequence[Any], weights: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Argument and axis of every size that may change between calls. Axis 0 is the batch. Axis 1 is that of the tokens if it is
    as long as that of the first such tensor, or belongs to a mask; a state that happens to be as long costs no more than
    a size that is dynamic for nothing."""
    seq: int | None = None
    for position, (argument, is_weight) in enumerate(zip(arguments, weights, strict=True)):
        if is_weight:
            continue
        if isinstance(argument, Appended):
            yield from ((position, 0), (position, 2))
        elif argument.dim() >= 2:
            yield position, 0
            seq = argument.shape[1] if seq is None else seq
            if argument.dtype == torch.bool or argument.shape[1] == seq:
                yield position, 1


def _alias(argument: Any) -> Any:
    """The same memory under another tensor object."""
    if isinstance(argument, Appended):
        return Appended(argument.data.detach(), argument.length)
    return argument.detach()


def _require_compiler() -> None:
    """``CompileError`` unless the C++ compiler that torch will call is there."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler.split()[0]) is None:
        raise CompileError(
            f"backend inductor needs a C++ compiler, and '{compiler}' was not found; install g++, name another compiler in the "
            "environment variable CXX, or use the backend torch"
        )
