"""What every backend is held to: the protocol, its kernels, and whole programs whose states go from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom.backends import backend as named_backend
from deltaloom.graph.errors import CompileError, ConfigError, DeltaloomError
from deltaloom.graph.op import Array, Draw
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.registry import ops
from deltaloom.graph.types import DTYPES, DType, bf16, f16, f32, f64
from deltaloom.passes.kernel import Backend, Kernel, PlansMemory, find_kernel
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.kernel_checks import kernel_checks
from deltaloom.testing.program_checks import Programs
from deltaloom.testing.suite import Check, Suite
from deltaloom.testing.toy_models import same_numbers

COMPUTE = (f32, f64, bf16, f16)
SHAPES = ((), (1,), (3,), (2, 5), (1, 7, 3), (2, 0, 3))


class BackendSuite(Suite):
    """The checks of one backend.

    ``backend``: its registered name, or a class (or function) that is called with ``device`` and ``threads``. ``device``: where it
    runs. ``kernels``: whether its kernels are run one by one (False for a backend that shares those of another)."""

    backend: str | Callable[..., Backend]
    device: str = "cpu"
    kernels: bool = True

    def subject(self) -> str:
        return f"backend {self.backend if isinstance(self.backend, str) else getattr(self.backend, 'name', '')}"

    def make(self, device: str | None = None, threads: int | None = 1) -> Backend:
        """The backend under test."""
        chosen = self.device if device is None else device
        if isinstance(self.backend, str):
            return named_backend(self.backend, device=chosen, threads=threads)
        return type(self).backend(device=chosen, threads=threads)  # type: ignore[operator]

    def checks(self) -> Iterator[Check]:
        backend = self.make()
        subject = self.subject()
        wanted = self.backend if isinstance(self.backend, str) else backend.name
        has = {dtype: _computes(backend, dtype) for dtype in COMPUTE}
        plans = isinstance(backend, PlansMemory)
        yield Check(subject, "protocol", partial(_protocol, backend, wanted), drawn=False)
        yield Check(subject, "refusals", partial(_refusals, self.make, backend), drawn=False)
        yield Check(subject, "kernel names", partial(_kernel_names, backend), drawn=False)
        for dtype in COMPUTE:
            name = dtype.long_name
            yield Check(subject, f"{name} there and back", partial(_there_and_back, backend, dtype), name, has[dtype])
        for kind in ("int", "bool"):
            for dtype in (one for one in DTYPES.values() if one.kind == kind and one.name in ("i32", "i64", "bool")):
                yield Check(subject, f"{dtype.long_name} there and back", partial(_there_and_back, backend, dtype))
        yield Check(subject, "quantised there and back", partial(_quantised, backend), "quantised", _holds_quantised(backend))
        yield Check(subject, "zeros", partial(_zeros, backend, [dtype for dtype in COMPUTE if has[dtype]]))
        yield Check(subject, "memory", partial(_memory, backend), "memory", plans)
        for dtype in self._program_dtypes(has):
            yield from Programs(subject, backend, dtype).checks()
        for kernel in backend.kernels() if self.kernels else ():
            if kernel.op in ops:
                yield from kernel_checks(backend, kernel, ops.get(kernel.op))

    def _program_dtypes(self, has: Mapping[DType, bool]) -> list[DType]:
        """The dtypes of whole programs: of the wide ones and of the narrow ones the first that is claimed, or there."""
        claims = self.requirements.claims
        used = [dtype for dtype in COMPUTE if (has[dtype] if claims is None else has[dtype] and dtype.long_name in claims)]
        return [*[dtype for dtype in used if dtype in (f32, f64)][:1], *[dtype for dtype in used if dtype in (bf16, f16)][:1]]


def _computes(backend: Backend, dtype: DType) -> bool:
    try:
        return backend.compute_dtype(dtype.long_name) == dtype
    except DeltaloomError:
        return False


def _holds_quantised(backend: Backend) -> bool:
    return any(kernel.quantised for kernel in backend.kernels())


def _protocol(backend: Backend, wanted: str, draw: Draw) -> None:
    """The attributes are there, and ``compute_dtype`` gives what it was asked for or refuses."""
    assert backend.name == wanted, f"the backend '{wanted}' calls itself '{backend.name}'"
    assert backend.name.isidentifier(), f"the backend's name is {backend.name!r}, expected a plain identifier"
    assert isinstance(backend.device, str) and backend.device, f"device of {wanted} is {backend.device!r}, expected a name"
    assert isinstance(backend.compiles, bool), f"compiles of {wanted} is {backend.compiles!r}, expected True or False"
    assert any(_computes(backend, dtype) for dtype in COMPUTE), f"{wanted} computes in none of {', '.join(map(str, COMPUTE))}"
    for count in (0, 1, 7):
        assert int(backend.length(count)) == count, f"length({count}) of {wanted} is {backend.length(count)}"

    def probe() -> int:
        return 7

    assert backend.finish(probe, "probe")() == 7, f"finish() of {wanted} changes what a function gives"


def _refusals(make: Callable[..., Backend], backend: Backend, draw: Draw) -> None:
    """What the backend cannot serve it refuses with a sentence."""
    for what, ask in (
        ("the dtype 'int7'", lambda: backend.compute_dtype("int7")),
        ("the device 'no such device'", lambda: make(device="no such device")),
    ):
        try:
            ask()
        except (CompileError, ConfigError) as error:
            assert len(str(error).split()) > 3, f"{backend.name} refuses {what} with {str(error)!r}, expected a sentence"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            raise AssertionError(f"{backend.name} meets {what} with {found}; expected CompileError") from error
        else:
            raise AssertionError(f"{backend.name} takes {what}; expected CompileError")


def _kernel_names(backend: Backend, draw: Draw) -> None:
    """Each kernel is this backend's, for an op that exists, and is found by its name."""
    kernels = list(backend.kernels())
    assert kernels, f"{backend.name} has no kernels"
    taken: dict[tuple[str, str], Kernel] = {}
    for kernel in kernels:
        owner = f"{kernel.name} for {kernel.op} is registered for '{kernel.backend}'"
        assert kernel.backend == backend.name, f"{owner}, not for {backend.name}"
        other = taken.setdefault((kernel.op, kernel.name), kernel)
        assert other is kernel, f"two kernels of {backend.name} for {kernel.op} are called {kernel.name}; give one a title"
        found = find_kernel(backend, kernel.op, kernel.name)
        same = found is kernel.run or found.__qualname__ == kernel.run.__qualname__
        assert same, f"{kernel.name} is another when asked for again"
        assert kernel.op in ops, f"{kernel.name} is for the op '{kernel.op}', which does not exist"
        strange = sorted(set(kernel.wants) - set(ops.get(kernel.op).input_names()))
        assert not strange, f"{kernel.name} wants a layout of {', '.join(strange)}, which {kernel.op} does not have"


def _there_and_back(backend: Backend, dtype: DType, draw: Draw) -> None:
    """An array is the same after ``from_host`` and ``to_host``, contiguous or not, and its source is left alone."""
    shape = draw.choice(*SHAPES)
    array = np.asarray(draw.normal(*shape) * 3).astype(dtype.numpy)
    if array.ndim > 1 and draw.choice(True, False):
        array = array.swapaxes(0, -1)
    before = array.copy()
    back = np.asarray(backend.to_host(backend.from_host(array)))
    made = f"{back.dtype}{list(back.shape)}"
    assert same_numbers(back, before), f"{backend.name} makes {made} of {dtype}{list(before.shape)}, or other numbers"
    assert same_numbers(array, before), f"{backend.name} changes an array that it was given"


def _quantised(backend: Backend, draw: Draw) -> None:
    """A quantised weight is the same after ``from_host`` and ``to_host``."""
    array = next(one for one in _quantised_arrays())
    back = backend.to_host(backend.from_host(array))
    assert isinstance(back, QuantizedArray), f"{backend.name} makes {type(back).__name__} of a quantised array"
    assert same_numbers(back, array), f"{backend.name} changes the codes or scales of a {array.type}"


def _quantised_arrays() -> Iterator[QuantizedArray]:
    """Quantised arrays of the cases of ``dequantize``."""
    dequantize = ops.get("dequantize")
    assert dequantize.cases is not None
    for seed in range(20):
        for array in dequantize.cases(SeededDraw(seed)).arrays:
            if isinstance(array, QuantizedArray):
                yield array


def _zeros(backend: Backend, dtypes: list[DType], draw: Draw) -> None:
    """``zeros`` gives zeros of the shape and dtype, in memory of their own."""
    dtype, shape = draw.choice(*dtypes), draw.choice(*SHAPES)
    made = np.asarray(backend.to_host(backend.zeros(shape, dtype)))
    assert made.shape == shape and made.dtype == dtype.numpy, f"zeros({shape}, {dtype}) gives {made.dtype}{list(made.shape)}"
    assert not made.astype(np.float64).any(), f"zeros({shape}, {dtype}) of {backend.name} holds {made.max()}"
    other = np.asarray(backend.to_host(backend.zeros(shape, dtype)))
    assert not np.shares_memory(made, other), f"two results of zeros() of {backend.name} share memory"


def _memory(backend: Any, draw: Draw) -> None:
    """Parts of an arena are where they should be: they overlap exactly where their bytes do."""
    arena = backend.arena(4096)
    first, second = backend.part(arena, 0, (4, 8), f32), backend.part(arena, 64 * draw.integer(1, 4), (3,), f64)
    ones: Array = np.ones((4, 8), np.float32)
    for part in (first, second):
        part[...] = 0
    first[...] = backend.from_host(ones)
    over = np.asarray(backend.to_host(second)).any()
    shared = np.shares_memory(np.asarray(backend.to_host(first)), np.asarray(backend.to_host(second)))
    assert bool(over) == shared, f"parts of an arena of {backend.name} overlap where their bytes do not"
    assert same_numbers(np.asarray(backend.to_host(first)), ones), f"a part of an arena of {backend.name} does not keep its numbers"
