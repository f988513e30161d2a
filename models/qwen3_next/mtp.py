"""The multi-token-prediction head of Qwen3-Next: drafts the token after next (specification, section 9)."""

from collections.abc import Collection

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import DType
from deltaloom.models.config import ModelConfig
from deltaloom.models.decoder import call_layer, layer_form
from deltaloom.models.families import FULL
from deltaloom.models.layers import BATCH, SEQ, Stored, linear, output_head, rotary, token_inputs, zero_centred_norm
from deltaloom.models.qwen3_next.graph import layer


def mtp_head(config: ModelConfig, dtype: DType, names: Collection[str] | None) -> Graph | None:
    """The head, or None if there is none: ``names`` has no ``mtp.*``, or, without names, the config announces none.

    Inputs: ``next_ids`` [b, s], the token after each position; ``hidden`` [b, s, H], the main model's ``final_norm``
    there (for a further draft, this head's own ``hidden``); ``positions`` [b, s] of the hidden states; ``valid``.
    Outputs: ``logits`` [b, s, V] and ``hidden`` [b, s, H] after ``mtp.norm``, both also of the last position only
    (``last_...`` [b, 1, ...]); ``fc_out`` and ``layer_out`` [b, s, H] before and after the layer.
    """
    if not has_mtp_head(config, names):
        return None
    form = layer_form(config, "mtp.layers.0", FULL, moe=_is_moe(config, names), names=names)
    body = layer(config, form, dtype, f"mtp_{form.name}")
    stored = Stored(config.quantization)

    g = GraphBuilder(f"{config.model_type}_mtp", dtype=dtype)
    next_ids, positions, valid = token_inputs(g, "next_ids")
    hidden = g.input("hidden", dtype[BATCH, SEQ, config.hidden_size])
    cos, sin = rotary(g, config, positions)

    embeddings = g.param("model.embed_tokens.weight", [config.vocab_size, config.hidden_size])
    e = zero_centred_norm(g, config, g.embedding(next_ids, embeddings, name="embed"), "mtp.pre_fc_norm_embedding")
    h = zero_centred_norm(g, config, hidden, "mtp.pre_fc_norm_hidden")
    fc_out = linear(g, stored, g.concat(e, h, axis=-1, name="mtp.embedding_hidden"), "mtp.fc", config.hidden_size)
    layer_out = call_layer(g, body, fc_out, {"cos": cos, "sin": sin, "valid": valid}, "mtp.layers.0.")

    head = output_head(g, config, stored)
    final = zero_centred_norm(g, config, layer_out, "mtp.norm")
    last = zero_centred_norm(g, config, g.take_last(layer_out, name="last"), "mtp.norm")
    g.output("logits", g.linear(final, head, name="logits"))
    g.output("hidden", final)
    g.output("last_logits", g.linear(last, head, name="last_logits"))
    g.output("last_hidden", last)
    g.output("fc_out", fc_out)
    g.output("layer_out", layer_out)
    return g.build()


def has_mtp_head(config: ModelConfig, names: Collection[str] | None) -> bool:
    """Whether the checkpoint has ``mtp.*`` tensors or, its names unknown, the config announces the head."""
    if names is None:
        return config.num_nextn_predict_layers > 0
    return any(name.startswith("mtp.") for name in names)


def _is_moe(config: ModelConfig, names: Collection[str] | None) -> bool:
    """As the names say; where they do not, the head's layer has experts if the model has any."""
    dense = names is not None and "mtp.layers.0.mlp.gate_proj.weight" in names
    return config.num_experts > 0 and not dense
