"""Qwen3 as a family: its config fields, defaults (Qwen3-Next specification, sections 2.1, 16), graphs and plan."""

from deltaloom.models.families import ALL_SIZES, FIXED, Family
from deltaloom.models.plans import DECODER

FAMILY = Family(
    "qwen3",
    sizes={
        **ALL_SIZES,
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
    fixed=FIXED,
    graph="deltaloom.models.qwen3.graph:model",
    plan=DECODER,
)
