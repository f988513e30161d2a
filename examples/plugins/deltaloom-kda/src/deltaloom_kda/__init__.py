"""Kimi Delta Attention for deltaloom: data only; what the paths name is imported when it is needed."""

from deltaloom import Plugin

plugin = Plugin(
    "kda",
    api=(1, 0),
    description="Kimi Delta Attention: the gated delta rule with a decay per channel",
    ops={
        "kda.decay": "deltaloom_kda.decay:Decay",
        "kda.delta_attention": "deltaloom_kda.delta_attention:DeltaAttention",
        "kda.normed_delta_attention": "deltaloom_kda.delta_attention:NormedDeltaAttention",
    },
    kernels={"numpy": "deltaloom_kda.numpy_kernels:table", "torch": "deltaloom_kda.torch_kernels:table"},
    rules={"kda.fuse_norms": "deltaloom_kda.rules:FuseNorms"},
)
