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

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from deltaloom.graph import plugins
from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import CompileError, PluginError, require
from deltaloom.graph.ir import Node, Value
from deltaloom.graph.op import Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.registry import ops
from deltaloom.graph.types import DType, QuantType, TensorType, bf16
from deltaloom.ops.quantized import READERS

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
    ``scratch``: see "Memory" above; ``quantised``: whether weights may be stored otherwise than in the dtype of x: of quantised
    types, or in bfloat16; ``portable``: whether it is a rule of the op's own, for want of a better kernel."""

    op: str
    backend: str
    run: Callable[..., Any]
    when: tuple[Guard, ...] = ()
    wants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    title: str = ""
    into: bool = False
    scratch: Scratch | None = None
    quantised: bool = False
    portable: bool = False

    @property
    def name(self) -> str:
        """``backend.function``, or ``backend.plugin.function``; unique among the kernels of an op."""
        return f"{self.backend}.{self.title or self.run.__name__}"

    def refusal(self, node: Node) -> str | None:
        """The first reason why this kernel cannot run ``node``, or None."""
        strange = [value for value in node.inputs if isinstance(value.type.dtype, QuantType)]
        if strange and not self.quantised:
            return f"{strange[0]} is {strange[0].type.dtype}, and this kernel takes plain weights"
        if not self.quantised and (other := stored_otherwise(node)):
            return f"{other[0]} is {other[0].type.dtype}, and this kernel takes weights of {node.inputs[0].type.dtype} as x"
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
        """Every kernel of its own, the preferred of an op first, portable lowerings last; none of plugins. Who asks for the kernels
        of an op asks ``kernels_for``."""

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


@runtime_checkable
class RunsRules(Protocol):
    """A backend that can run an op by a rule of the op's own, as those of plugins are run for which it has no kernel."""

    def portable(self, op: type[Op]) -> Kernel | None:
        """A kernel made of a rule of the op; None where the op has none that fits."""


@runtime_checkable
class RunsAlone(Protocol):
    """A backend that finishes functions, and kernels that are run by themselves in a way of their own."""

    def alone(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel made ready to run outside an emitted function."""


@runtime_checkable
class CountsCompilations(Protocol):
    """A backend whose ``finish`` gives a function to a compiler, as one graph, for each class of sizes that it meets."""

    budget: int
    """How often one function may be compiled."""

    def compilations(self) -> dict[str, int]:
        """How often it compiled, by name of the emitted function."""

    def graph_breaks(self) -> int:
        """How often the compiler of this process left a function's graph to run it in Python."""


def kernels_for(backend: Backend, op: str, *, first: str | None = None) -> list[Kernel]:
    """The kernels that ``backend`` and plugins have for ``op``, the preferred first: the backend's, those of plugins, then portable
    ones. Those of the plugin ``first`` come before all. ``CompileError`` for a kernel of another backend, ``PluginError`` for
    kernels of the op's own plugin that cannot be imported."""
    own = [kernel for kernel in backend.kernels() if kernel.op == op]
    for kernel in own:
        strange = f"the kernel {kernel.name} for op {op} is among those of the backend '{backend.name}'; register it for that one"
        require(kernel.backend == backend.name, strange, CompileError)
    if "." in op and isinstance(backend, RunsRules) and not any(kernel.portable for kernel in own):
        rule = backend.portable(ops.get(op))
        own += [] if rule is None else [rule]
    added = [kernel for kernel in added_kernels(backend.name, needed=(op.partition(".")[0], first)) if kernel.op == op]
    preferred = [kernel for kernel in added if first is not None and kernel.title.startswith(f"{first}.")]
    return [
        *preferred,
        *(kernel for kernel in own if not kernel.portable),
        *(kernel for kernel in added if kernel not in preferred),
        *(kernel for kernel in own if kernel.portable),
    ]


def added_kernels(backend: str, *, needed: Collection[str | None] = ()) -> Iterator[Kernel]:
    """What plugins add to a backend, under their names. A broken table of kernels is an error where its plugin is ``needed``, and
    warned of otherwise."""
    for offer in plugins.offers("kernels"):
        if offer.name != backend:
            continue
        try:
            table = table_of(offer)
        except PluginError as error:
            if offer.plugin.name in needed:
                raise
            plugins.complain(offer.record, error)
            continue
        for kernel in table.kernels:
            yield replace(kernel, title=f"{offer.plugin.name}.{kernel.title or kernel.run.__name__}")


def table_of(offer: plugins.Offer) -> KernelTable:
    """The kernels that a plugin adds to a backend. ``PluginError`` where they cannot be had."""

    def fault(found: object) -> str:
        if not isinstance(found, KernelTable):
            return f"it is {type(found).__name__}, expected a deltaloom.passes.kernel.KernelTable"
        return "" if found.backend == offer.name else f"it is a table of kernels for the backend '{found.backend}'"

    table = offer.load(fault)
    assert isinstance(table, KernelTable)
    return table


def find_kernel(backend: Backend, op: str, name: str) -> Callable[..., Any]:
    """The function of the kernel ``name`` for ``op``; emitted source uses it."""
    for kernel in kernels_for(backend, op):
        if kernel.name == name:
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


def stored_otherwise(node: Node) -> list[Value]:
    """The weights of a node that are not in the dtype of x, its first input: quantised, or in bfloat16."""
    names = node.op.input_names()
    weights = [node.inputs[names.index(name)] for name in READERS.get(node.op.name, ())]
    return [value for value in weights if value.type.dtype != node.inputs[0].type.dtype]


def weights_in_bfloat16(node: Node) -> str | None:
    """All weights must be bfloat16."""
    for name in READERS[node.op.name]:
        found = input_type(node, name).dtype
        if found != bf16:
            return f"{name} is {found}, not bf16; --quantise bf16 makes it so"
    return None


def some_stored_otherwise(node: Node) -> str | None:
    """At least one weight must be quantised, or in bfloat16 where x is not."""
    return None if stored_otherwise(node) else f"its weights are {node.inputs[0].type.dtype} as x, not quantised"
