"""What stands around attention, fused: heads cut, normed and rotated before it, the output gate after it
(Qwen3-Next specification, section 6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Draw, Inferred
from deltaloom.graph.types import TensorType, f32
from deltaloom.ops.fused import Fused
from deltaloom.ops.laws import PermutationEquivariant, Streaming
from deltaloom.ops.padding import left_padded


class QKVNormRope(Fused):
    """q, k, v and, if ``gated``, gate of projected = [q | gate | k | v]; q and k are normed by head, then rotated.

    projected [batch, seq, Hq D (+ Hq D) + 2 Hkv D]; q_weight, k_weight [D] as ``rms_norm`` takes them; cos, sin
    [batch, seq, half]. Gives q [batch, seq, Hq, D], k and v [batch, seq, Hkv, D], gate [batch, seq, Hq D]."""

    name: ClassVar[str] = "qkv_norm_rope"
    outputs: ClassVar[tuple[str, ...]] = ("q", "k", "v", "gate")
    laws: ClassVar[tuple[Any, ...]] = (
        Streaming(("projected", "cos", "sin")),
        PermutationEquivariant(("projected", "cos", "sin")),
    )
    heads: int
    kv_heads: int
    eps: float
    gated: bool = False
    zero_centred: bool = False

    def infer(
        self, projected: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType, sin: TensorType
    ) -> Inferred:
        return self.types(projected, q_weight, k_weight, cos, sin)

    def factors(self, *types: TensorType) -> str:
        gate, out = ("h r d!|", ", b s (h r d!)") if self.gated else ("", "")
        return f"b s (h r d!|{gate}h d!|h d!), d!, d!, b s f!, b s f! -> b s (h r) d!, b s h d!, b s h d!{out}"

    def resized(self, q: TensorType, k: TensorType, *rest: TensorType) -> QKVNormRope:
        return replace(self, heads=q.static_shape()[2], kv_heads=k.static_shape()[2])

    def sizes(self, width: int) -> tuple[int, ...]:
        """The parts of ``projected`` for heads of ``width``."""
        q, kv = self.heads * width, self.kv_heads * width
        return (q, q, kv, kv) if self.gated else (q, kv, kv)

    def decompose(self, g: Any, projected: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
        require(q_weight.type.rank == 1, f"q_weight {q_weight.type} should be [head width]")
        (width,) = q_weight.type.static_shape()
        q, *gate, k, v = g.split(projected, sizes=self.sizes(width), axis=-1, name="q_gate_k_v")
        norm = {"eps": self.eps, "zero_centred": self.zero_centred}
        q = g.rms_norm(g.unflatten(q, sizes=(self.heads, width), name="q_heads"), q_weight, **norm, name="q_norm")
        k = g.rms_norm(g.unflatten(k, sizes=(self.kv_heads, width), name="k_heads"), k_weight, **norm, name="k_norm")
        v = g.unflatten(v, sizes=(self.kv_heads, width), name="v")
        return g.rope(q, cos, sin, name="q"), g.rope(k, cos, sin, name="k"), v, *gate

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, seq, kv_heads, repeats = draw.integer(1, 3), draw.size(), draw.integer(1, 4), draw.integer(1, 3)
        half, lifted = draw.size(7), draw.choice(False, True)
        width = 2 * half + draw.choice(0, 1, 6)
        op = cls(kv_heads * repeats, kv_heads, draw.choice(1e-6, 1e-2), gated=draw.choice(True, False), zero_centred=lifted)
        angles = draw.uniform(0.0, 6.3, batch, seq, half)
        weight = f32 if lifted else None
        arrays = (
            draw.normal(batch, seq, sum(op.sizes(width))),
            draw.uniform(0.5, 1.5, width),
            draw.uniform(0.5, 1.5, width),
            np.cos(angles),
            np.sin(angles),
        )
        return Case(op, arrays, (None, weight, weight, None, None))


class GatedAttention(Fused):
    """attention, its heads flattened, times sigmoid(gate).

    q, k, v, caches and ``valid`` as ``attention`` takes them; gate and out [batch, seq, Hq D]."""

    name: ClassVar[str] = "gated_attention"
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_key_cache", "new_value_cache")
    updates: ClassVar[dict[str, int]] = {"key_cache": 1, "value_cache": 2}
    appends: ClassVar[dict[str, int]] = {"key_cache": 2, "value_cache": 2}
    sharding: ClassVar[str] = (
        "b s! (h r) d!, b s! h d!, b s! h v, b s! (h r v), b h past! d!, b h past! v, b all! "
        "-> b s! (h r v), b h all! d!, b h all! v"
    )
    laws: ClassVar[tuple[Any, ...]] = (
        Streaming(("q", "k", "v", "gate"), prefix=("valid",)),
        PermutationEquivariant(("q", "k", "v", "gate", "key_cache", "value_cache", "valid")),
    )
    scale: float

    def infer(
        self,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        gate: TensorType,
        key_cache: TensorType,
        value_cache: TensorType,
        valid: TensorType | None = None,
    ) -> Inferred:
        given = (q, k, v, gate, key_cache, value_cache)
        return self.types(*given) if valid is None else self.types(*given, valid)

    def decompose(self, g: Any, q: Any, k: Any, v: Any, gate: Any, key_cache: Any, value_cache: Any, valid: Any = None) -> Any:
        mask = () if valid is None else (valid,)
        out, new_key, new_value = g.attention(q, k, v, key_cache, value_cache, *mask, scale=self.scale, name="attention")
        return g.sigmoid_gate(g.flatten(out, axes=2, name="heads"), gate, name="out"), new_key, new_value

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, past, seq = draw.integer(1, 3), draw.choice(0, 1, 7, 64), draw.choice(1, 2, 3, 13, 65)
        heads, repeats, width = draw.integer(1, 4), draw.integer(1, 3), draw.size(17)
        arrays: list[Array] = [
            draw.normal(batch, seq, heads * repeats, width),
            draw.normal(batch, seq, heads, width),
            draw.normal(batch, seq, heads, width),
            draw.normal(batch, seq, heads * repeats * width, scale=draw.choice(1.0, 30.0)),
            draw.normal(batch, heads, past, width),
            draw.normal(batch, heads, past, width),
        ]
        if draw.choice(False, True):
            arrays.append(left_padded(draw, batch, past + seq))
        return Case(cls(scale=draw.choice(width**-0.5, 1.0)), tuple(arrays))
