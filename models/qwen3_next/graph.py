"""Qwen3-Next, as the Qwen3-Next specification defines it: three Gated DeltaNet layers to one of gated attention, each
followed by experts (or, where the config says so, a dense SwiGLU).

    x = x + mixer(norm(x));  x = x + feed_forward(norm(x))
"""

from collections.abc import Callable, Collection

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.types import DType
from deltaloom.models.config import ModelConfig
from deltaloom.models.decoder import LayerForm, decoder, layer_bodies, layer_forms
from deltaloom.models.families import LINEAR
from deltaloom.models.layers import (
    BATCH,
    Stored,
    cached_attention,
    inside,
    layer_input,
    linear,
    matrix,
    regroup_rows,
    rotary_inputs,
    routed_experts,
    swiglu_mlp,
    valid_input,
    zero_centred_norm,
)
from deltaloom.ops.precision import wide_dtype

Projections = Callable[[GraphBuilder, ModelConfig, Stored], tuple[Value, Value]]
"""Gives the DeltaNet's input matrices with rows ``[q | k | v | z]`` and ``[b | a]`` from what the checkpoint stores."""


def model(config: ModelConfig, dtype: DType, names: Collection[str] | None) -> Graph:
    """The main model: embed -> layers -> norm -> head. ``names``: see ``deltaloom.models.build.build_graph``."""
    bodies = layer_bodies(config, layer_forms(config, names), dtype, layer)
    return decoder(config, bodies, dtype, zero_centred_norm)


def layer(config: ModelConfig, form: LayerForm, dtype: DType, name: str, *, projections: Projections | None = None) -> Graph:
    """One layer's body: residual stream ``x`` [b, s, H] in, ``out`` [b, s, H] out (specification, section 1). ``projections``:
    where the DeltaNet's input matrices come from, ``in_projections`` if None."""
    g = GraphBuilder(name, dtype=dtype)
    x = layer_input(g, config)
    h = zero_centred_norm(g, config, x, "input_layernorm")
    if form.mixer == LINEAR:
        valid = valid_input(g)
        with inside(g, form.stored, "linear_attn") as stored:
            mixed = gated_delta_net(g, config, stored, h, valid, projections or in_projections)
    else:
        cos, sin = rotary_inputs(g, config)
        valid = valid_input(g)
        with inside(g, form.stored, "self_attn") as stored:
            mixed = gated_attention(g, config, stored, h, cos, sin, valid)
    x = g.add(x, mixed, name="mixed")
    h = zero_centred_norm(g, config, x, "post_attention_layernorm")
    with inside(g, form.stored, "mlp") as stored:
        y = sparse_mlp(g, config, stored, h) if form.moe else swiglu_mlp(g, stored, h, config.intermediate_size)
    g.output("out", g.add(x, y, name="out"))
    return g.build()


def gated_delta_net(
    g: GraphBuilder, config: ModelConfig, stored: Stored, x: Value, valid: Value, projections: Projections
) -> Value:
    """The linear mixer (specification, section 5), x [b, s, H] -> [b, s, H]. Per sequence it keeps ``conv``, the last
    K - 1 columns before the convolution, and ``delta``, one matrix [dk, dv] a value head in float32 (float64 for a
    float64 model)."""
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    dk, dv, taps = config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim
    key_width, value_width = key_heads * dk, value_heads * dv
    channels = 2 * key_width + value_width
    conv = g.state("conv", g.dtype[BATCH, channels, taps - 1])
    delta = g.state("delta", wide_dtype(g.dtype)[BATCH, value_heads, dk, dv])

    x = g.mask_padding(x, valid, name="masked")
    qkvz_weight, ba_weight = projections(g, config, stored)
    qkv, z = g.split(g.linear(x, qkvz_weight, name="qkvz"), sizes=(channels, value_width), name="qkv_z")
    b, a = g.split(g.linear(x, ba_weight, name="ba"), sizes=(value_heads, value_heads), name="b_a")

    conv_weight = g.param("conv1d.weight", [channels, 1, taps])
    qkv, new_conv = g.causal_conv1d(qkv, conv_weight, conv, activation="silu", name="conv1d")
    q, k, v = g.split(qkv, sizes=(key_width, key_width, value_width), name="q_k_v")
    q = g.l2_norm(g.unflatten(q, sizes=(key_heads, dk), name="q_heads"), name="q")
    k = g.l2_norm(g.unflatten(k, sizes=(key_heads, dk), name="k_heads"), name="k")
    v = g.unflatten(v, sizes=(value_heads, dv), name="v")
    z = g.unflatten(z, sizes=(value_heads, dv), name="z")

    a_log, dt_bias = g.param("A_log", [value_heads]), g.param("dt_bias", [value_heads])
    beta, log_decay = g.delta_gates(b, a, a_log, dt_bias, name="gates")
    out, new_delta = g.gated_delta_rule(q, k, v, log_decay, beta, delta, scale=dk**-0.5, name="delta_rule")
    g.update(conv=new_conv, delta=new_delta)
    out = g.gated_rms_norm(out, z, g.param("norm.weight", [dv]), eps=config.rms_norm_eps, name="norm")
    return linear(g, stored, g.flatten(out, axes=2, name="heads"), "out_proj", config.hidden_size)


def in_projections(g: GraphBuilder, config: ModelConfig, stored: Stored) -> tuple[Value, Value]:
    """The DeltaNet's input matrices with rows ``[q | k | v | z]`` and ``[b | a]``. They are stored in one group a key
    head, each with the rows of that head and of its value heads (specification, section 5.1)."""
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    ratio = value_heads // key_heads
    dk, dv = config.linear_key_head_dim, ratio * config.linear_value_head_dim
    qkvz = matrix(g, stored, "in_proj_qkvz", key_heads * 2 * (dk + dv), config.hidden_size)
    ba = matrix(g, stored, "in_proj_ba", 2 * value_heads, config.hidden_size)
    return (
        regroup_rows(g, qkvz, key_heads, (dk, dk, dv, dv), "in_proj_qkvz"),
        regroup_rows(g, ba, key_heads, (ratio, ratio), "in_proj_ba"),
    )


def gated_attention(g: GraphBuilder, config: ModelConfig, stored: Stored, x: Value, cos: Value, sin: Value, valid: Value) -> Value:
    """The attention mixer (specification, section 6), x [b, s, H] -> [b, s, H]: grouped heads, q and k normed before
    they are rotated, an output gate of the size of q. The caches hold normed, rotated keys and plain values."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query_width, kv_width = heads * size, kv_heads * size
    q, gate = g.split(query_and_gate(g, config, stored, x), sizes=(query_width, query_width), name="q_gate")
    k = linear(g, stored, x, "k_proj", kv_width, bias=config.attention_bias)
    v = linear(g, stored, x, "v_proj", kv_width, bias=config.attention_bias)
    q = zero_centred_norm(g, config, g.unflatten(q, sizes=(heads, size), name="q_heads"), "q_norm")
    k = zero_centred_norm(g, config, g.unflatten(k, sizes=(kv_heads, size), name="k_heads"), "k_norm")
    v = g.unflatten(v, sizes=(kv_heads, size), name="v")
    out = cached_attention(g, config, q, k, v, cos, sin, valid)
    out = g.sigmoid_gate(out, gate, name="gated")
    return linear(g, stored, out, "o_proj", config.hidden_size, bias=config.attention_bias)


def query_and_gate(g: GraphBuilder, config: ModelConfig, stored: Stored, x: Value) -> Value:
    """All heads' queries, then all their gates: [b, s, 2 * nq * D]. ``q_proj`` is stored head by head, each with its
    query rows before its gate rows; so is its bias."""
    heads, size = config.num_attention_heads, config.head_dim
    weight = matrix(g, stored, "q_proj", heads * 2 * size, config.hidden_size)
    operands = [regroup_rows(g, weight, heads, (size, size), "q_proj")]
    if config.attention_bias:
        bias = g.param("q_proj.bias", [heads * 2 * size])
        operands.append(regroup_rows(g, bias, heads, (size, size), "q_proj.bias"))
    y: Value = g.linear(x, *operands, name="q_proj")
    return y


def sparse_mlp(g: GraphBuilder, config: ModelConfig, stored: Stored, x: Value) -> Value:
    """The routed experts plus the shared expert, which a sigmoid scales for each token (specification, section 8)."""
    routed = routed_experts(g, config, stored, x)
    with inside(g, stored, "shared_expert") as shared_stored:
        shared = swiglu_mlp(g, shared_stored, x, config.shared_expert_intermediate_size)
    gate = linear(g, stored, x, "shared_expert_gate", 1)
    y: Value = g.add(routed, g.sigmoid_gate(shared, gate, name="shared"), name="mixture")
    return y
