"""The toolbox of ops' ``onnx(b, *names)`` rules: standard ONNX nodes, written like function calls.

``b.MatMul(x, w)`` adds a node and gives the name of its output; attributes are keywords. Values are names. Bodies compute in
float32 (``b.wide``) and come back to the dtype of the op's input (``b.narrow``), as the op's definition says. Sizes of the batch,
of tokens and of the past are read from shapes at run time (``b.size``), so that one body serves any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deltaloom.backends.onnx.profiles import CONTRIB, Profile
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import DType, TensorType, bf16, bool_, f8_e4m3, f16, f32, f64, i4, i8, i32, i64, u8

ELEMENTS: dict[DType, int] = {
    f64: TensorProto.DOUBLE,
    f32: TensorProto.FLOAT,
    f16: TensorProto.FLOAT16,
    bf16: TensorProto.BFLOAT16,
    i64: TensorProto.INT64,
    i32: TensorProto.INT32,
    i8: TensorProto.INT8,
    i4: TensorProto.INT4,
    f8_e4m3: TensorProto.FLOAT8E4M3FN,
    u8: TensorProto.UINT8,
    bool_: TensorProto.BOOL,
}
"""Element types of ONNX."""


SINCE = {"RMSNormalization": 23, "RotaryEmbedding": 23, "Attention": 24, "LinearAttention": 27, "CausalConvWithState": 27}
"""Newer standard ops that rules use where they can -> the opset from which on they mean what the rules need."""

CONTRIB_OPS = ("LinearAttention", "CausalConvWithState")
"""Those that ONNX Runtime has as its own ops as well, with the same inputs, outputs and attributes."""


class Caller(Protocol):
    """Who knows the functions of a model."""

    profile: Profile

    def call(self, body: Body, op: Op, names: Sequence[str]) -> tuple[str, ...]:
        """Add a call of the function of ``op`` to ``body``; the names of its outputs."""


@dataclass
class Typed:
    """A value that goes in or out of the body of a Scan, Loop or If: its dtype and rank."""

    dtype: DType
    rank: int


@dataclass(frozen=True)
class Reference:
    """An attribute of a node that is an attribute of the op: its name there, and its value in this function."""

    key: str
    value: Any


@dataclass
class Body:
    """Nodes under construction: a function's, or those of a Scan, Loop or If within it."""

    library: Caller
    types: dict[str, TensorType] = field(default_factory=dict)
    """Types of the op's inputs, and of what ``b.apply`` gives."""
    dtypes: dict[str, DType] = field(default_factory=dict)
    """The dtype of every value."""
    prefix: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    """Attributes of the op; those that a rule asks for by ``b.attribute`` become attributes of the function."""
    used: dict[str, Any] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _constants: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)

        def add(*inputs: str, outputs: int = 1, **attributes: Any) -> Any:
            made = self.node(op_type, inputs, outputs, **attributes)
            return made[0] if outputs == 1 else made

        return add

    def node(self, op_type: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **attributes: Any) -> tuple[str, ...]:
        """A node of any domain; an empty name leaves an optional input out."""
        names = tuple(self.name(op_type.lower()) for _ in range(outputs))
        plain = {key: value for key, value in attributes.items() if not isinstance(value, Reference)}
        made = helper.make_node(op_type, inputs, names, name=names[0], domain=domain, **plain)
        made.attribute.extend(_referring(key, value) for key, value in attributes.items() if isinstance(value, Reference))
        self.nodes.append(made)
        if not domain:
            self.dtypes.update(zip(names, _dtypes(op_type, [self.dtypes[name] for name in inputs if name], attributes)))
        return names

    @property
    def opset(self) -> int:
        """The version of the standard ops that the rule may use, 21 at least."""
        return self.library.profile.opset

    @property
    def contrib(self) -> bool:
        """Whether the rule may use ONNX Runtime's own ops."""
        return self.library.profile.contrib

    def has(self, op_type: str) -> bool:
        """Whether the rule may use an op of this name: a standard one of the opset, or one of ONNX Runtime's own."""
        return self.opset >= SINCE[op_type] or self.contrib and op_type in CONTRIB_OPS

    def newer(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """An op for which ``has`` was asked: the standard one, else ONNX Runtime's own of the same name and meaning. All outputs
        have the dtype of the first input; an empty name leaves an optional input out."""
        domain, dtype = "" if self.opset >= SINCE[op_type] else CONTRIB, self.dtypes[inputs[0]]
        made = self.node(op_type, inputs, outputs, domain, **attributes)
        if domain:
            # Checkers know the dtype of a cast, and nothing of other domains; runtimes drop a cast that does nothing.
            made = tuple(self.node("Cast", [name], to=ELEMENTS[dtype])[0] for name in made if self.dtypes.setdefault(name, dtype))
        return made[0] if outputs == 1 else made

    def name(self, stem: str) -> str:
        """A name that no other value of this function has."""
        number = self._counts.get(stem, 0)
        while (made := f"{stem}_{number}" if number else stem) in self._taken:
            number += 1
        self._counts[stem] = number + 1
        self._taken.add(made)
        return f"{self.prefix}{made}"

    def constant(self, value: Any, dtype: DType = f32) -> str:
        """An array as a constant; equal ones are one."""
        array = np.asarray(value, dtype.numpy)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.Constant(value=to_array(array, dtype))
            self.dtypes[self._constants[key]] = dtype
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """An int64 vector: axes, sizes, positions."""
        return self.constant(values, i64)

    def attribute(self, key: str) -> str:
        """An int or float attribute of the op as a scalar, int64 or float32."""
        found = self.reference(key)
        whole = isinstance(found.value, int)
        given: dict[str, Any] = {"value_int" if whole else "value_float": found}
        (name,) = self.node("Constant", (), **given)
        self.dtypes[name] = i64 if whole else f32
        return name

    def reference(self, key: str) -> Reference:
        """An int or float attribute of the op, as an attribute of a node."""
        self.used[key] = self.attributes[key]
        return Reference(key, self.attributes[key])

    def type(self, name: str) -> TensorType:
        """The type of an input of the op."""
        return self.types[name]

    def size(self, name: str, axis: int) -> str:
        """One axis of a value as an int64 vector of one element: a constant where it is known, else read at run time."""
        known = self.types[name].shape[axis] if name in self.types else None
        if isinstance(known, int):
            return self.ints(known)
        if axis == -1:
            return str(self.Shape(name, start=-1))
        return str(self.Shape(name, start=axis, end=axis + 1))

    def reshape(self, x: str, *sizes: int | str) -> str:
        """``x`` with these sizes: numbers, -1, or names of int64 vectors."""
        if all(isinstance(size, int) for size in sizes):
            return str(self.Reshape(x, self.ints(*map(int, sizes)), allowzero=int(0 in sizes)))
        parts = [self.ints(size) if isinstance(size, int) else size for size in sizes]
        return str(self.Reshape(x, self.Concat(*parts, axis=0)))

    def scalar(self, x: str) -> str:
        """The one element of a vector."""
        return str(self.Reshape(x, self.constant(np.empty(0), i64)))

    def slice(self, x: str, axis: int, start: int | str, stop: int | str | None = None) -> str:
        """``x[start:stop]`` along an axis."""
        begin = self.ints(start) if isinstance(start, int) else start
        end = self.ints(np.iinfo(np.int64).max if stop is None else stop) if not isinstance(stop, str) else stop
        return str(self.Slice(x, begin, end, self.ints(axis)))

    def cast(self, x: str, dtype: DType) -> str:
        """``x`` in another dtype."""
        return x if self.dtypes[x] == dtype else str(self.Cast(x, to=ELEMENTS[dtype]))

    def wide(self, x: str) -> str:
        """``x`` in float32 at least."""
        return x if self.dtypes[x] == f64 else self.cast(x, f32)

    def narrow(self, y: str, like: str) -> str:
        """``y``, computed in float32, in the dtype of ``like``."""
        return self.cast(y, self.dtypes[like])

    def sigmoid(self, x: str) -> str:
        """``1 / (1 + exp(-x))``. ONNX Runtime's own is exact to 5e-8 of 1 only (17 % off at -15, 0 from -18 on), which
        shows where a norm follows, as in the delta rule: a result was wrong by 70 % of the largest."""
        return str(self.Reciprocal(self._one_plus_exp(x)))

    def silu(self, x: str) -> str:
        """``x * sigmoid(x)``."""
        return str(self.Div(x, self._one_plus_exp(x)))

    def _one_plus_exp(self, x: str) -> str:
        return str(self.Add(self.like(1, x), self.Exp(self.Neg(x))))

    def like(self, value: float, x: str) -> str:
        """A number as a scalar of the dtype of ``x``."""
        return self.constant(value, self.dtypes[x])

    def kind(self, x: str, rank: int) -> Typed:
        """What goes in or out of an inner body, of the dtype of ``x``."""
        return Typed(self.dtypes[x], rank)

    def apply(self, op: Op, *names: str) -> Any:
        """A call of another op's function; a name, or a tuple of names."""
        made = self.library.call(self, op, names)
        return made[0] if len(made) == 1 else made

    def scan(
        self,
        step: Callable[..., Sequence[str]],
        *,
        states: Sequence[tuple[str, Typed]],
        sequences: Sequence[tuple[str, Typed]],
        outputs: Sequence[Typed],
    ) -> tuple[str, ...]:
        """``step(b, *states, *slices)`` gives new states, then outputs; sequences are cut, and outputs stacked, along axis 0.
        ``Typed`` says what the step sees. Gives the last states, then the outputs."""
        given = [*states, *sequences]
        seen = [typed for _, typed in given]
        made = [*(typed for _, typed in states), *outputs]
        graph = self.graph(step, seen, made, "step")
        names = self.node("Scan", [name for name, _ in given], len(made), body=graph, num_scan_inputs=len(sequences))
        return self._typed(names, made)

    def loop(self, step: Callable[..., Sequence[str]], count: str, *, states: Sequence[tuple[str, Typed]]) -> tuple[str, ...]:
        """``step(b, number, *states)`` gives new states, ``count`` times; ``count`` and ``number`` are int64 scalars."""

        def turn(b: Body, number: str, condition: str, *values: str) -> Sequence[str]:
            return (b.Identity(condition), *step(b, number, *values))

        kinds = [typed for _, typed in states]
        graph = self.graph(turn, [Typed(i64, 0), Typed(bool_, 0), *kinds], [Typed(bool_, 0), *kinds], "turn")
        true = self.constant(True, bool_)
        return self._typed(self.node("Loop", [count, true, *(name for name, _ in states)], len(kinds), body=graph), kinds)

    def branch(
        self, condition: str, then: Callable[[Body], Sequence[str]], otherwise: Callable[[Body], Sequence[str]], *outputs: Typed
    ) -> tuple[str, ...]:
        """If: both sides see the values around them and give as many outputs."""
        graphs = {
            "then_branch": self.graph(then, (), outputs, "then"),
            "else_branch": self.graph(otherwise, (), outputs, "else"),
        }
        return self._typed(self.node("If", [condition], len(outputs), **graphs), outputs)

    def _typed(self, names: tuple[str, ...], kinds: Sequence[Typed]) -> tuple[str, ...]:
        self.dtypes.update(zip(names, (kind.dtype for kind in kinds), strict=True))
        return names

    def graph(self, build: Callable[..., Sequence[str]], seen: Sequence[Typed], made: Sequence[Typed], title: str) -> Any:
        """The body of a control-flow node."""
        inner = Body(self.library, self.types, self.dtypes, f"{self.name(title)}.", attributes=self.attributes, used=self.used)
        names = [inner.name(f"in{position}") for position in range(len(seen))]
        self.dtypes.update(zip(names, (kind.dtype for kind in seen), strict=True))
        results = [inner.Identity(name) for name in build(inner, *names)]
        return helper.make_graph(inner.nodes, title, _infos(names, seen), _infos(results, made))


def _referring(name: str, found: Reference) -> onnx.AttributeProto:
    kind = onnx.AttributeProto.INT if isinstance(found.value, int) else onnx.AttributeProto.FLOAT
    return onnx.AttributeProto(name=name, ref_attr_name=found.key, type=kind)


def _infos(names: Sequence[str], kinds: Sequence[Typed]) -> list[onnx.ValueInfoProto]:
    """Values whose rank alone is known."""
    pairs = zip(names, kinds, strict=True)
    return [helper.make_tensor_value_info(name, ELEMENTS[kind.dtype], [None] * kind.rank) for name, kind in pairs]


_INDICES = {"Shape", "Size", "NonZero", "ArgMax"}
_TRUTHS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not"}


def _dtypes(op_type: str, inputs: Sequence[DType], attributes: Mapping[str, Any]) -> list[DType]:
    """The dtypes of the outputs of a standard op: mostly that of its first input."""
    if op_type == "Cast":
        return [next(dtype for dtype, code in ELEMENTS.items() if code == attributes["to"])]
    if op_type in _INDICES:
        return [i64]
    if op_type in _TRUTHS:
        return [bool_]
    if op_type == "TopK":
        return [inputs[0], i64]
    if op_type == "Unique":
        return [inputs[0], i64, i64, i64]
    if op_type == "Where":
        return [inputs[1]]
    return [inputs[0]] * 9 if inputs else []


def tensor_dims(type_: TensorType, symbols: Mapping[str, str]) -> list[int | str]:
    """Sizes for a value info; symbolic ones by the names that users of ONNX know."""
    return [dim if isinstance(dim, int) else symbols.get(str(dim), str(dim)) for dim in type_.shape]


def to_array(value: Array, dtype: DType) -> onnx.TensorProto:
    """A tensor with its data."""
    return numpy_helper.from_array(np.asarray(value, dtype.numpy, order="C"))
