"""What each op means: one class an op, with its type rule, its NumPy reference (the definition) and optional rules.

The classes are imported when an op is first asked for.
"""

from deltaloom.graph.registry import ops

if __name__ != "deltaloom.ops":
    raise ImportError("import deltaloom.ops, not ops: this folder is the source of deltaloom.ops")

TABLE: dict[str, str] = {
    "add": "deltaloom.ops.elementwise:Add",
    "add_rms_norm": "deltaloom.ops.fused_norm:AddRMSNorm",
    "all_gather": "deltaloom.ops.collectives:AllGather",
    "all_reduce": "deltaloom.ops.collectives:AllReduce",
    "all_to_all": "deltaloom.ops.collectives:AllToAll",
    "argmax_token": "deltaloom.ops.sampling_ops:ArgmaxToken",
    "attention": "deltaloom.ops.attention:Attention",
    "cast": "deltaloom.ops.elementwise:Cast",
    "causal_conv1d": "deltaloom.ops.convolution:CausalConv1d",
    "concat": "deltaloom.ops.shape:Concat",
    "delta_gates": "deltaloom.ops.delta_gates:DeltaGates",
    "dequantize": "deltaloom.ops.quantized:Dequantize",
    "embedding": "deltaloom.ops.embedding:Embedding",
    "flatten": "deltaloom.ops.shape:Flatten",
    "gated_attention": "deltaloom.ops.fused_attention:GatedAttention",
    "gated_delta_net": "deltaloom.ops.fused_delta_net:GatedDeltaNet",
    "gated_delta_rule": "deltaloom.ops.delta_rule:GatedDeltaRule",
    "gated_paged_attention": "deltaloom.ops.gated_paged_attention:GatedPagedAttention",
    "gated_rms_norm": "deltaloom.ops.norm:GatedRMSNorm",
    "gated_router": "deltaloom.ops.fused_moe:GatedRouter",
    "l2_norm": "deltaloom.ops.norm:L2Norm",
    "linear": "deltaloom.ops.linear:Linear",
    "mask_padding": "deltaloom.ops.padding:MaskPadding",
    "moe_experts": "deltaloom.ops.moe:MoEExperts",
    "mul": "deltaloom.ops.elementwise:Mul",
    "on_first_rank": "deltaloom.ops.collectives:OnFirstRank",
    "one_plus": "deltaloom.ops.elementwise:OnePlus",
    "packed_causal_conv1d": "deltaloom.ops.packed_convolution:PackedCausalConv1d",
    "packed_gated_delta_net": "deltaloom.ops.packed_delta_net:PackedGatedDeltaNet",
    "packed_gated_delta_rule": "deltaloom.ops.packed_delta_rule:PackedGatedDeltaRule",
    "packed_swiglu": "deltaloom.ops.fused_norm:PackedSwiglu",
    "paged_attention": "deltaloom.ops.paged_attention:PagedAttention",
    "penalize_logits": "deltaloom.ops.sampling_ops:PenalizeLogits",
    "philox_uniform": "deltaloom.ops.sampling_ops:PhiloxUniform",
    "qkv_norm_rope": "deltaloom.ops.fused_attention:QKVNormRope",
    "reduce_scatter": "deltaloom.ops.collectives:ReduceScatter",
    "quantize": "deltaloom.ops.quantized:Quantize",
    "reshape": "deltaloom.ops.shape:Reshape",
    "rms_norm": "deltaloom.ops.norm:RMSNorm",
    "rope": "deltaloom.ops.rope:Rope",
    "rotary_embedding": "deltaloom.ops.rope:RotaryEmbedding",
    "router_topk": "deltaloom.ops.moe:RouterTopK",
    "sample_token": "deltaloom.ops.sampling_ops:SampleToken",
    "shard": "deltaloom.ops.collectives:Shard",
    "shared_moe": "deltaloom.ops.fused_moe:SharedMoE",
    "sigmoid": "deltaloom.ops.elementwise:Sigmoid",
    "sigmoid_gate": "deltaloom.ops.elementwise:SigmoidGate",
    "silu": "deltaloom.ops.elementwise:Silu",
    "split": "deltaloom.ops.shape:Split",
    "stack": "deltaloom.ops.shape:Stack",
    "swiglu": "deltaloom.ops.elementwise:Swiglu",
    "take_last": "deltaloom.ops.shape:TakeLast",
    "take_rows": "deltaloom.ops.serving:TakeRows",
    "transfer": "deltaloom.ops.transfer:Transfer",
    "transpose": "deltaloom.ops.shape:Transpose",
    "unflatten": "deltaloom.ops.shape:Unflatten",
    "zeros_like": "deltaloom.ops.elementwise:ZerosLike",
}
"""Name -> "module:Class" of the built-in ops."""

ops.add_table(TABLE)
