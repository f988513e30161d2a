"""The base of every op: a frozen dataclass whose fields are the attributes and whose methods are the rules.

Every rule has the form ``(self, toolbox, *inputs)``. ``infer`` and ``reference`` are needed; an absent optional rule is None
on the class, so that ``op.torch is None`` reads "there is no torch rule".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar, Protocol, dataclass_transform

import numpy as np

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import GraphError
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DType, TensorType

Attribute = int | float | bool | str | None | tuple["Attribute", ...]
Array = np.ndarray[Any, np.dtype[Any]]
Rule = Callable[..., Any] | None
Inferred = TensorType | tuple[TensorType, ...]


@dataclass(frozen=True)
class Cost:
    """Work of one evaluation: floating-point operations and bytes moved, as expressions over the symbols."""

    flops: Dim
    bytes: Dim


def _no_infer(op: Op, *types: TensorType) -> Inferred:
    raise GraphError(f"op {op.name} has no infer rule")


def _bytes_only(op: Op, *types: TensorType) -> Cost:
    return Cost(0, op.moved_bytes(*types))


def _all_of_them(op: Op, *types: TensorType) -> Mapping[str, Fraction]:
    return {}


def _class_sharding(op: Op, *types: TensorType) -> str | None:
    return op.sharding


def _as_it_is(op: Op, *outputs: TensorType) -> Op:
    return op


class Draw(Protocol):
    """What a ``cases`` rule draws from (the conformance kit gives it; so op files need no Hypothesis)."""

    def integer(self, low: int, high: int) -> int:
        """An integer, both ends included."""

    def size(self, high: int = 9) -> int:
        """A dimension from 1 to ``high``, with a taste for 1, primes and the numbers around 16 and 64."""

    def choice(self, *options: Any) -> Any:
        """One of the options."""

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """float64 normal numbers; now and then zeros, equal rows or a large magnitude."""

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        """float64 uniform numbers."""

    def integers(self, low: int, high: int, *shape: int) -> Array:
        """int64 numbers, both ends included."""


@dataclass(frozen=True)
class Case:
    """A generated input that ``infer`` accepts: the op and its arrays. Float arrays come as float64 and are rounded to the dtype
    under test, unless ``dtypes`` fixes another one for that input (a test in float64 takes float64 for all); integer, bool and
    quantised arrays stay as they are."""

    op: Op
    arrays: tuple[Array | QuantizedArray, ...]
    dtypes: tuple[DType | None, ...] = ()


@dataclass_transform(frozen_default=True)
class Op:
    """An op with its attributes. Subclasses are made frozen dataclasses without a decorator."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    sharding: ClassVar[str | None] = None
    commutative: ClassVar[bool] = False
    laws: ClassVar[tuple[Any, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("out",)
    updates: ClassVar[Mapping[str, int]] = {}
    """State inputs by parameter name -> the index of the output that is the state's new value."""
    appends: ClassVar[Mapping[str, int]] = {}
    """Those of them that grow: parameter name -> the axis along which the new value extends the old one."""

    infer: ClassVar[Callable[..., Inferred]] = _no_infer
    """Input types -> the output types, or ``GraphError`` with a sentence that shows the offending type."""
    cost: ClassVar[Callable[..., Cost]] = _bytes_only
    """Input types -> FLOPs and bytes; unless an op says more, no FLOPs and the bytes of inputs and outputs."""
    reads: ClassVar[Callable[..., Mapping[str, Fraction]]] = _all_of_them
    """Input types -> by input name, the part of a weight that one token reads, for weights of which it does not read all."""
    factors: ClassVar[Callable[..., str | None]] = _class_sharding
    """Input types -> the sharding string (``deltaloom.ops.factors``); its class's, unless it follows from the attributes."""
    resized: ClassVar[Callable[..., Op]] = _as_it_is
    """Output types of the same kind in other sizes -> the op that gives these, for ops that have sizes as attributes."""
    reference: ClassVar[Rule] = None
    decompose: ClassVar[Rule] = None
    """Builder and input values -> the same result from smaller ops, or None where the attributes leave nothing to take apart."""
    torch: ClassVar[Rule] = None
    onnx: ClassVar[Rule] = None
    cases: ClassVar[Rule] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(frozen=True, repr=False)(cls)

    def moved_bytes(self, *types: TensorType) -> Dim:
        """Bytes of all inputs and outputs."""
        moved: Dim = 0
        for type_ in (*types, *self.output_types(*types)):
            moved = moved + type_.nbytes()
        return moved

    def output_types(self, *types: TensorType) -> tuple[TensorType, ...]:
        """``infer``, always as a tuple."""
        low, high = self.arity()
        if not low <= len(types) <= high:
            wanted = str(low) if low == high else f"{low} to {high}"
            raise GraphError(f"op {self.name} takes {wanted} inputs ({', '.join(self.input_names())}), got {len(types)}")
        result: Inferred = self.infer(*types)
        return result if isinstance(result, tuple) else (result,)

    @classmethod
    @cache
    def input_names(cls) -> tuple[str, ...]:
        """The inputs by name: the parameters of ``infer``; a variadic op has the one name of its ``*types``."""
        return tuple(inspect.signature(cls.infer).parameters)[1:]

    @classmethod
    @cache
    def arity(cls) -> tuple[int, int]:
        """Least and greatest number of inputs; a parameter with a default is optional, ``*types`` takes any number."""
        parameters = list(inspect.signature(cls.infer).parameters.values())[1:]
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            return 1, 1 << 30
        needed = sum(p.default is inspect.Parameter.empty for p in parameters)
        return needed, len(parameters)

    def attributes(self) -> dict[str, Attribute]:
        """The attributes by name, in the order of their declaration."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def __str__(self) -> str:
        body = ", ".join(f"{key}={value!r}" for key, value in self.attributes().items())
        return f"{self.name}({body})"

    __repr__ = __str__
