"""Small models without a checkpoint: a config.json, its graph, random weights, and the interpreter as an oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import assume

from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DType, TensorType
from deltaloom.models.build import build_graph
from deltaloom.models.config import read_config
from deltaloom.ops.moe import RouterTopK
from deltaloom.runtime.executor import positions

HYBRID: Mapping[str, object] = {
    "model_type": "qwen3_next",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "mlp_only_layers": [0, 1],
    "max_position_embeddings": 256,
}
"""A delta-rule layer and an attention layer with dense feed-forward parts, and a delta-rule layer with experts."""

DENSE: Mapping[str, object] = {**HYBRID, "mlp_only_layers": [0, 1, 2]}
"""The same without experts: no choice among them can turn on the last bit of a narrow dtype."""

NEAR_TIE = 1e-4
"""Router logits that are closer than this may be ranked otherwise in float32: those of ``HYBRID`` are up to 5, and the interpreter
in float32 was seen up to 2e-5 from float64 (200 seeds, 9 tokens each)."""


def toy_graph(config: Mapping[str, object], dtype: DType) -> Graph:
    """The main graph of a config.json that computes in ``dtype``."""
    return build_graph(read_config(config), dtype=dtype, names=()).main


def random_weights(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Plain weights for all parameters of ``graph`` by full name, as float32 that bfloat16 holds exactly, so that every backend
    starts from the same numbers. Matrices keep sums near 1."""
    rng = np.random.default_rng(seed)
    return {name: _weight(rng, type_) for name, type_ in sorted(graph.all_params().items())}


def _weight(rng: np.random.Generator, type_: TensorType) -> Array:
    shape = type_.static_shape()
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
    numbers = rng.standard_normal(shape) * scale
    # cut below the 8 bits of bfloat16
    cut: Array = (numbers.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return cut


class Oracle:
    """A graph run by the interpreter, call after call: ``dtype`` of the graph decides whether it is the truth (float64) or the
    truth as rounded in that dtype. A case in which experts are chosen by less than ``NEAR_TIE`` says nothing about a
    backend, as another choice is another function: it is not accepted (``hypothesis.assume``)."""

    def __init__(self, graph: Graph, weights: Mapping[str, Array], batch: int) -> None:
        self.graph = graph
        types = graph.all_params()
        self._weights = {name: array.astype(types[name].plain_dtype.numpy) for name, array in weights.items()}
        sizes = {"batch": batch, "past": 0}
        self.states: dict[str, Any] = {
            name: np.zeros(state.value.type.substitute(sizes).static_shape(), state.value.type.plain_dtype.numpy)
            for name, state in graph.all_states().items()
        }
        self._batch = batch
        self._valid = np.ones((batch, 0), bool)
        self._routers = _routers(graph)

    def run(self, ids: Array, valid: Array | None = None) -> dict[str, Array]:
        """The outputs for new tokens ``ids`` [batch, n]; ``valid`` [batch, n] is False for padding."""
        length, count = self._valid.shape[1], ids.shape[1]
        new = np.ones(ids.shape, bool) if valid is None else valid
        self._valid = np.concatenate([self._valid, new], axis=1)
        given = {"token_ids": ids, "positions": positions(self._valid, self._batch, length, count), "valid": self._valid}
        inputs = {value.name: given[value.name] for value in self.graph.inputs}
        results = interpret(self.graph, inputs, self._weights.__getitem__, self.states, observe=self._decided)
        self.states = results.states
        return results.outputs

    def _decided(self, name: str, array: Array) -> None:
        """Accept the case only where the experts that are chosen by the logits ``name`` are clearly the best."""
        chosen = self._routers.get(name, 0)
        if 0 < chosen < array.shape[-1]:
            ranked = -np.sort(-array, axis=-1)
            assume(bool((ranked[..., chosen - 1] - ranked[..., chosen] > NEAR_TIE).all()))


def _routers(graph: Graph) -> dict[str, int]:
    """Full name of router logits -> how many experts are chosen by them."""
    return {
        one.prefix + node.inputs[0].name: node.op.k
        for one in graph.instances()
        for node in one.graph.nodes
        if isinstance(node.op, RouterTopK)
    }


def same_numbers(array: Array | QuantizedArray, other: Array | QuantizedArray) -> bool:
    """Whether two arrays, or two quantised ones, are equal bit by bit."""
    if isinstance(array, QuantizedArray):
        return isinstance(other, QuantizedArray) and _equal(array.data, other.data) and _equal(array.scale, other.scale)
    return not isinstance(other, QuantizedArray) and _equal(array, other)


def _equal(array: Array, other: Array) -> bool:
    return array.dtype == other.dtype and array.shape == other.shape and array.tobytes() == other.tobytes()
