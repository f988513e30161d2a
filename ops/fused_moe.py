"""Routed experts with a shared one, fused (Qwen3-Next specification, section 8)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Case, Draw, Inferred
from deltaloom.graph.types import TensorType, bf16
from deltaloom.ops.fused import Fused
from deltaloom.ops.laws import PermutationEquivariant


class GatedRouter(Fused):
    """router_topk of logits [..., :-1]; the last column passes through as the shared expert's gate.

    logits [batch, seq, E + 1] give weights and ids [batch, seq, k] and gate [batch, seq, 1]."""

    name: ClassVar[str] = "gated_router"
    outputs: ClassVar[tuple[str, ...]] = ("weights", "ids", "gate")
    sharding: ClassVar[str] = "b s e! -> b s k!, b s k!, b s 1"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("logits",)),)
    k: int
    normalize: bool

    def infer(self, logits: TensorType) -> Inferred:
        return self.types(logits)

    def decompose(self, g: Any, logits: Any) -> Any:
        columns = logits.type.shape[-1] if logits.type.rank else 0
        wide_enough = isinstance(columns, int) and columns > 1
        require(wide_enough, f"logits {logits.type} should have a column an expert and one for the shared expert's gate")
        scores, gate = g.split(logits, sizes=(columns - 1, 1), axis=-1, name="logits_gate")
        weights, ids = g.router_topk(scores, k=self.k, normalize=self.normalize, name="router")
        return weights, ids, gate

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        experts = draw.choice(draw.size(20), 70)
        logits = draw.normal(draw.integer(1, 3), draw.size(), experts + 1).clip(-30, 30)
        if draw.choice(False, True):
            logits = np.round(logits * 2) / 2
        return Case(cls(draw.choice(draw.integer(1, experts), experts), normalize=draw.choice(True, False)), (logits,))


class SharedMoE(Fused):
    """moe_experts(x, weights, ids, gate_up, down) + sigmoid(gate) * shared_down swiglu(shared_gate_up x).

    x, weights, ids, gate_up, down as ``moe_experts`` takes them; gate [batch, seq, 1]; shared_gate_up [2 S, H], gate rows
    first; shared_down [H, S]."""

    name: ClassVar[str] = "shared_moe"
    sharding: ClassVar[str] = "b s h!, b s k!, b s k!, b s 1, e! (2 i) h!, +e! h! i, (2 j) h!, +h! j -> b s h!"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("x", "weights", "ids", "gate")),)

    def infer(
        self,
        x: TensorType,
        weights: TensorType,
        ids: TensorType,
        gate: TensorType,
        gate_up: TensorType,
        down: TensorType,
        shared_gate_up: TensorType,
        shared_down: TensorType,
    ) -> Inferred:
        return self.types(x, weights, ids, gate, gate_up, down, shared_gate_up, shared_down)

    def decompose(
        self,
        g: Any,
        x: Any,
        weights: Any,
        ids: Any,
        gate: Any,
        gate_up: Any,
        down: Any,
        shared_gate_up: Any,
        shared_down: Any,
    ) -> Any:
        routed = g.moe_experts(x, weights, ids, gate_up, down, name="experts")
        inner = g.packed_swiglu(g.linear(x, shared_gate_up, name="shared.gate_up"), name="shared.inner")
        shared = g.sigmoid_gate(g.linear(inner, shared_down, name="shared.down"), gate, name="shared")
        return g.add(routed, shared, name="out")

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, seq, experts = draw.integer(1, 3), draw.size(), draw.size(9)
        hidden, inner, shared = draw.size(17), draw.size(17), draw.size(17)
        k = draw.choice(draw.integer(1, experts), experts)
        ids = np.argsort(draw.uniform(0.0, 1.0, batch, seq, experts), axis=-1)[..., :k]
        arrays = (
            draw.normal(batch, seq, hidden),
            draw.uniform(0.0, 1.0, batch, seq, k),
            ids.astype(np.int32),
            draw.normal(batch, seq, 1, scale=draw.choice(1.0, 30.0)),
            draw.normal(experts, 2 * inner, hidden) / np.sqrt(hidden),
            draw.normal(experts, hidden, inner) / np.sqrt(inner),
            draw.normal(2 * shared, hidden) / np.sqrt(hidden),
            draw.normal(hidden, shared) / np.sqrt(shared),
        )
        return Case(cls(), arrays, (None,) * 4 + (draw.choice(None, None, bf16),) * 4)
