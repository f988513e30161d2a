"""Rotary position embedding, computed from positions and never tabled (Qwen3-Next specification, section 7)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import LONG_NAMES, TensorType, dtype_named, f32, f64
from deltaloom.ops.laws import PermutationEquivariant, Streaming
from deltaloom.ops.signature import Axes, floating, has_dtype, integral


class RotaryEmbedding(Op):
    """cos and sin of angle = float32(position) * float32(inv_freq), rounded to float32; times ``magnitude``, cast.

    positions [batch, seq] give cos, sin [batch, seq, len(inv_freq)] in ``dtype`` (a long name). Scalings such as YaRN
    are in ``inv_freq`` and ``magnitude``."""

    name: ClassVar[str] = "rotary_embedding"
    outputs: ClassVar[tuple[str, ...]] = ("cos", "sin")
    sharding: ClassVar[str] = "b s -> b s f!, b s f!"
    laws: ClassVar[tuple[Any, ...]] = (Streaming(("positions",)), PermutationEquivariant(("positions",)))
    inv_freq: tuple[float, ...]
    dtype: str
    magnitude: float = 1.0

    def infer(self, positions: TensorType) -> tuple[TensorType, TensorType]:
        integral("positions", positions)
        Axes().bind("positions", positions, "batch seq")
        known = self.dtype in LONG_NAMES and LONG_NAMES[self.dtype].kind == "float"
        require(known, f"rotary_embedding in '{self.dtype}': expected float32, bfloat16, float16 or float64")
        require(len(self.inv_freq) > 0, "rotary_embedding needs at least one frequency in inv_freq")
        angles = TensorType(LONG_NAMES[self.dtype], (*positions.shape, len(self.inv_freq)))
        return angles, angles

    def reference(self, positions: Array) -> tuple[Array, Array]:
        angles = positions.astype(np.float32)[..., None] * np.asarray(self.inv_freq, np.float32)
        target = dtype_named(self.dtype).numpy
        wider = angles.astype(np.float64)
        return (np.cos(wider) * self.magnitude).astype(target), (np.sin(wider) * self.magnitude).astype(target)

    def torch(self, torch: Any, positions: Any) -> Any:
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32, device=positions.device)
        angles = positions.to(torch.float32)[..., None] * inv_freq
        target = getattr(torch, self.dtype)
        if target == torch.float64:
            angles = angles.to(torch.float64)
        return (angles.cos() * self.magnitude).to(target), (angles.sin() * self.magnitude).to(target)

    def onnx(self, b: Any, positions: str) -> Any:
        where = b.Unsqueeze(b.cast(positions, f32), b.ints(-1))
        angles = b.Mul(where, b.constant(self.inv_freq))
        magnitude = b.attribute("magnitude")
        target = dtype_named(self.dtype)
        return tuple(b.cast(b.Mul(turn(angles), magnitude), target) for turn in (b.Cos, b.Sin))

    def cost(self, positions: TensorType) -> Cost:
        return Cost(20 * len(self.inv_freq) * positions.elements(), self.moved_bytes(positions))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        inv_freq = tuple(float(10_000.0 ** (-j / 8)) for j in range(draw.integer(1, 8)))
        positions = draw.integers(0, draw.choice(100, 1_000_000), draw.integer(1, 3), draw.size())
        dtype = draw.choice("float32", "bfloat16", "float16", "float64")
        op = cls(inv_freq, dtype, draw.choice(1.0, 1.138629436111989))
        return Case(op, (positions.astype(draw.choice("int64", "int32")),))


class Rope(Op):
    """(x1 cos - x2 sin, x2 cos + x1 sin, rest), every step rounded to the model dtype; x1, x2 are the first two halves.

    x [batch, seq, heads, width]; cos, sin [batch, seq, half] with 2 * half <= width; element j pairs with j + half."""

    name: ClassVar[str] = "rope"
    sharding: ClassVar[str] = "b s h d!, b s f!, b s f! -> b s h d!"
    laws: ClassVar[tuple[Any, ...]] = (Streaming(("x", "cos", "sin")), PermutationEquivariant(("x", "cos", "sin")))

    def infer(self, x: TensorType, cos: TensorType, sin: TensorType) -> TensorType:
        dtype = floating("x", x)
        axes = Axes()
        axes.bind("x", x, "batch seq heads width")
        axes.bind("cos", cos, "batch seq half")
        axes.bind("sin", sin, "batch seq half")
        has_dtype("cos", cos, dtype, "as x")
        has_dtype("sin", sin, dtype, "as x")
        fits = 2 * axes.number("half") <= axes.number("width")
        require(fits, f"cos {cos} rotates more elements than the last axis of x {x} has")
        return x

    def reference(self, x: Array, cos: Array, sin: Array) -> Array:
        half = cos.shape[-1]
        x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = cos[:, :, None], sin[:, :, None]
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)

    def torch(self, torch: Any, x: Any, cos: Any, sin: Any) -> Any:
        half = cos.shape[-1]
        x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        cos, sin = cos[:, :, None], sin[:, :, None]
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)

    def onnx(self, b: Any, x: str, cos: str, sin: str) -> Any:
        half, width = b.type(cos).shape[-1], b.type(x).shape[-1]
        rest = width - 2 * half
        if b.has("RotaryEmbedding") and b.dtypes[x] != f64:
            # Heads side by side, so that nothing is transposed. Some runtimes want to know their number even where they are not.
            heads = b.type(x).shape[2]
            flat = b.reshape(x, b.size(x, 0), b.size(x, 1), heads * width)
            turned = b.RotaryEmbedding(flat, cos, sin, num_heads=heads, rotary_embedding_dim=2 * half)
            return b.Reshape(turned, b.Shape(x))
        x1, x2, *tail = b.Split(x, b.ints(half, half, *([rest] if rest else [])), axis=-1, outputs=2 + bool(rest))
        c, s = (b.Unsqueeze(angle, b.ints(2)) for angle in (cos, sin))
        turned = b.Sub(b.Mul(x1, c), b.Mul(x2, s)), b.Add(b.Mul(x2, c), b.Mul(x1, s))
        return b.Concat(*turned, *tail, axis=-1)

    def cost(self, x: TensorType, cos: TensorType, sin: TensorType) -> Cost:
        return Cost(6 * cos.elements() * x.shape[2], self.moved_bytes(x, cos, sin))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, seq, heads, half = draw.integer(1, 3), draw.size(), draw.size(5), draw.size()
        angles = draw.uniform(0.0, 6.3, batch, seq, half)
        x = draw.normal(batch, seq, heads, 2 * half + draw.choice(0, 1, 6))
        return Case(cls(), (x, np.cos(angles), np.sin(angles)))
