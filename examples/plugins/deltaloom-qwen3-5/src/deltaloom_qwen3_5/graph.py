"""Qwen3.5's text model: the layers of Qwen3-Next with a dense SwiGLU, and each input of the DeltaNet in a matrix of its own."""

from collections.abc import Collection

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.types import DType
from deltaloom.models.config import ModelConfig
from deltaloom.models.decoder import LayerForm, decoder, layer_bodies, layer_forms
from deltaloom.models.layers import Stored, matrix, zero_centred_norm
from deltaloom.models.qwen3_next.graph import layer as next_layer


def model(config: ModelConfig, dtype: DType, names: Collection[str] | None) -> Graph:
    """The model: embed -> layers -> norm -> head. ``names``: see ``deltaloom.models.build.build_graph``."""
    bodies = layer_bodies(config, layer_forms(config, names), dtype, layer)
    return decoder(config, bodies, dtype, zero_centred_norm)


def layer(config: ModelConfig, form: LayerForm, dtype: DType, name: str) -> Graph:
    """One layer's body: residual stream ``x`` [b, s, H] in, ``out`` [b, s, H] out."""
    return next_layer(config, form, dtype, name, projections=in_projections)


def in_projections(g: GraphBuilder, config: ModelConfig, stored: Stored) -> tuple[Value, Value]:
    """The DeltaNet's input matrices with rows ``[q | k | v | z]`` and ``[b | a]``, stored as ``in_proj_qkv``, ``in_proj_z``,
    ``in_proj_b`` and ``in_proj_a``, all heads of each together."""
    hidden, value_heads = config.hidden_size, config.linear_num_value_heads
    values = value_heads * config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * config.linear_key_head_dim + values
    rows = {"qkv": channels, "z": values, "b": value_heads, "a": value_heads}
    qkv, z, b, a = (matrix(g, stored, f"in_proj_{part}", count, hidden) for part, count in rows.items())
    return g.concat(qkv, z, axis=0, name="in_proj_qkvz"), g.concat(b, a, axis=0, name="in_proj_ba")
