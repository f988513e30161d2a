"""Quantised matrices: into codes and scales, back to plain numbers, and what an op that reads a quantised weight shares.

A weight of a quantised type means the matrix that ``dequantize`` gives for it in the dtype of the op's first input, x. A weight in
bfloat16 means its numbers in that dtype, which is exact for float32 and float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import LONG_NAMES, DType, QuantType, TensorType, bf16, dtype_named, f8_e4m3, f32, i4, i8, parse_quant
from deltaloom.ops.signature import floating, has_dtype

HIGHEST: dict[DType, float] = {i8: 127.0, i4: 7.0, f8_e4m3: 448.0}
"""The largest code; integers are symmetric, so -128 and -8 are never written."""

LIMIT = 2.0**127
"""Weights may not be larger: code times scale could leave float32."""

READERS: dict[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "moe_experts": ("gate_up", "down"),
    "shared_moe": ("gate_up", "down", "shared_gate_up", "shared_down"),
}
"""Op -> its weights, which may be stored in another form than the dtype of x: quantised, or in bfloat16."""


class Dequantize(Op):
    """y[..., o, i] = float32(code[..., o, i]) * scale[..., o // rows, i // columns], rounded once to ``dtype`` (a long name)."""

    name: ClassVar[str] = "dequantize"
    sharding: ClassVar[str] = "... -> ..."
    dtype: str

    def infer(self, weight: TensorType) -> TensorType:
        require(isinstance(weight.dtype, QuantType), f"weight is {weight}, which is not quantised")
        known = self.dtype in LONG_NAMES and LONG_NAMES[self.dtype].kind == "float"
        require(known, f"dequantize to '{self.dtype}': expected float32, bfloat16, float16 or float64")
        require(weight.rank >= 2, f"weight {weight} should be [..., out, in]")
        return TensorType(LONG_NAMES[self.dtype], weight.static_shape())

    def reference(self, weight: QuantizedArray) -> Array:
        target = dtype_named(self.dtype).numpy
        computed = np.promote_types(target, np.float32)
        product: Array = _codes(weight).astype(computed) * _spread(weight.scale.astype(computed), weight)
        return product.astype(target)

    def torch(self, torch: Any, weight: Any) -> Any:
        target = getattr(torch, self.dtype)
        computed = torch.float64 if target == torch.float64 else torch.float32
        (height, width), (rows, columns) = weight.shape[-2:], weight.form.block
        scale = weight.scale.to(computed).repeat_interleave(rows, -2)[..., :height, :]
        if columns is not None:
            scale = scale.repeat_interleave(columns, -1)[..., :width]
        return (_code_tensor(torch, weight).to(computed) * scale).to(target)

    def cost(self, weight: TensorType) -> Cost:
        return Cost(weight.elements(), self.moved_bytes(weight))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        weight = draw_quantised(draw, draw.normal(*_draw_shape(draw)))
        return Case(cls(draw.choice("float32", "bfloat16", "float16", "float64")), (weight,))


class Quantize(Op):
    """w [..., o, i] as codes of ``form``, a quantised dtype as types print it; symmetric, in float32 whatever the dtype of w.

    scale = max |w| of the block / highest code (127, 7, 448), rounded to the dtype of the scales; code = w / scale, rounded half to
    even (for FP8 to its grid), at most the highest code. A block of zeros, and one whose scale is below 2**-126, has scale 0 and
    codes 0. So an integer code is wrong by at most half a scale. Raises ``GraphError`` for values that are not finite or above
    2**127, for which code times scale could leave float32."""

    name: ClassVar[str] = "quantize"
    form: str

    def infer(self, w: TensorType) -> TensorType:
        floating("w", w)
        form = parse_quant(self.form)
        require(form.scale in (f32, bf16), f"quantize to {form}: scales are computed in f32 or bf16")
        require(w.rank >= 2, f"w {w} should be [..., out, in]")
        return TensorType(form, w.static_shape())

    def factors(self, w: TensorType) -> str:
        (rows, columns), (height, width) = parse_quant(self.form).block, w.static_shape()[-2:]
        axes = f"... {_between('o', height, rows)} {_between('i', width, columns or width)}"
        return f"{axes} -> {axes}"

    def reference(self, w: Array) -> QuantizedArray:
        form, shape = parse_quant(self.form), tuple(w.shape)
        f = w.astype(np.float32)
        size = np.abs(f)
        bad = int(np.count_nonzero(~(size <= LIMIT)))
        require(bad == 0, f"{bad} of {size.size} values are not finite or are above 2**127 = 1.7e38, so they cannot be quantised")
        highest = HIGHEST[form.storage]
        for axis, length in ((-2, form.block[0]), (-1, form.block[1] or shape[-1])):
            size = np.maximum.reduceat(size, range(0, shape[axis], length), axis=axis)
        scale = (size / np.float32(highest)).astype(form.scale.numpy)
        scale[scale < np.float32(2.0**-126)] = 0
        step = scale.astype(np.float32)
        step[step == 0] = np.inf
        codes = f / _spread(step, QuantizedArray(f, scale, form, shape))
        np.clip(codes, -highest, highest, out=codes)
        return QuantizedArray(_packed(codes, form), scale, form, shape)

    def torch(self, torch: Any, w: Any) -> Any:
        form, shape = parse_quant(self.form), tuple(w.shape)
        f = w.to(torch.float32)
        require(bool((f.abs() <= LIMIT).all()), "values that are not finite or are above 2**127 = 1.7e38 cannot be quantised")
        rows, columns = form.block[0], form.block[1] or shape[-1]
        padding = (0, -shape[-1] % columns, 0, -shape[-2] % rows)
        blocks = torch.nn.functional.pad(f, padding).unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
        highest = HIGHEST[form.storage]
        scale = (blocks.abs().amax((-3, -1), keepdim=True) / highest).to(getattr(torch, form.scale.long_name))
        scale = scale.masked_fill(scale.float() < 2.0**-126, 0)
        step = scale.float().masked_fill(scale == 0, torch.inf)
        codes = (blocks / step).clamp(-highest, highest).flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]
        return QuantizedArray(_packed_tensor(torch, codes, form), scale.squeeze(-1).squeeze(-2), form, shape)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        w = draw.normal(*_draw_shape(draw)) * draw.choice(1.0, 1e-30, 100.0)
        w[..., : draw.integer(0, 1), :] = 0
        return Case(cls(str(draw_form(draw))), (w,))


def is_weight(name: str, type_: TensorType, dtype: DType) -> None:
    """``GraphError`` unless a weight has ``dtype`` as x, is quantised, or is bfloat16."""
    if not isinstance(type_.dtype, QuantType) and type_.dtype != bf16:
        has_dtype(name, type_, dtype, "as x")


def require_borders(name: str, type_: TensorType, axis: int, sizes: Sequence[Dim]) -> None:
    """``GraphError`` where consecutive pieces of ``sizes`` along an axis (from the front) cut a quantised type inside a block."""
    form = type_.dtype
    if isinstance(form, QuantType):
        for position in list(accumulate(size for size in sizes if isinstance(size, int)))[:-1]:
            found = f"{name} {type_} has a border at {position} of axis {axis}, which is inside a block"
            require(form.cuts(axis - type_.rank, position), f"{found}; dequantise it first")


def require_rows(name: str, type_: TensorType, shape: tuple[int, ...]) -> None:
    """``GraphError`` where a quantised type would not keep its rows, and its blocks of rows, in ``shape``."""
    form = type_.dtype
    if isinstance(form, QuantType):
        found = f"quantised {name} {type_} cannot be reshaped to {list(shape)}"
        before = type_.static_shape()
        require(len(shape) >= 2 and shape[-1] == before[-1], f"{found}: its rows must stay whole; dequantise it first")
        kept = shape[-2] == before[-2] or form.cuts(-2, shape[-2]) and form.cuts(-2, before[-2])
        require(kept, f"{found}: matrices would end inside its blocks; dequantise it first")


def plain(weight: Array | QuantizedArray, dtype: np.dtype[Any]) -> Array:
    """A weight as the array that it means for an x of ``dtype``."""
    if not isinstance(weight, QuantizedArray):
        return weight.astype(dtype, copy=False)
    name = next(name for name, known in LONG_NAMES.items() if known.numpy == dtype)
    return Dequantize(name).reference(weight)


def plain_tensor(torch: Any, weight: Any, dtype: Any) -> Any:
    """``plain`` for tensors."""
    if not isinstance(weight, QuantizedArray):
        return weight.to(dtype)
    return Dequantize(str(dtype).removeprefix("torch.")).torch(torch, weight)


def draw_form(draw: Draw) -> QuantType:
    """Some quantised dtype with small blocks."""
    storage, scale = draw.choice(i8, i4, f8_e4m3), draw.choice(f32, bf16)
    group = draw.choice(2, 16, 32) if storage == i4 else draw.choice(1, 3, 16)
    return QuantType(storage, draw.choice((1, None), (1, group), (draw.choice(2, 3, 16), group)), scale)


def draw_quantised(draw: Draw, weight: Array) -> QuantizedArray:
    """``weight`` [..., out, in] quantised to some form."""
    return Quantize(str(draw_form(draw))).reference(weight)


def draw_stored(draw: Draw, *weights: Array) -> tuple[tuple[Array | QuantizedArray, ...], tuple[DType | None, ...]]:
    """Weights [..., out, in] in forms that a reader takes, mostly all in one, and the dtypes that a case fixes for them."""
    kinds = ("as x", "bf16", "quantised")
    all_as = draw.choice("as x", *kinds, "")
    forms = [all_as or draw.choice(*kinds) for _ in weights]
    stored = tuple(draw_quantised(draw, weight) if form == "quantised" else weight for weight, form in zip(weights, forms))
    return stored, tuple(bf16 if form == "bf16" else None for form in forms)


def draw_pieces(draw: Draw) -> tuple[int, QuantizedArray, tuple[QuantizedArray, ...]]:
    """An axis, a quantised matrix and its pieces along that axis, cut at borders of blocks."""
    form = draw_form(draw)
    axis = -2 if form.block[1] is None else draw.choice(-2, -1)
    unit, other, count = form.block[axis] or 1, draw.size(), draw.integer(1, 4)
    sizes = [unit * draw.size(3) for _ in range(count - 1)] + [draw.size()]
    shape = (other, sum(sizes)) if axis == -1 else (sum(sizes), other)
    whole = Quantize(str(form)).reference(draw.normal(*shape))
    return axis, whole, whole.split(sizes, axis)


def _between(factor: str, size: int, length: int) -> str:
    """An axis in blocks of ``length``, which may be divided between them if all are full."""
    return f"({factor} {length})" if size % length == 0 else f"{factor}!"


def _draw_shape(draw: Draw) -> tuple[int, ...]:
    return (*(draw.size(3) for _ in range(draw.integer(0, 1))), draw.size(40), draw.size(40))


def _spread(scale: Array, weight: QuantizedArray) -> Array:
    """The scale of every element; of every row where blocks are whole rows."""
    (height, width), (rows, columns) = weight.shape[-2:], weight.form.block
    if rows > 1:
        scale = scale.repeat(rows, axis=-2)[..., :height, :]
    return scale if columns is None else scale.repeat(columns, axis=-1)[..., :width]


def _codes(weight: QuantizedArray) -> Array:
    """The codes [..., out, in], two a byte taken apart."""
    if weight.form.storage != i4:
        data: Array = weight.data
        return data
    pairs = np.stack((weight.data << 4, weight.data), axis=-1).view(np.int8) >> 4
    codes: Array = pairs.reshape(*weight.data.shape[:-1], -1)[..., : weight.shape[-1]]
    return codes


def _packed(codes: Array, form: QuantType) -> Array:
    """Codes as they are stored: rounded, two int4 a byte."""
    if form.storage != i4:
        whole = codes if form.storage == f8_e4m3 else np.rint(codes, out=codes)
        return whole.astype(form.storage.numpy)
    whole = np.rint(codes).astype(np.int8).view(np.uint8) & 15
    if whole.shape[-1] % 2:
        whole = np.concatenate((whole, np.zeros_like(whole[..., :1])), axis=-1)
    return whole[..., ::2] | whole[..., 1::2] << 4


def _code_tensor(torch: Any, weight: Any) -> Any:
    if weight.form.storage != i4:
        return weight.data
    pairs = torch.stack((weight.data & 15, weight.data >> 4), -1).flatten(-2)[..., : weight.shape[-1]]
    return (pairs.to(torch.int8) ^ 8) - 8


def _packed_tensor(torch: Any, codes: Any, form: QuantType) -> Any:
    if form.storage != i4:
        whole = codes if form.storage == f8_e4m3 else codes.round()
        return whole.to(getattr(torch, form.storage.long_name))
    whole = torch.nn.functional.pad(codes.round(), (0, codes.shape[-1] % 2)).to(torch.int8).view(torch.uint8) & 15
    return whole[..., ::2] | whole[..., 1::2] << 4
