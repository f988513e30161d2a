"""What a backend offers and what the compiler asks of it: the ``Kernel`` and ``Backend`` protocols.

Calling convention of kernels. ``run(op, *inputs)`` gets the op (for its attributes) and the backend's own tensors in the order
of the op's inputs. A fixed state may be overwritten in place; its new value is returned in any case. An append state
(``op.appends``) comes as ``Appended``: the kernel writes its new entries in place behind ``length`` and does **not** return that
output. A weight comes in the axis order that the registration ``wants``.

Memory. A kernel registered with ``into`` takes ``out=``: a buffer for its output, or a tuple of them where it has several (states
are no outputs here), each with any content; it writes there and returns them. One registered with ``scratch`` takes ``scratch=``: a
tuple of buffers of the types that ``scratch(node)`` asked for, with any content; where a type has the size ``past``, they are as
long as the append state's buffer has room for. Without these arguments it allocates. What any kernel returns as the new value of a
fixed state shares memory with the old value at most, never with another input, ``out`` or ``scratch``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Node
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DType, QuantType, TensorType

Tensor = Any
"""A backend's own tensor; only its backend looks inside."""

Guard = Callable[[Node], str | None]
"""What a kernel *can* run: None accepts, a string is the reason why not."""

Scratch = Callable[[Node], tuple[TensorType, ...]]
"""The types of the temporary buffers that a kernel works in for a node; dimensions may be symbolic."""


F = TypeVar("F", bound=Callable[..., Any])


class Appended(NamedTuple):
    """An append state during a run: ``data`` has room for the new entries along the append axis, ``length`` are filled."""

    data: Tensor
    length: Tensor


@dataclass(frozen=True)
class Kernel:
    """A function that runs one op on one backend. ``wants``: input name -> axis order of that weight (a parameter); ``into`` and
    ``scratch``: see "Memory" above; ``quantised``: whether inputs may be of quantised types."""

    op: str
    backend: str
    run: Callable[..., Any]
    when: tuple[Guard, ...] = ()
    wants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    title: str = ""
    into: bool = False
    scratch: Scratch | None = None
    quantised: bool = False

    @property
    def name(self) -> str:
        """``backend.function``, unique among the kernels of an op."""
        return f"{self.backend}.{self.title or self.run.__name__}"

    def refusal(self, node: Node) -> str | None:
        """The first reason why this kernel cannot run ``node``, or None."""
        strange = [value for value in node.inputs if isinstance(value.type.dtype, QuantType)]
        if strange and not self.quantised:
            return f"{strange[0]} is {strange[0].type.dtype}, and this kernel takes plain weights"
        for guard in self.when:
            if (reason := guard(node)) is not None:
                return reason
        return None

    def layouts(self, node: Node) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """``wants`` by input position."""
        names = node.op.input_names()
        return tuple(sorted((names.index(name), axes) for name, axes in self.wants.items() if names.index(name) < len(node.inputs)))


class KernelTable:
    """The kernels of a backend, in order of preference within an op; filled by the decorator ``table.kernel(op)``."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.kernels: list[Kernel] = []

    def kernel(
        self,
        op: str,
        *,
        when: Sequence[Guard] = (),
        wants: Mapping[str, tuple[int, ...]] | None = None,
        into: bool = False,
        scratch: Scratch | None = None,
        quantised: bool = False,
    ) -> Callable[[F], F]:
        """Register the decorated function for ``op``; those registered first are preferred."""

        def register(run: F) -> F:
            orders = dict(wants or {})
            made = Kernel(op, self.backend, run, tuple(when), orders, into=into, scratch=scratch, quantised=quantised)
            self.kernels.append(made)
            return run

        return register


class Backend(Protocol):
    """Who runs programs. One object per configuration (device, threads); everything else about it is in its kernels."""

    name: str
    device: str
    compiles: bool
    """Whether ``finish`` does something, so that emitted code is given to it in functions of its own."""

    def kernels(self) -> Sequence[Kernel]:
        """Every kernel, the preferred of an op first, portable lowerings last."""

    def compute_dtype(self, wanted: str) -> DType:
        """The dtype for ``wanted`` ('float32', ...), or ``CompileError`` with a sentence if this backend cannot compute in it."""

    def from_host(self, array: np.ndarray[Any, Any] | QuantizedArray) -> Tensor:
        """The backend's tensor of a NumPy array (or a pair of them, quantised); may share memory."""

    def to_host(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """A NumPy array of a tensor; may share memory."""

    def zeros(self, shape: Sequence[int], dtype: DType) -> Tensor:
        """A new tensor of zeros."""

    def length(self, count: int) -> Tensor:
        """The form in which ``Appended.length`` is given to kernels."""

    def finish(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Make an emitted region or segment function ready to run (torch.compile, for example)."""


@runtime_checkable
class PlansMemory(Protocol):
    """A backend whose kernels can be given buffers: parts of one block of memory, the arena."""

    def arena(self, nbytes: int) -> Tensor:
        """A block of memory that starts at a multiple of 64 bytes."""

    def part(self, arena: Tensor, offset: int, shape: Sequence[int], dtype: DType) -> Tensor:
        """The tensor at ``offset`` bytes of an arena, as a view."""


def find_kernel(backend: Backend, op: str, name: str) -> Callable[..., Any]:
    """The function of the kernel ``name`` (``backend.function``) for ``op``; emitted source uses it."""
    for kernel in backend.kernels():
        if kernel.op == op and kernel.name == name:
            return kernel.run
    raise CompileError(f"backend {backend.name} has no kernel '{name}' for op {op}")


# Guards that kernels are built from.


def input_type(node: Node, name: str) -> TensorType:
    """The type of the input called ``name``, which the node must have."""
    return node.inputs[node.op.input_names().index(name)].type


def size(name: str, axis: int, *, equals: int) -> Guard:
    """An axis of an input must be known and have this size."""

    def guard(node: Node) -> str | None:
        found: Dim = input_type(node, name).shape[axis]
        return None if found == equals else f"axis {axis} of {name} is {found}, not {equals}"

    return guard


def dtype_in(name: str, *dtypes: DType) -> Guard:
    """The dtype of an input must be one of those listed."""

    def guard(node: Node) -> str | None:
        found = input_type(node, name).dtype
        return None if found in dtypes else f"{name} is {found}, not {' or '.join(map(str, dtypes))}"

    return guard


def absent(name: str) -> Guard:
    """An optional input must not be given."""

    def guard(node: Node) -> str | None:
        return f"{name} is given" if node.op.input_names().index(name) < len(node.inputs) else None

    return guard


def is_param(name: str) -> Guard:
    """An input must be a weight, so that its layout can be chosen."""

    def guard(node: Node) -> str | None:
        value = node.inputs[node.op.input_names().index(name)]
        return None if value.kind == "param" else f"{name} is %{value.name}, which is computed, not a weight"

    return guard


def is_quantised(*names: str) -> Guard:
    """At least one of these inputs must be of a quantised type."""

    def guard(node: Node) -> str | None:
        found = [input_type(node, name).dtype for name in names]
        some = any(isinstance(dtype, QuantType) for dtype in found)
        return None if some else f"{' and '.join(names)}: {found[0]} is not quantised"

    return guard
