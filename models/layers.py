"""Parts that the families' layer graphs share: stored matrices, norms, feed-forward blocks, attention over a cache.

Shapes: ``b`` batch, ``s`` seq (tokens of this run), ``past`` (tokens before it), ``H`` hidden size. Names of parameters
are the checkpoint's, relative to the builder's scope.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import deltaloom.ops  # noqa: F401  (puts the built-in ops into the registry)
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import Dim, symbol
from deltaloom.graph.ir import Value
from deltaloom.graph.types import bool_, i64
from deltaloom.models.config import ModelConfig
from deltaloom.models.quantization import QuantizationConfig
from deltaloom.models.rope_config import inverse_frequencies, magnitude

BATCH = symbol("batch")
SEQ = symbol("seq")
PAST = symbol("past", low=0)


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores the matrices below some module: which are block FP8, and whether experts are stacked."""

    quantization: QuantizationConfig | None = None
    stacked_experts: bool = False

    def quantises(self, module: str) -> bool:
        """Whether ``module.weight`` is block FP8."""
        return self.quantization is not None and not self.quantization.keeps(module)

    def within(self, module: str) -> "Stored":
        """The same for what lies below ``module``, where names are relative to it."""
        if self.quantization is None:
            return self
        if self.quantization.keeps(module):
            return replace(self, quantization=None)
        start = module + "."
        kept = {name.removeprefix(start) for name in self.quantization.modules_to_not_convert if name.startswith(start)}
        return replace(self, quantization=replace(self.quantization, modules_to_not_convert=tuple(sorted(kept))))


@contextmanager
def inside(g: GraphBuilder, stored: Stored, module: str) -> Iterator[Stored]:
    """Open the scope ``module``; gives how the matrices below it are stored."""
    with g.scope(module):
        yield stored.within(module)


def token_inputs(g: GraphBuilder, ids: str) -> tuple[Value, Value, Value]:
    """Declare the token ids (called ``ids``) and positions i64 [b, s], and ``valid`` bool [b, past + s]."""
    return (
        g.input(ids, i64[BATCH, SEQ]),
        g.input("positions", i64[BATCH, SEQ]),
        valid_input(g),
    )


def valid_input(g: GraphBuilder) -> Value:
    """Declare ``valid`` bool [b, past + s]: False where a column of this run or of one before it is padding."""
    return g.input("valid", bool_[BATCH, PAST + SEQ])


def layer_input(g: GraphBuilder, config: ModelConfig) -> Value:
    """Declare a layer's residual stream ``x`` [b, s, H]."""
    return g.input("x", g.dtype[BATCH, SEQ, config.hidden_size])


def rotary_inputs(g: GraphBuilder, config: ModelConfig) -> tuple[Value, Value]:
    """Declare an attention layer's ``cos`` and ``sin`` [b, s, rotary_dim / 2]."""
    angles = g.dtype[BATCH, SEQ, config.rope.rotary_dim // 2]
    return g.input("cos", angles), g.input("sin", angles)


def matrix(g: GraphBuilder, stored: Stored, module: str, rows: int, columns: Dim) -> Value:
    """``module.weight`` [rows, columns] in the model's dtype; block FP8 is dequantised."""
    name = f"{module}.weight"
    if stored.quantization is None or not stored.quantises(module):
        return g.param(name, [rows, columns])
    packed = g.param(name, [rows, columns], stored.quantization.type)
    weight: Value = g.dequantize(packed, dtype=g.dtype.long_name, name=f"{module}.dequantized")
    return weight


def linear(g: GraphBuilder, stored: Stored, x: Value, module: str, rows: int, *, bias: bool = False) -> Value:
    """``x [..., i] -> [..., rows]`` by ``module.weight`` [rows, i], plus ``module.bias`` if ``bias``."""
    weight = matrix(g, stored, module, rows, x.type.shape[-1])
    offset = (g.param(f"{module}.bias", [rows]),) if bias else ()
    y: Value = g.linear(x, weight, *offset, name=module)
    return y


def regroup_rows(g: GraphBuilder, weight: Value, groups: int, sizes: tuple[int, ...], name: str) -> Value:
    """Rows stored as ``groups`` times ``[piece 0 | piece 1 | ...]`` (``sizes`` rows each) become all pieces 0, then all
    pieces 1, and so on. ``weight`` [groups * sum(sizes), ...] is a matrix or a bias."""
    rest = weight.type.static_shape()[1:]
    grouped = g.reshape(weight, shape=(groups, sum(sizes), *rest), name=f"{name}.grouped")
    pieces = g.split(grouped, sizes=sizes, axis=1, name=f"{name}.pieces")
    slabs = [g.reshape(piece, shape=(groups * size, *rest), name=f"{name}.slab") for piece, size in zip(pieces, sizes, strict=True)]
    flat: Value = g.concat(*slabs, axis=0, name=f"{name}.flat")
    return flat


def plain_norm(g: GraphBuilder, config: ModelConfig, x: Value, module: str) -> Value:
    """RMS norm over the last axis, times ``module.weight`` (specification, section 16)."""
    y: Value = g.rms_norm(x, g.param(f"{module}.weight", x.type.shape[-1:]), eps=config.rms_norm_eps, name=module)
    return y


def zero_centred_norm(g: GraphBuilder, config: ModelConfig, x: Value, module: str) -> Value:
    """RMS norm over the last axis, times ``1 + module.weight`` in float32 (specification, section 4: RMS1)."""
    weight = g.one_plus(g.param(f"{module}.weight", x.type.shape[-1:]), name=f"{module}.one_plus")
    y: Value = g.rms_norm(x, weight, eps=config.rms_norm_eps, zero_centred=True, name=module)
    return y


def swiglu_mlp(g: GraphBuilder, stored: Stored, x: Value, width: int) -> Value:
    """``down(silu(gate(x)) * up(x))`` with ``width`` inner channels; x [b, s, H]."""
    hidden = x.type.shape[-1]
    assert isinstance(hidden, int)
    gate = linear(g, stored, x, "gate_proj", width)
    up = linear(g, stored, x, "up_proj", width)
    return linear(g, stored, g.swiglu(gate, up), "down_proj", hidden)


def routed_experts(g: GraphBuilder, config: ModelConfig, stored: Stored, x: Value) -> Value:
    """Each token's best ``num_experts_per_tok`` experts, summed with the router's weights (specification, 8)."""
    logits = linear(g, stored, x, "gate", config.num_experts)
    weights, ids = g.router_topk(logits, k=config.num_experts_per_tok, normalize=config.norm_topk_prob, name="router")
    gate_up, down = expert_weights(g, config, stored)
    y: Value = g.moe_experts(x, weights, ids, gate_up, down, name="experts")
    return y


def expert_weights(g: GraphBuilder, config: ModelConfig, stored: Stored) -> tuple[Value, Value]:
    """``gate_up`` [E, 2I, H], gate rows first, and ``down`` [E, H, I], from either layout (specification, 3.2)."""
    experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    if stored.stacked_experts:
        gate_up = g.param("experts.gate_up_proj", [experts, 2 * width, hidden])
        return gate_up, g.param("experts.down_proj", [experts, hidden, width])
    gate_ups, downs = [], []
    for expert in (f"experts.{number}" for number in range(experts)):
        gate = matrix(g, stored, f"{expert}.gate_proj", width, hidden)
        up = matrix(g, stored, f"{expert}.up_proj", width, hidden)
        gate_ups.append(g.concat(gate, up, axis=0, name=f"{expert}.gate_up"))
        downs.append(matrix(g, stored, f"{expert}.down_proj", hidden, width))
    return g.stack(*gate_ups, name="experts.gate_up"), g.stack(*downs, name="experts.down")


def rotary(g: GraphBuilder, config: ModelConfig, positions: Value) -> tuple[Value, Value]:
    """cos and sin [b, s, rotary_dim / 2] of the positions' angles in the model's dtype (specification, section 7)."""
    frequencies = tuple(float(frequency) for frequency in inverse_frequencies(config.rope))
    cos, sin = g.rotary_embedding(
        positions, inv_freq=frequencies, magnitude=magnitude(config.rope), dtype=g.dtype.long_name, name="rotary"
    )
    return cos, sin


def cached_attention(
    g: GraphBuilder, config: ModelConfig, q: Value, k: Value, v: Value, cos: Value, sin: Value, valid: Value
) -> Value:
    """Rotate q [b, s, nq, D] and k [b, s, nkv, D], append k and v to the caches, attend; gives [b, s, nq * D]."""
    heads, size = config.num_key_value_heads, config.head_dim
    q, k = g.rope(q, cos, sin, name="q"), g.rope(k, cos, sin, name="k")
    key = g.state("key", g.dtype[BATCH, heads, PAST, size], append_axis=2)
    value = g.state("value", g.dtype[BATCH, heads, PAST, size], append_axis=2)
    out, new_key, new_value = g.attention(q, k, v, key, value, valid, scale=size**-0.5, name="attention")
    g.update(key=new_key, value=new_value)
    flat: Value = g.flatten(out, axes=2, name="heads")
    return flat


def output_head(g: GraphBuilder, config: ModelConfig, stored: Stored) -> Value:
    """The matrix [V, H] that scores hidden states: ``lm_head.weight``, or the embedding if it is tied."""
    if config.tie_word_embeddings:
        return g.param("model.embed_tokens.weight", [config.vocab_size, config.hidden_size])
    return matrix(g, stored, "lm_head", config.vocab_size, config.hidden_size)
