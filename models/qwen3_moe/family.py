"""Qwen3-MoE as a family: its config fields, defaults (Qwen3-Next specification, sections 2.1, 16), graphs and plan."""

from deltaloom.models.families import ALL_SIZES, EXPERTS, FIXED, Family
from deltaloom.models.plans import DECODER, EXPERT_WEIGHTS

FAMILY = Family(
    "qwen3_moe",
    sizes={
        **ALL_SIZES,
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
    extra=EXPERTS,
    fixed={**FIXED, "shared_expert_intermediate_size": (0, None)},
    graph="deltaloom.models.qwen3_moe.graph:model",
    plan=(*DECODER, *EXPERT_WEIGHTS),
)
