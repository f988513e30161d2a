"""The gated delta net between its projections, over packed sequences, as one op."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.op import Case, Draw, Inferred
from deltaloom.graph.types import TensorType, f32
from deltaloom.ops.fused_delta_net import GatedDeltaNet
from deltaloom.ops.serving import ServingBuilder, ServingForm, layout_of
from deltaloom.ops.serving_cases import draw_slots, draw_steps


class PackedGatedDeltaNet(ServingForm, GatedDeltaNet):
    """``gated_delta_net`` of every sequence, its states read from a slot and written to slots after chosen tokens.

    projected [1, tokens, 2 Hk dk + 2 Hv dv + 2 Hv], weights as there, pools conv [slots, C, K - 1] and delta [slots, Hv, dk, dv];
    the rest as in ``ops/serving.py``."""

    name: ClassVar[str] = "packed_gated_delta_net"
    base: ClassVar[str] = "gated_delta_net"
    layout: ClassVar[tuple[str, ...]] = ("read_slots", "write_slots", "query_starts")
    sharding: ClassVar[str] = (
        "1 t! (h k!|h k!|h r v!|h r v!|h r|h r), (h k!|h k!|h r v!) 1 taps!, (h r), (h r), v!, "
        "n! (h k!|h k!|h r v!) w!, n! (h r) k! v!, s!, t!, q! -> 1 t! (h r v!), n! (h k!|h k!|h r v!) w!, n! (h r) k! v!"
    )
    laws: ClassVar[tuple[Any, ...]] = ()

    def infer(  # type: ignore[override]  # a serving form takes more than its base op
        self,
        projected: TensorType,
        conv_weight: TensorType,
        a_log: TensorType,
        dt_bias: TensorType,
        norm_weight: TensorType,
        conv: TensorType,
        delta: TensorType,
        read_slots: TensorType,
        write_slots: TensorType,
        query_starts: TensorType | None = None,
    ) -> Inferred:
        layout = layout_of(self.layout, (read_slots, write_slots, query_starts))
        return self.types(projected, conv_weight, a_log, dt_bias, norm_weight, conv, delta, *layout.values())

    def decompose(self, g: Any, *inputs: Any) -> Any:
        own, layout = inputs[:7], inputs[7:]
        return self.one().decompose(ServingBuilder(g, dict(zip(self.layout, layout))), *own)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        steps, taps = draw_steps(draw), draw.choice(4, 2, 1)
        key_heads, repeats, key_dim, value_dim = draw.integer(1, 4), draw.integer(1, 3), draw.size(17), draw.size(17)
        slots, value_heads = draw_slots(draw, steps), key_heads * repeats
        op = cls(key_heads, value_heads, key_dim, value_dim, scale=draw.choice(key_dim**-0.5, 1.0), eps=draw.choice(1e-6, 1e-2))
        keys, values = op.widths
        channels = 2 * keys + values
        arrays = (
            *steps.alike(draw.normal(1, steps.tokens, channels + values + 2 * value_heads)),
            draw.normal(channels, 1, taps),
            draw.uniform(-3.0, 1.0, value_heads),
            draw.normal(value_heads),
            draw.uniform(0.5, 1.5, value_dim),
            draw.normal(slots.count, channels, taps - 1),
            draw.uniform(-1.0, 1.0, slots.count, value_heads, key_dim, value_dim),
            slots.read,
            slots.write,
            *steps.query_starts(),
        )
        return Case(op, arrays, (None,) * 6 + (f32,) + (None,) * (len(arrays) - 7))
