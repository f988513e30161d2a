"""The gated delta net between its projections."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.op import Draw
from deltaloom.graph.types import f32
from deltaloom.passes.rewrite import pattern as p
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Example, Rule


class FuseGatedDeltaNet(Rule):
    """From the split of the packed projection [q | k | v | z | b | a] to the flattened heads; both states pass through."""

    name: ClassVar[str] = "gated_delta_net"
    root: ClassVar[str] = "gated_delta_rule"

    def pattern(
        self, g: Any, projected: Any, conv_weight: Any, a_log: Any, dt_bias: Any, norm_weight: Any, conv: Any, delta: Any
    ) -> Any:
        gates = p.Any("value_heads")
        qkv, z, b, a = g.split(projected, sizes=(p.Any("channels"), p.Any("values"), gates, gates))
        qkv, new_conv = g.causal_conv1d(qkv, conv_weight, conv, activation="silu")
        q, k, v = g.split(qkv, sizes=(p.Any("keys"), p.Any("keys"), p.Any("values")))
        heads, value_heads = (p.Any("key_heads"), p.Any("key_dim")), (gates, p.Any("value_dim"))
        q = g.l2_norm(g.unflatten(q, sizes=heads), eps=p.Any("l2_eps"))
        k = g.l2_norm(g.unflatten(k, sizes=heads), eps=p.Any("l2_eps"))
        v, z = g.unflatten(v, sizes=value_heads), g.unflatten(z, sizes=value_heads)
        beta, log_decay = g.delta_gates(b, a, a_log, dt_bias)
        out, new_delta = g.gated_delta_rule(q, k, v, log_decay, beta, delta, scale=p.Any("scale"))
        return g.flatten(g.gated_rms_norm(out, z, norm_weight, eps=p.Any("eps"))), new_conv, new_delta

    def rewrite(self, g: Any, m: Match) -> Any:
        names = ("key_heads", "value_heads", "key_dim", "value_dim", "scale", "eps", "l2_eps")
        operands = (m.projected, m.conv_weight, m.a_log, m.dt_bias, m.norm_weight, m.conv, m.delta)
        return g.gated_delta_net(*operands, **{name: m[name] for name in names})

    def examples(self, draw: Draw) -> Example:
        batch, seq, taps, key_heads, repeats = (draw.integer(1, 3) for _ in range(5))
        key_dim, value_dim, value_heads = draw.size(9), draw.size(9), key_heads * repeats
        keys, values = key_heads * key_dim, value_heads * value_dim
        channels = 2 * keys + values
        arrays = (
            draw.normal(batch, seq, channels + values + 2 * value_heads),
            draw.normal(channels, 1, taps),
            draw.uniform(-3.0, 1.0, value_heads),
            draw.normal(value_heads),
            draw.uniform(0.5, 1.5, value_dim),
            draw.normal(batch, channels, taps - 1),
            draw.uniform(-1.0, 1.0, batch, value_heads, key_dim, value_dim),
        )
        sizes = {"channels": channels, "values": values, "keys": keys}
        heads = {"key_heads": key_heads, "value_heads": value_heads, "key_dim": key_dim, "value_dim": value_dim}
        numbers = {"scale": key_dim**-0.5, "eps": draw.choice(1e-6, 1e-2), "l2_eps": draw.choice(1e-6, 1e-2)}
        return Example(arrays, {**sizes, **heads, **numbers}, (*(None,) * 6, f32))
