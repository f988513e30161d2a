"""What stands around attention: heads cut, normed and rotated before it, the output gate after it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.op import Array, Draw
from deltaloom.graph.types import f32
from deltaloom.passes.rewrite import pattern as p
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Example, Rule


def _heads(g: Any, q: Any, k: Any, v: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
    """q and k cut into heads, normed and rotated; v cut into heads."""
    norm = {"eps": p.Any("eps"), "zero_centred": p.Any("zero_centred")}
    q = g.rms_norm(g.unflatten(q, sizes=(p.Any("heads"), p.Any("width"))), q_weight, **norm)
    k = g.rms_norm(g.unflatten(k, sizes=(p.Any("kv_heads"), p.Any("width"))), k_weight, **norm)
    v = g.unflatten(v, sizes=(p.Any("kv_heads"), p.Any("width")))
    return g.rope(q, cos, sin), g.rope(k, cos, sin), v


def _qkv(draw: Draw, *, gated: bool) -> Example:
    batch, seq, kv_heads, repeats = draw.integer(1, 3), draw.size(), draw.integer(1, 3), draw.integer(2, 3)
    half, lifted = draw.size(5), draw.choice(False, True)
    width = 2 * half + draw.choice(0, 1, 6)
    queries, keys = kv_heads * repeats * width, kv_heads * width
    angles = draw.uniform(0.0, 6.3, batch, seq, half)
    weights = draw.uniform(0.5, 1.5, width), draw.uniform(0.5, 1.5, width)
    projected = draw.normal(batch, seq, (1 + gated) * queries + 2 * keys)
    attributes = {
        "queries": queries,
        "keys": keys,
        "heads": kv_heads * repeats,
        "kv_heads": kv_heads,
        "width": width,
        "eps": draw.choice(1e-6, 1e-2),
        "zero_centred": lifted,
    }
    weight = f32 if lifted else None
    return Example((projected, *weights, np.cos(angles), np.sin(angles)), attributes, (None, weight, weight, None, None))


class FuseQKVNormRope(Rule):
    """From the split of the packed projection [q | k | v] to heads that are ready for attention."""

    name: ClassVar[str] = "qkv_norm_rope"
    root: ClassVar[str] = "rope"

    def pattern(self, g: Any, projected: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
        q, k, v = g.split(projected, sizes=(p.Any("queries"), p.Any("keys"), p.Any("keys")))
        return _heads(g, q, k, v, q_weight, k_weight, cos, sin)

    def rewrite(self, g: Any, m: Match) -> Any:
        attributes = {name: m[name] for name in ("heads", "kv_heads", "eps", "zero_centred")}
        return g.qkv_norm_rope(m.projected, m.q_weight, m.k_weight, m.cos, m.sin, **attributes)

    def examples(self, draw: Draw) -> Example:
        return _qkv(draw, gated=False)


class FuseGatedQKVNormRope(Rule):
    """The same with an output gate of the size of q behind q: [q | gate | k | v]."""

    name: ClassVar[str] = "gated_qkv_norm_rope"
    root: ClassVar[str] = "rope"

    def pattern(self, g: Any, projected: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
        sizes = (p.Any("queries"), p.Any("queries"), p.Any("keys"), p.Any("keys"))
        q, gate, k, v = g.split(projected, sizes=sizes)
        return *_heads(g, q, k, v, q_weight, k_weight, cos, sin), gate

    def rewrite(self, g: Any, m: Match) -> Any:
        attributes = {name: m[name] for name in ("heads", "kv_heads", "eps", "zero_centred")}
        return g.qkv_norm_rope(m.projected, m.q_weight, m.k_weight, m.cos, m.sin, gated=True, **attributes)

    def examples(self, draw: Draw) -> Example:
        return _qkv(draw, gated=True)


class FuseGatedAttention(Rule):
    """Attention, whose heads are flattened and scaled by an output gate."""

    name: ClassVar[str] = "gated_attention"
    root: ClassVar[str] = "attention"

    def pattern(self, g: Any, q: Any, k: Any, v: Any, gate: Any, key_cache: Any, value_cache: Any, valid: Any = None) -> Any:
        out, new_key, new_value = g.attention(q, k, v, key_cache, value_cache, valid, scale=p.Any("scale"))
        return g.sigmoid_gate(g.flatten(out), gate), new_key, new_value

    def check(self, m: Match) -> str | None:
        whole = m.outputs[0].type
        return None if m.gate.type == whole else f"the gate {m.gate}: {m.gate.type} is not as large as the heads, {whole}"

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.gated_attention(m.q, m.k, m.v, m.gate, m.key_cache, m.value_cache, m.valid, scale=m["scale"])

    def examples(self, draw: Draw) -> Example:
        batch, past, seq = draw.integer(1, 3), draw.choice(0, 1, 7), draw.choice(1, 2, 5)
        heads, repeats, width = draw.integer(1, 3), draw.integer(1, 3), draw.size(9)
        arrays: list[Array] = [
            draw.normal(batch, seq, heads * repeats, width),
            draw.normal(batch, seq, heads, width),
            draw.normal(batch, seq, heads, width),
            draw.normal(batch, seq, heads * repeats * width),
            draw.normal(batch, heads, past, width),
            draw.normal(batch, heads, past, width),
        ]
        if draw.choice(False, True):
            arrays.append(np.arange(past + seq) >= draw.integers(0, past, batch)[:, None])
        return Example(tuple(arrays), {"scale": width**-0.5})
