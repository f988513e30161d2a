"""The three families: their config fields and the library's defaults (Qwen3-Next specification, sections 2.1, 16)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

LayerKind = Literal["linear_attention", "full_attention"]
LINEAR: Final = "linear_attention"
FULL: Final = "full_attention"

_GENERAL = frozenset({
    "model_type", "dtype", "rms_norm_eps", "attention_bias", "tie_word_embeddings", "layer_types",
    "quantization_config", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters", "bos_token_id",
    "eos_token_id", "pad_token_id",
})  # fmt: skip
_EXPERTS = frozenset({"norm_topk_prob", "mlp_only_layers"})

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

# Fields of which one reading only is built: any other value would change the computation.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "use_qk_norm": (True,),
    "qkv_bias": (False,),
    "layer_scale": (False, None),
}


@dataclass(frozen=True)
class Family:
    """One ``model_type``. ``sizes``: its integer fields with the library's defaults, None if derived."""

    model_type: str
    sizes: Mapping[str, int | None]
    partial_rotary_factor: float
    norm_topk_prob: bool
    extra: frozenset[str]
    fixed: Mapping[str, tuple[object, ...]]

    def knows(self, name: str) -> bool:
        return name in self.sizes or name in self.extra or name in self.fixed or name in _GENERAL or name in IGNORED

    def names(self) -> list[str]:
        return sorted({*self.sizes, *self.extra, *self.fixed, *_GENERAL, *IGNORED})


_ALL_SIZES: Mapping[str, int | None] = {"vocab_size": 151936, "max_position_embeddings": 32768}

QWEN3_NEXT = Family(
    "qwen3_next",
    sizes={
        **_ALL_SIZES,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "intermediate_size": 5632,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "num_nextn_predict_layers": 1,
    },
    partial_rotary_factor=0.25,
    norm_topk_prob=True,
    extra=_EXPERTS | {"full_attention_interval"},
    fixed={**_FIXED, "attn_output_gate": (True,)},
)
QWEN3 = Family(
    "qwen3",
    sizes={
        **_ALL_SIZES,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
    },
    partial_rotary_factor=1.0,
    norm_topk_prob=False,
    extra=frozenset(),
    fixed=_FIXED,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    sizes={
        **_ALL_SIZES,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
    partial_rotary_factor=1.0,
    norm_topk_prob=False,
    extra=_EXPERTS,
    fixed={**_FIXED, "shared_expert_intermediate_size": (0, None)},
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (QWEN3, QWEN3_MOE, QWEN3_NEXT)}
