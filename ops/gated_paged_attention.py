"""Attention of packed sequences over a pool of blocks with its output gate, as one op."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.op import Case, Draw, Inferred
from deltaloom.graph.types import TensorType
from deltaloom.ops.fused import Fused
from deltaloom.ops.serving import ServingBuilder, ServingForm, layout_of
from deltaloom.ops.serving_cases import draw_blocks, draw_steps


class GatedPagedAttention(ServingForm, Fused):
    """``paged_attention``, its heads flattened, times sigmoid(gate).

    q, k, v, pools and the layout as ``paged_attention`` takes them; gate and out [1, tokens, Hq D]."""

    name: ClassVar[str] = "gated_paged_attention"
    base: ClassVar[str] = "gated_attention"
    layout: ClassVar[tuple[str, ...]] = ("block_tables", "context_lengths", "query_starts")
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_key_pool", "new_value_pool")
    updates: ClassVar[dict[str, int]] = {"key_pool": 1, "value_pool": 2}
    sharding: ClassVar[str] = (
        "1 t! (h r) d!, 1 t! h d!, 1 t! h v, 1 t! (h r v), n! h b! d!, n! h b! v, s! m!, s!, q! "
        "-> 1 t! (h r v), n! h b! d!, n! h b! v"
    )
    scale: float

    def infer(
        self,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        gate: TensorType,
        key_pool: TensorType,
        value_pool: TensorType,
        block_tables: TensorType,
        context_lengths: TensorType,
        query_starts: TensorType | None = None,
    ) -> Inferred:
        layout = layout_of(self.layout, (block_tables, context_lengths, query_starts))
        return self.types(q, k, v, gate, key_pool, value_pool, *layout.values())

    def decompose(self, g: Any, *inputs: Any) -> Any:
        own, layout = inputs[:6], inputs[6:]
        return self.one().decompose(ServingBuilder(g, dict(zip(self.layout, layout))), *own)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        steps = draw_steps(draw)
        heads, repeats, width = draw.integer(1, 4), draw.integer(1, 3), draw.size(17)
        blocks, tokens = draw_blocks(draw, steps), steps.tokens
        new = steps.alike(
            draw.normal(1, tokens, heads * repeats, width),
            draw.normal(1, tokens, heads, width),
            draw.normal(1, tokens, heads, width),
            draw.uniform(-30.0, 30.0, 1, tokens, heads * repeats * width),
        )
        pools = [draw.normal(blocks.count, heads, blocks.size, width) for _ in range(2)]
        op = cls(scale=draw.choice(width**-0.5, 1.0))
        return Case(op, (*new, *pools, blocks.tables, blocks.contexts, *steps.query_starts()))
