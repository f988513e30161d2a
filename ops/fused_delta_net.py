"""The gated delta net between its input and its output projection, as one op (Qwen3-Next specification, section 5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from deltaloom.graph.op import Case, Draw, Inferred
from deltaloom.graph.types import TensorType, f32
from deltaloom.ops.fused import Fused
from deltaloom.ops.laws import PermutationEquivariant, Streaming


class GatedDeltaNet(Fused):
    """Convolution with silu, norms of q and k, gates, delta rule and gated norm of projected = [q | k | v | z | b | a].

    projected [batch, seq, 2 Hk dk + 2 Hv dv + 2 Hv]; conv_weight [C, 1, K] with C = 2 Hk dk + Hv dv; a_log, dt_bias [Hv];
    norm_weight [dv]; states conv [batch, C, K - 1] and delta [batch, Hv, dk, dv]. Gives out [batch, seq, Hv dv]."""

    name: ClassVar[str] = "gated_delta_net"
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_conv", "new_delta")
    updates: ClassVar[dict[str, int]] = {"conv": 1, "delta": 2}
    sharding: ClassVar[str] = (
        "b s! (h k!|h k!|h r v!|h r v!|h r|h r), (h k!|h k!|h r v!) 1 taps!, (h r), (h r), v!, "
        "b (h k!|h k!|h r v!) w!, b (h r) k! v! -> b s! (h r v!), b (h k!|h k!|h r v!) w!, b (h r) k! v!"
    )
    laws: ClassVar[tuple[Any, ...]] = (Streaming(("projected",)), PermutationEquivariant(("projected", "conv", "delta")))
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    scale: float
    eps: float
    l2_eps: float = 1e-6

    def infer(
        self,
        projected: TensorType,
        conv_weight: TensorType,
        a_log: TensorType,
        dt_bias: TensorType,
        norm_weight: TensorType,
        conv: TensorType,
        delta: TensorType,
    ) -> Inferred:
        return self.types(projected, conv_weight, a_log, dt_bias, norm_weight, conv, delta)

    def resized(self, out: TensorType, conv: TensorType, delta: TensorType) -> GatedDeltaNet:
        value_heads, channels = delta.shape[1], conv.shape[1]
        assert isinstance(value_heads, int) and isinstance(channels, int)
        key_heads = (channels - value_heads * self.value_dim) // (2 * self.key_dim)
        return replace(self, key_heads=key_heads, value_heads=value_heads)

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of all queries (or keys) and of all values."""
        return self.key_heads * self.key_dim, self.value_heads * self.value_dim

    def decompose(
        self, g: Any, projected: Any, conv_weight: Any, a_log: Any, dt_bias: Any, norm_weight: Any, conv: Any, delta: Any
    ) -> Any:
        keys, values = self.widths
        sizes = (2 * keys + values, values, self.value_heads, self.value_heads)
        qkv, z, b, a = g.split(projected, sizes=sizes, axis=-1, name="qkv_z_b_a")
        qkv, new_conv = g.causal_conv1d(qkv, conv_weight, conv, activation="silu", name="conv1d")
        q, k, v = g.split(qkv, sizes=(keys, keys, values), axis=-1, name="q_k_v")
        heads = (self.key_heads, self.key_dim)
        q = g.l2_norm(g.unflatten(q, sizes=heads, name="q_heads"), eps=self.l2_eps, name="q")
        k = g.l2_norm(g.unflatten(k, sizes=heads, name="k_heads"), eps=self.l2_eps, name="k")
        v = g.unflatten(v, sizes=(self.value_heads, self.value_dim), name="v")
        z = g.unflatten(z, sizes=(self.value_heads, self.value_dim), name="z")
        beta, log_decay = g.delta_gates(b, a, a_log, dt_bias, name="gates")
        out, new_delta = g.gated_delta_rule(q, k, v, log_decay, beta, delta, scale=self.scale, name="delta_rule")
        out = g.gated_rms_norm(out, z, norm_weight, eps=self.eps, name="norm")
        return g.flatten(out, axes=2, name="heads"), new_conv, new_delta

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, seq, taps = draw.integer(1, 3), draw.choice(1, 2, 3, 17, 65), draw.choice(4, 2, 1)
        key_heads, repeats = draw.integer(1, 4), draw.integer(1, 3)
        key_dim, value_dim, value_heads = draw.size(17), draw.size(17), key_heads * repeats
        op = cls(key_heads, value_heads, key_dim, value_dim, scale=draw.choice(key_dim**-0.5, 1.0), eps=draw.choice(1e-6, 1e-2))
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        projected = draw.normal(batch, seq, channels + value_heads * value_dim + 2 * value_heads)
        arrays = (
            projected,
            draw.normal(channels, 1, taps),
            draw.uniform(-3.0, 1.0, value_heads),
            draw.normal(value_heads),
            draw.uniform(0.5, 1.5, value_dim),
            draw.normal(batch, channels, taps - 1) * draw.choice(1.0, 0.0),
            draw.uniform(-1.0, 1.0, batch, value_heads, key_dim, value_dim) * draw.choice(1.0, 0.0),
        )
        return Case(op, arrays, (None, None, None, None, None, None, f32))
