"""Qwen3.5's dense text models for deltaloom: data only; what the path names is imported when the family is needed."""

from deltaloom import Plugin

plugin = Plugin(
    "qwen3_5",
    api=(1, 0),
    description="The dense hybrid text models of Qwen3.5 (model_type qwen3_5_text)",
    models={"qwen3_5_text": "deltaloom_qwen3_5.family:FAMILY"},
)
