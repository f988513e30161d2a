"""The shared expert, folded into the op that runs the routed ones."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.op import Draw
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Example, Rule


class FoldSharedExpert(Rule):
    """Routed experts plus a gated SwiGLU of the same x become one op. The two matrices of the SwiGLU are stacked, which is
    arithmetic on weights and is lifted; it must find them unpacked."""

    name: ClassVar[str] = "shared_expert"
    root: ClassVar[str] = "moe_experts"

    def pattern(
        self,
        g: Any,
        x: Any,
        weights: Any,
        ids: Any,
        gate: Any,
        gate_up: Any,
        down: Any,
        shared_gate: Any,
        shared_up: Any,
        shared_down: Any,
    ) -> Any:
        routed = g.moe_experts(x, weights, ids, gate_up, down)
        inner = g.swiglu(g.linear(x, shared_gate), g.linear(x, shared_up))
        return g.add(routed, g.sigmoid_gate(g.linear(inner, shared_down), gate))

    def check(self, m: Match) -> str | None:
        return None if m.gate.type.shape[-1] == 1 else f"the gate {m.gate}: {m.gate.type} is not one number a token"

    def rewrite(self, g: Any, m: Match) -> Any:
        shared_gate_up = g.concat(m.shared_gate, m.shared_up, axis=0, name="shared_expert.gate_up")
        return g.shared_moe(m.x, m.weights, m.ids, m.gate, m.gate_up, m.down, shared_gate_up, m.shared_down)

    def examples(self, draw: Draw) -> Example:
        batch, seq, experts = draw.integer(1, 3), draw.size(), draw.size(9)
        hidden, inner, shared, k = draw.size(17), draw.size(17), draw.size(17), draw.integer(1, experts)
        ids = np.argsort(draw.uniform(0.0, 1.0, batch, seq, experts), axis=-1)[..., :k].astype(np.int32)
        arrays = (
            draw.normal(batch, seq, hidden),
            draw.uniform(0.0, 1.0, batch, seq, k),
            ids,
            draw.normal(batch, seq, 1),
            draw.normal(experts, 2 * inner, hidden) / np.sqrt(hidden),
            draw.normal(experts, hidden, inner) / np.sqrt(inner),
            draw.normal(shared, hidden) / np.sqrt(hidden),
            draw.normal(shared, hidden) / np.sqrt(hidden),
            draw.normal(hidden, shared) / np.sqrt(shared),
        )
        return Example(arrays)
