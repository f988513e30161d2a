"""The built-in rewrite rules, one fusion a file, and the passes that apply them. A rule is imported when it is first asked for."""

from deltaloom.passes.rewrite.rule import rules

TABLE: dict[str, str] = {
    "add_rms_norm": "deltaloom.passes.fuse.norm:FuseAddRMSNorm",
    "conv_silu": "deltaloom.passes.fuse.convolution:FuseConvSilu",
    "gated_attention": "deltaloom.passes.fuse.attention:FuseGatedAttention",
    "gated_delta_net": "deltaloom.passes.fuse.delta_net:FuseGatedDeltaNet",
    "gated_qkv_norm_rope": "deltaloom.passes.fuse.attention:FuseGatedQKVNormRope",
    "gated_router": "deltaloom.passes.fuse.router:FuseGatedRouter",
    "packed_swiglu": "deltaloom.passes.fuse.swiglu:FusePackedSwiglu",
    "qkv_norm_rope": "deltaloom.passes.fuse.attention:FuseQKVNormRope",
    "shared_expert": "deltaloom.passes.fuse.shared_expert:FoldSharedExpert",
}
"""Name -> "module:Class" of the built-in rules."""

rules.add_table(TABLE)
