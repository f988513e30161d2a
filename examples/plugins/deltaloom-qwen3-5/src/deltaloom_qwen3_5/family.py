"""The config.json of Qwen3.5's text models: fields and defaults of transformers' ``Qwen3_5TextConfig``."""

from deltaloom.models.families import FIXED, Family
from deltaloom.models.plans import DECODER
from deltaloom.passes.shard.plan import Divide

FAMILY = Family(
    "qwen3_5_text",
    sizes={
        "vocab_size": 248320,
        "max_position_embeddings": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 12288,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    partial_rotary_factor=0.25,
    norm_topk_prob=False,
    # What the published files say beside the library's fields; a checkpoint that has an MTP head is refused by its tensors.
    extra=frozenset({"full_attention_interval", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}),
    fixed={**FIXED, "attn_output_gate": (True,), "mamba_ssm_dtype": ("float32",), "mlp_only_layers": ([],)},
    # How an image's axes share the rotation; a text has the same position on each of them.
    rope_ignored=frozenset({"mrope_section", "mrope_interleaved"}),
    graph="deltaloom_qwen3_5.graph:model",
    plan=(*DECODER, Divide("linear_attn.A_log", "h")),
)
