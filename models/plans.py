"""How models are divided over a mesh: what the families' plans share, and which meshes a model's config allows.

Heads stay together: what a mixer needs follows from one parameter of it, because the heads go through all of its ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deltaloom.graph.errors import ConfigError
from deltaloom.models.config import ModelConfig
from deltaloom.models.families import LINEAR
from deltaloom.passes.shard.partition import Shard
from deltaloom.passes.shard.plan import Divide, Mesh, Plan, check_mesh

DECODER: Plan = (
    Divide("model.embed_tokens.weight", "h", needed=False),
    Divide("model.embed_tokens.weight", "o", needed=False),
    Divide("lm_head.weight", "o", needed=False),
    Divide("self_attn.o_proj.weight", "i"),
    Divide("mlp.down_proj.weight", "i"),
)
EXPERT_WEIGHTS: Plan = (Divide("mlp.experts.*down_proj*", "i"),)
"""Parts of families' plans. Names are relative to the layer. An embedding that is also the head is divided both ways, by the op
that reads it."""


@dataclass(frozen=True)
class Legality:
    """What a mesh means for a model: ``refusals`` say why it cannot be, ``notes`` what is not divided and why."""

    refusals: tuple[str, ...]
    notes: tuple[str, ...] = ()


def shard_pass(config: ModelConfig, mesh: Mesh) -> Shard:
    """The pass that divides a model's graphs over ``mesh``. Raises ``ConfigError`` with every reason against it."""
    found = legal(config, mesh)
    if found.refusals:
        raise ConfigError(f"the mesh {_show(mesh)} does not fit this model: {'; '.join(found.refusals)}")
    return Shard(tuple(check_mesh(mesh).items()), config.family.plan)


def legal(config: ModelConfig, mesh: Mesh) -> Legality:
    """Whether ``mesh`` fits a model, from its config alone. Raises ``ConfigError`` for axes that do not exist."""
    axes = check_mesh(mesh)
    refusals = [_OTHER_AXES[axis] for axis in axes if axis in _OTHER_AXES]
    notes: list[str] = []
    if (tp := axes.get("tp", 1)) > 1:
        refusals += [] if config.family.plan else [f"the family '{config.model_type}' does not say what of it can be divided"]
        refusals += [*_heads(config, tp), *_widths(config, tp)]
        refusals += [] if refusals else _blocks(config, tp)
        notes += [] if refusals else _notes(config, tp)
    return Legality(tuple(refusals), tuple(notes))


_OTHER_AXES = {
    "ep": "experts cannot be divided over ep, because the router's ids count all of them and no op sends tokens to their "
    "expert's rank yet; divide every expert over tp",
    "pp": "layers cannot be divided over pp yet; use tp",
    "dp": "batches cannot be divided over dp inside one graph; start one process for each part of the batch",
}


def _heads(config: ModelConfig, tp: int) -> Iterator[str]:
    """Refusals for heads. Query (or value) heads are divided; the heads that they share may be more or fewer than ranks."""
    kinds = []
    if any(kind != LINEAR for kind in config.layer_types):
        kinds.append(("query heads", config.num_attention_heads, "KV heads", config.num_key_value_heads))
    if LINEAR in config.layer_types:
        kinds.append(("value heads", config.linear_num_value_heads, "key heads", config.linear_num_key_heads))
    for many, count, few, shared in kinds:
        if count % tp:
            yield f"{count} {many} cannot be divided over tp = {tp}"
        elif shared % tp and tp % shared:
            yield f"{shared} {few} can be neither divided over tp = {tp} nor given to equal groups of its ranks"


def _widths(config: ModelConfig, tp: int) -> Iterator[str]:
    """Refusals for inner widths of feed-forward blocks."""
    for name, width in _inner_widths(config).items():
        if width % tp:
            yield f"{name} = {width} cannot be divided over tp = {tp}"


def _blocks(config: ModelConfig, tp: int) -> Iterator[str]:
    """Refusals for block-quantised matrices, which can be cut at the borders of their blocks only."""
    if config.quantization is None:
        return
    rows, columns = config.quantization.block
    seen: set[str] = set()
    for module, sizes in _quantised_modules(config, tp).items():
        kind = module.partition(".layers.")[2].partition(".")[2]
        inside = [size for size in sizes if size % rows or size % columns]
        if inside and kind not in seen and not config.quantization.keeps(module):
            seen.add(kind)
            yield f"{module}, in blocks of {rows}x{columns}, would be cut into runs of {inside[0]} under tp = {tp}, inside a block"


def _quantised_modules(config: ModelConfig, tp: int) -> dict[str, tuple[int, ...]]:
    """The sizes of the runs into which the matrices of each kind of layer are cut, under the module's name in one layer."""
    found: dict[str, tuple[int, ...]] = {}
    size, groups = config.head_dim, min(tp, config.num_key_value_heads)
    for layer, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{layer}."
        if kind == LINEAR:
            keys, values = config.linear_num_key_heads, config.linear_num_value_heads
            ratio = values // max(keys, tp)
            dk, dv = config.linear_key_head_dim, ratio * config.linear_value_head_dim
            found[prefix + "linear_attn.in_proj_qkvz"] = (dk, dv)
            found[prefix + "linear_attn.out_proj"] = (values // tp * config.linear_value_head_dim,)
        else:
            found[prefix + "self_attn.q_proj"] = found[prefix + "self_attn.o_proj"] = (config.num_attention_heads // tp * size,)
            found[prefix + "self_attn.k_proj"] = (config.num_key_value_heads // groups * size,)
        if config.is_moe_layer(layer):
            found[prefix + "mlp.experts.0.down_proj"] = (config.moe_intermediate_size // tp,)
            if config.shared_expert_intermediate_size:
                found[prefix + "mlp.shared_expert.down_proj"] = (config.shared_expert_intermediate_size // tp,)
        else:
            found[prefix + "mlp.down_proj"] = (config.intermediate_size // tp,)
    return found


def _inner_widths(config: ModelConfig) -> dict[str, int]:
    found = {}
    layers = range(config.num_hidden_layers)
    if not all(config.is_moe_layer(layer) for layer in layers):
        found["intermediate_size"] = config.intermediate_size
    if any(config.is_moe_layer(layer) for layer in layers):
        found["moe_intermediate_size"] = config.moe_intermediate_size
        if config.shared_expert_intermediate_size:
            found["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
    return found


def _notes(config: ModelConfig, tp: int) -> Iterator[str]:
    attention = any(kind != LINEAR for kind in config.layer_types)
    if attention and config.num_key_value_heads < tp:
        copies = tp // config.num_key_value_heads
        yield f"each of the {config.num_key_value_heads} KV heads is kept by {copies} ranks, so the cache of a rank has one head"
    if LINEAR in config.layer_types and config.linear_num_key_heads < tp:
        copies = tp // config.linear_num_key_heads
        yield f"each of the {config.linear_num_key_heads} key heads of the delta rule is computed by {copies} ranks"
    if config.vocab_size % tp:
        yield f"the output head stays whole on every rank, because {config.vocab_size} tokens cannot be divided over tp = {tp}"
    if config.hidden_size % tp:
        yield f"the embedding stays whole on every rank, because {config.hidden_size} columns cannot be divided over tp = {tp}"


def _show(mesh: Mesh) -> str:
    return "{" + ", ".join(f"{axis}: {ranks}" for axis, ranks in mesh.items()) + "}"
