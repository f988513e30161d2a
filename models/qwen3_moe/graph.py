"""Qwen3-MoE: Qwen3's attention, followed by experts without a shared one, or by a dense SwiGLU in the layers that the
config names (Qwen3-Next specification, section 16)."""

from collections.abc import Collection

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import DType
from deltaloom.models.config import ModelConfig
from deltaloom.models.decoder import LayerForm, decoder, layer_bodies, layer_forms
from deltaloom.models.layers import (
    inside,
    layer_input,
    plain_norm,
    rotary_inputs,
    routed_experts,
    swiglu_mlp,
    valid_input,
)
from deltaloom.models.qwen3.graph import attention


def model(config: ModelConfig, dtype: DType, names: Collection[str] | None) -> Graph:
    """The model: embed -> layers -> norm -> head. ``names``: see ``deltaloom.models.build.build_graph``."""
    bodies = layer_bodies(config, layer_forms(config, names), dtype, layer)
    return decoder(config, bodies, dtype, plain_norm)


def layer(config: ModelConfig, form: LayerForm, dtype: DType, name: str) -> Graph:
    """One layer's body: ``x = x + attention(norm(x)); out = x + feed_forward(norm(x))``, both [b, s, H]."""
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
