"""Families of models: what a ``model_type`` means, from the fields of its config.json to its graphs and how a mesh divides them.

The built-in ones are described as those of plugins are, each in a file that is imported when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from deltaloom.graph import plugins
from deltaloom.graph.errors import ConfigError, PluginError, require
from deltaloom.models.json_fields import describe
from deltaloom.passes.shard.plan import Divide, Plan

if TYPE_CHECKING:
    from deltaloom.graph.ir import Graph
    from deltaloom.graph.types import DType
    from deltaloom.models.config import ModelConfig

LayerKind = Literal["linear_attention", "full_attention"]
LINEAR: Final = "linear_attention"
FULL: Final = "full_attention"

FAMILIES: Mapping[str, str] = {
    "qwen3": "deltaloom.models.qwen3.family:FAMILY",
    "qwen3_moe": "deltaloom.models.qwen3_moe.family:FAMILY",
    "qwen3_next": "deltaloom.models.qwen3_next.family:FAMILY",
}
"""The built-in families: model_type -> "module:attribute"."""

NEEDED = (
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size",
)  # fmt: skip
"""Sizes that every family has."""
ALL_SIZES: Mapping[str, int | None] = {"vocab_size": 151936, "max_position_embeddings": 32768}
"""Defaults that Qwen's families share."""
GENERAL = frozenset({
    "model_type", "dtype", "rms_norm_eps", "attention_bias", "tie_word_embeddings", "layer_types",
    "quantization_config", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters", "bos_token_id",
    "eos_token_id", "pad_token_id",
})  # fmt: skip
"""Fields that every family has."""
EXPERTS = frozenset({"norm_topk_prob", "mlp_only_layers"})
"""Fields of families with experts."""

# Fields that say nothing about what the model computes at inference, or only how its makers handled it.
IGNORED = frozenset({
    "architectures", "attention_dropout", "initializer_range", "max_window_layers", "output_router_logits",
    "router_aux_loss_coef", "sliding_window", "transformers_version", "use_cache", "unsloth_fixed", "unsloth_version",
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "add_cross_attention",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "finetuning_task", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "prefix",
    "problem_type", "return_dict", "return_dict_in_generate", "sep_token_id", "task_specific_params",
    "tie_encoder_decoder", "tokenizer_class", "torchscript", "use_bfloat16",
})  # fmt: skip

FIXED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "use_qk_norm": (True,),
    "qkv_bias": (False,),
    "layer_scale": (False, None),
}
"""Fields of which one reading only is built: any other value would change the computation."""

Builder = Callable[["ModelConfig", "DType", "Collection[str] | None"], "Graph"]
"""Makes a layer graph for a config, in a dtype, of a checkpoint with these tensor names (see ``models.build.build_graph``)."""
Reader = Callable[[Mapping[str, object]], Mapping[str, object]]
"""Gives the fields of a config.json, in canonical names, as ``models.config`` knows them. ``ConfigError`` for values it refuses."""


@dataclass(frozen=True, eq=False, repr=False)
class Family:
    """One ``model_type``. ``graph``, ``mtp`` and ``reader`` are functions, or their paths ``"module:attribute"``.

    ``sizes``: its integer fields with the defaults of its library, None if derived. Those that ``ModelConfig`` does not have as
    fields of its own are in its ``more``, as are the fields in ``extra`` that it does not have, as they are written.
    ``fixed``: fields of which only the listed values are built. ``rope_ignored``: keys of ``rope_parameters`` that say nothing
    about how a text is rotated. ``reader``: interprets fields that this family writes differently, after unknown ones are refused.

    ``graph``: makes the layer graph, ``mtp`` that of the head which predicts further tokens, if there is one. ``plan``: what a mesh
    divides, empty if a model of the family cannot be divided. Raises ``ConfigError`` where something needed is missing."""

    model_type: str
    sizes: Mapping[str, int | None]
    partial_rotary_factor: float
    norm_topk_prob: bool
    extra: frozenset[str]
    fixed: Mapping[str, tuple[object, ...]]
    rope_ignored: frozenset[str] = frozenset()
    reader: Reader | str | None = None
    graph: Builder | str = ""
    mtp: Builder | str | None = None
    plan: Plan = ()

    def __post_init__(self) -> None:
        said = f"the family '{self.model_type}'"
        missing = [name for name in NEEDED if name not in self.sizes]
        require(not missing, f"{said} has no {' and no '.join(missing)} among its sizes", ConfigError)
        require(bool(self.graph), f"{said} has no graph; give the function that makes it, or its path", ConfigError)
        for part in self.plan:
            require(isinstance(part, Divide), f"{said} has {part!r} in its plan, expected Divide(...)", ConfigError)

    def __repr__(self) -> str:
        return f"Family({self.model_type!r})"

    def knows(self, name: str) -> bool:
        return name in self.sizes or name in self.extra or name in self.fixed or name in GENERAL or name in IGNORED

    def names(self) -> list[str]:
        return sorted({*self.sizes, *self.extra, *self.fixed, *GENERAL, *IGNORED})

    def function(self, part: Literal["graph", "mtp", "reader"]) -> Callable[..., Any] | None:
        """One of its functions, imported if need be. ``PluginError`` where that fails."""
        target: Callable[..., Any] | str | None = getattr(self, part)
        if not isinstance(target, str):
            return target
        found, wrong, cause = plugins.imported(target)
        if not wrong and not callable(found):
            wrong = f"it is {type(found).__name__}, expected a function"
        if wrong:
            raise PluginError(f"'{part}' of model type '{self.model_type}', at '{target}', cannot be used: {wrong}") from cause
        assert callable(found)
        return found


def family_named(model_type: str, use: Mapping[str, str] | None = None) -> Family:
    """The family of a ``model_type``, built in or of a plugin; ``use`` says whose (``CompileConfig.use``). ``ConfigError`` if there
    is none, ``PluginError`` if its plugin is broken, or several plugins offer it."""
    offer = plugins.find("models", model_type, built_in=model_type in FAMILIES, use=use)
    if offer is not None:
        made = offer.load(lambda found: _fault(found, model_type))
        assert isinstance(made, Family)
        return made
    if model_type not in FAMILIES:
        hint = f"known are {', '.join(names())}.{plugins.shortfall()}"
        raise ConfigError(f"model_type is {describe(model_type)}, which is unknown; {hint}")
    found, wrong, _ = plugins.imported(FAMILIES[model_type])
    assert isinstance(found, Family), wrong
    return found


def names() -> list[str]:
    """Every model type that there is, those of plugins too, which are loaded for it."""
    return sorted({*FAMILIES, *(offer.name for offer in plugins.offers("models"))})


def owners(field: str) -> list[str]:
    """The built-in families that know a field."""
    return [name for name in sorted(FAMILIES) if family_named(name, {f"models.{name}": plugins.BUILT_IN}).knows(field)]


def _fault(found: object, model_type: str) -> str:
    if not isinstance(found, Family):
        return f"it is {type(found).__name__}, expected a deltaloom.models.families.Family"
    return "" if found.model_type == model_type else f"its model type is '{found.model_type}'; it has to be '{model_type}'"
