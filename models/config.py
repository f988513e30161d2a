"""config.json of the three families as one frozen record, read strictly (Qwen3-Next specification, sections 2, 16)."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path

from deltaloom.graph.errors import ConfigError, require
from deltaloom.models.config_overrides import canonical_names, merge_overrides
from deltaloom.models.families import FULL, LINEAR, Family, LayerKind, family_named, names, owners
from deltaloom.models.json_fields import Fields, as_path, describe, read_json_object
from deltaloom.models.quantization import QuantizationConfig, read_quantization, refused_method, unsupported
from deltaloom.models.rope_config import RopeConfig, read_rope

DTYPES = ("bfloat16", "float16", "float32", "float64")
MOST_LAYERS = 4096
MOST_EXPERTS = 2**18  # of all layers together: as many names are listed before a weight is read
LARGEST_HEAD = 2**16


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's shape. Sizes that a family lacks (experts of a dense model, linear heads of qwen3) are 0.

    Raises ConfigError when fields contradict one another.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of dense layers
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    layer_types: tuple[LayerKind, ...]
    attention_bias: bool
    attn_output_gate: bool
    tie_word_embeddings: bool
    dtype: str  # the stored element type; "bfloat16", as in all published files, when the config is silent
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int  # 0: no layer has experts
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    num_nextn_predict_layers: int  # MTP layers announced; whether mtp.* tensors exist, the checkpoint says
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    quantization: QuantizationConfig | None
    more: Mapping[str, object] = field(default_factory=dict, hash=False)  # what only this family has (see Family)

    @property
    def model_type(self) -> str:
        """The name of the family."""
        return self.family.model_type

    def __post_init__(self) -> None:
        _check_heads(self)
        _check_layers(self)
        _check_experts(self)
        for name, ids in (("bos", (self.bos_token_id,)), ("eos", self.eos_token_ids), ("pad", (self.pad_token_id,))):
            for token in ids:
                require(
                    token is None or token < self.vocab_size,
                    f"{name}_token_id {token} is outside the vocabulary of {self.vocab_size} rows; ids count from 0.",
                    ConfigError,
                )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer's feed-forward part has experts; if not, it is a SwiGLU of ``intermediate_size``."""
        return self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def read_config(
    source: str | os.PathLike[str] | Mapping[str, object],
    overrides: Mapping[str, object] | None = None,
    *,
    use: Mapping[str, str] | None = None,
) -> ModelConfig:
    """The ModelConfig of a checkpoint folder, a config.json or an object already read, in any published form.

    ``overrides`` are laid over the file's fields: objects merge, ``{"rope_parameters.factor": 4.0}`` reaches inside.
    ``use`` says whose model type is meant where plugins offer it too (``CompileConfig.use``).
    Raises ConfigError, one sentence with the file's name, for unknown, ill-typed or contradictory fields, and
    CheckpointError if the file is missing or unreadable.
    """
    if isinstance(source, Mapping):
        values, where = dict(source), "the model configuration"
    else:
        path = as_path(source)
        path = path / "config.json" if path.is_dir() else path
        values, where = read_json_object(path, ConfigError), str(path)
        _refuse_quantisation_beside(path, values)
    try:
        values = canonical_names(values)
        return _build(merge_overrides(values, overrides) if overrides else values, use)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _build(values: Mapping[str, object], use: Mapping[str, str] | None) -> ModelConfig:
    family = _family(values, use)
    _refuse_unknown(values, family)
    _refuse_other_readings(values, family)
    reader = family.function("reader")
    values = values if reader is None else reader(values)
    fields = Fields(values)

    def size(name: str, minimum: int = 1, maximum: int = 2**40) -> int:
        default = family.sizes.get(name)
        return fields.integer(name, default, minimum=minimum, maximum=maximum) if default is not None else 0

    layers = size("num_hidden_layers", maximum=MOST_LAYERS)
    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    head_dim = fields.optional_integer("head_dim", family.sizes["head_dim"]) or _derived_head_dim(hidden, heads)
    kv_is_null = "num_key_value_heads" in values and values["num_key_value_heads"] is None
    positions = size("max_position_embeddings")
    quantization = fields.mapping("quantization_config")
    return ModelConfig(
        family=family,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_is_null else size("num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=size("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, above=0.0, maximum=1.0),
        max_position_embeddings=positions,
        rope=read_rope(values, head_dim, positions, family.partial_rotary_factor, family.rope_ignored),
        layer_types=_layer_types(fields, family, layers),
        attention_bias=fields.boolean("attention_bias", False),
        attn_output_gate="attn_output_gate" in family.fixed,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        dtype=_dtype(fields),
        linear_num_key_heads=size("linear_num_key_heads"),
        linear_num_value_heads=size("linear_num_value_heads"),
        linear_key_head_dim=size("linear_key_head_dim"),
        linear_value_head_dim=size("linear_value_head_dim"),
        linear_conv_kernel_dim=size("linear_conv_kernel_dim"),
        num_experts=size("num_experts", minimum=0),
        num_experts_per_tok=size("num_experts_per_tok"),
        moe_intermediate_size=size("moe_intermediate_size"),
        shared_expert_intermediate_size=size("shared_expert_intermediate_size"),
        norm_topk_prob=fields.boolean("norm_topk_prob", family.norm_topk_prob),
        decoder_sparse_step=size("decoder_sparse_step") or 1,
        mlp_only_layers=fields.integers("mlp_only_layers") or (),
        num_nextn_predict_layers=size("num_nextn_predict_layers", minimum=0, maximum=1),
        bos_token_id=fields.optional_integer("bos_token_id", minimum=0),
        eos_token_ids=fields.integers("eos_token_id") or (),
        pad_token_id=fields.optional_integer("pad_token_id", minimum=0),
        quantization=None if quantization is None else read_quantization(quantization),
        more=_more(fields, family),
    )


def _more(fields: Fields, family: Family) -> Mapping[str, object]:
    """Sizes and extra fields that no other family has."""
    known = {one.name for one in fields_of(ModelConfig)} | {"full_attention_interval"}
    sizes: dict[str, object] = {
        name: fields.optional_integer(name) if default is None else fields.integer(name, default, minimum=1)
        for name, default in family.sizes.items()
        if name not in known
    }
    extra = {name: fields.values[name] for name in sorted(family.extra - known) if name in fields.values}
    return sizes | extra


def _family(values: Mapping[str, object], use: Mapping[str, str] | None) -> Family:
    if "text_config" in values:
        raise ConfigError(
            "the text model is wrapped in text_config, as in vision-language checkpoints, which are not "
            f"supported; expected a text model of type {', '.join(names())}."
        )
    if "model_type" not in values:
        raise ConfigError(f"there is no model_type; expected one of {', '.join(names())}.")
    model_type = values["model_type"]
    if not isinstance(model_type, str):
        raise ConfigError(f"model_type is {describe(model_type)}, which is unknown; known are {', '.join(names())}.")
    return family_named(model_type, use)


def _refuse_unknown(values: Mapping[str, object], family: Family) -> None:
    unknown = [name for name in values if not family.knows(name)]
    if not unknown:
        return
    name = unknown[0]
    others = f" (and {len(unknown) - 1} more: {', '.join(map(str, unknown[1:6]))})" if len(unknown) > 1 else ""
    others_have = owners(str(name))
    if others_have:
        hint = f"it belongs to {' and '.join(others_have)}"
    else:
        close = difflib.get_close_matches(str(name)[:200], family.names(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "remove it if the model does not depend on it"
    raise ConfigError(
        f"{name!r} is not a field of {family.model_type}{others}; {hint}".rstrip("?.") + ("?" if hint[-1] == "?" else ".")
    )


def _refuse_other_readings(values: Mapping[str, object], family: Family) -> None:
    for name, allowed in family.fixed.items():
        if name in values and not any(type(value) is type(values[name]) and value == values[name] for value in allowed):
            raise ConfigError(
                f"{name} is {describe(values[name])}; {family.model_type} is supported only with "
                f"{' or '.join(describe(value) for value in allowed)}."
            )


def _dtype(fields: Fields) -> str:
    dtype = "bfloat16" if fields.values.get("dtype") is None else fields.text("dtype", "")
    require(dtype in DTYPES, f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.", ConfigError)
    return dtype


def _derived_head_dim(hidden: int, heads: int) -> int:
    require(
        hidden % heads == 0,
        f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} and head_dim is absent; give head_dim.",
        ConfigError,
    )
    return hidden // heads


def _layer_types(fields: Fields, family: Family, layers: int) -> tuple[LayerKind, ...]:
    """``layer_types`` if given, else derived from ``full_attention_interval``; ConfigError if both differ."""
    given = fields.texts("layer_types")
    hybrid = "full_attention_interval" in family.extra
    if given is None:
        interval = fields.optional_integer("full_attention_interval") or 4 if hybrid else 1
        return tuple(FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(layers))
    kinds: list[LayerKind] = []
    for layer, kind in enumerate(given):
        if kind == FULL:
            kinds.append(FULL)
        elif kind == LINEAR and hybrid:
            kinds.append(LINEAR)
        else:
            allowed = f"{LINEAR!r} or {FULL!r}" if hybrid else repr(FULL)
            raise ConfigError(f"layer_types[{layer}] is {kind!r}; the layers of {family.model_type} are {allowed}.")
    if fields.values.get("full_attention_interval") is not None and len(kinds) == layers:
        interval = fields.integer("full_attention_interval", 4)
        for layer, found in enumerate(kinds):
            expected = FULL if (layer + 1) % interval == 0 else LINEAR
            require(
                found == expected,
                f"layer_types[{layer}] is {found!r}, but full_attention_interval {interval} makes it "
                f"{expected!r}; remove one of the two fields.",
                ConfigError,
            )
    return tuple(kinds)


def _check_heads(config: ModelConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    require(
        config.head_dim <= LARGEST_HEAD,
        f"head_dim is {config.head_dim}; expected at most {LARGEST_HEAD}.",
        ConfigError,
    )
    require(
        heads % kv_heads == 0,
        f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
        "each key/value head serves the same number of query heads.",
        ConfigError,
    )
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    require(
        keys == 0 or values % keys == 0,
        f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}; "
        "each key head serves the same number of value heads.",
        ConfigError,
    )


def _check_layers(config: ModelConfig) -> None:
    layers = config.num_hidden_layers
    require(
        len(config.layer_types) == layers,
        f"layer_types names {len(config.layer_types)} layers but num_hidden_layers is {layers}; change one of them.",
        ConfigError,
    )
    for layer in config.mlp_only_layers:
        require(
            0 <= layer < layers,
            f"mlp_only_layers names layer {layer}, but the layers are 0 to {layers - 1}.",
            ConfigError,
        )


def _check_experts(config: ModelConfig) -> None:
    chosen, experts = config.num_experts_per_tok, config.num_experts
    require(
        experts * config.num_hidden_layers <= MOST_EXPERTS,
        f"num_experts is {experts} in {config.num_hidden_layers} layers; expected at most {MOST_EXPERTS} experts in all.",
        ConfigError,
    )
    require(
        experts == 0 or chosen <= experts,
        f"num_experts_per_tok {chosen} exceeds num_experts {experts}; a token can choose each expert once.",
        ConfigError,
    )


def _refuse_quantisation_beside(path: Path, values: Mapping[str, object]) -> None:
    """ModelOpt and older compressed-tensors files may describe the quantisation outside ``quantization_config``."""
    if values.get("quantization_config") is not None:
        return
    beside = path.parent / "hf_quant_config.json"
    if path.name == "config.json" and beside.is_file():
        name = refused_method(read_json_object(beside, ConfigError), "modelopt")
        raise ConfigError(f"{beside}: {unsupported(name)}")
    compressed = values.get("compression_config")
    if isinstance(compressed, Mapping):
        raise ConfigError(f"{path}: {unsupported(refused_method(compressed, 'compressed-tensors'))}")
