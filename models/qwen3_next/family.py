"""Qwen3-Next as a family: its config fields, defaults (Qwen3-Next specification, sections 2.1, 16), graphs and plan."""

from deltaloom.models.families import ALL_SIZES, EXPERTS, FIXED, Family
from deltaloom.models.plans import DECODER, EXPERT_WEIGHTS
from deltaloom.passes.shard.plan import Divide

FAMILY = Family(
    "qwen3_next",
    sizes={
        **ALL_SIZES,
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
    extra=EXPERTS | {"full_attention_interval"},
    fixed={**FIXED, "attn_output_gate": (True,)},
    graph="deltaloom.models.qwen3_next.graph:model",
    mtp="deltaloom.models.qwen3_next.mtp:mtp_head",
    plan=(
        *DECODER,
        *EXPERT_WEIGHTS,
        Divide("linear_attn.A_log", "h"),
        Divide("mlp.shared_expert.down_proj.weight", "i"),
    ),
)
