"""Qwen3-MoE: Qwen3's layers with experts in place of the SwiGLU, but for the layers that the config names
(Qwen3-Next specification, section 16)."""

from collections.abc import Collection

from deltaloom.graph.ir import Graph
from deltaloom.graph.types import DType
from deltaloom.models.config import ModelConfig
from deltaloom.models.decoder import decoder, layer_bodies, layer_forms
from deltaloom.models.layers import plain_norm
from deltaloom.models.qwen3.graph import layer


def model(config: ModelConfig, dtype: DType, names: Collection[str] | None) -> Graph:
    """The model: embed -> layers -> norm -> head. ``names``: see ``deltaloom.models.build.build_graph``."""
    bodies = layer_bodies(config, layer_forms(config, names), dtype, layer)
    return decoder(config, bodies, dtype, plain_norm)
