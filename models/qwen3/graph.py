"""Qwen3 (dense): attention and a SwiGLU in every layer, plain norms (Qwen3-Next specification, section 16)."""

from collections.abc import Collection

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.types import DType
from deltaloom.models.config import ModelConfig
from deltaloom.models.decoder import LayerForm, decoder, layer_bodies, layer_forms
from deltaloom.models.layers import (
    Stored,
    cached_attention,
    inside,
    layer_input,
    linear,
    plain_norm,
    rotary_inputs,
    routed_experts,
    swiglu_mlp,
    valid_input,
)


def model(config: ModelConfig, dtype: DType, names: Collection[str] | None) -> Graph:
    """The model: embed -> layers -> norm -> head. ``names``: see ``deltaloom.models.build.build_graph``."""
    bodies = layer_bodies(config, layer_forms(config, names), dtype, layer)
    return decoder(config, bodies, dtype, plain_norm)


def layer(config: ModelConfig, form: LayerForm, dtype: DType, name: str) -> Graph:
    """One layer's body: ``x = x + attention(norm(x)); out = x + feed_forward(norm(x))``, both [b, s, H]. What is fed
    forward to is a SwiGLU, or, in Qwen3-MoE, whose body this is too, experts without a shared one."""
    g = GraphBuilder(name, dtype=dtype)
    x = layer_input(g, config)
    cos, sin = rotary_inputs(g, config)
    valid = valid_input(g)
    h = plain_norm(g, config, x, "input_layernorm")
    with inside(g, form.stored, "self_attn") as stored:
        mixed = attention(g, config, stored, h, cos, sin, valid)
    x = g.add(x, mixed, name="mixed")
    h = plain_norm(g, config, x, "post_attention_layernorm")
    with inside(g, form.stored, "mlp") as stored:
        y = routed_experts(g, config, stored, h) if form.moe else swiglu_mlp(g, stored, h, config.intermediate_size)
    g.output("out", g.add(x, y, name="out"))
    return g.build()


def attention(g: GraphBuilder, config: ModelConfig, stored: Stored, x: Value, cos: Value, sin: Value, valid: Value) -> Value:
    """Grouped-query attention, x [b, s, H] -> [b, s, H]; q and k are normed over the head before they are rotated."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = linear(g, stored, x, "q_proj", heads * size, bias=config.attention_bias)
    k = linear(g, stored, x, "k_proj", kv_heads * size, bias=config.attention_bias)
    v = linear(g, stored, x, "v_proj", kv_heads * size, bias=config.attention_bias)
    q = plain_norm(g, config, g.unflatten(q, sizes=(heads, size), name="q_heads"), "q_norm")
    k = plain_norm(g, config, g.unflatten(k, sizes=(kv_heads, size), name="k_heads"), "k_norm")
    v = g.unflatten(v, sizes=(kv_heads, size), name="v")
    out = cached_attention(g, config, q, k, v, cos, sin, valid)
    return linear(g, stored, out, "o_proj", config.hidden_size, bias=config.attention_bias)
