"""The short causal convolution over packed sequences."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw
from deltaloom.graph.types import TensorType
from deltaloom.ops.serving import ServingForm, bind_layout, layout_of, run_packed
from deltaloom.ops.serving_cases import draw_slots, draw_steps
from deltaloom.ops.serving_torch import run_packed_torch
from deltaloom.ops.signature import Axes, floating, has_dtype


class PackedCausalConv1d(ServingForm):
    """``causal_conv1d`` of every sequence, its state read from a slot and written to slots after chosen tokens.

    x [1, tokens, channels], weight [channels, 1, taps], pool [slots, channels, taps - 1]; the rest as in ``ops/serving.py``."""

    name: ClassVar[str] = "packed_causal_conv1d"
    base: ClassVar[str] = "causal_conv1d"
    layout: ClassVar[tuple[str, ...]] = ("read_slots", "write_slots", "query_starts")
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_pool")
    updates: ClassVar[dict[str, int]] = {"pool": 1}
    sharding: ClassVar[str] = "1 t! c, c 1 k!, n! c w!, s!, t!, q! -> 1 t! c, n! c w!"
    activation: str = "none"

    def infer(
        self,
        x: TensorType,
        weight: TensorType,
        pool: TensorType,
        read_slots: TensorType,
        write_slots: TensorType,
        query_starts: TensorType | None = None,
    ) -> tuple[TensorType, TensorType]:
        require(self.activation in ("none", "silu"), f"activation is '{self.activation}', expected 'none' or 'silu'")
        dtype = floating("x", x)
        axes = Axes()
        axes.bind("x", x, "1 tokens channels")
        axes.bind("weight", weight, "channels 1 taps")
        axes.bind("pool", pool, "slots channels taps-1")
        taps = axes.number("taps")
        require(axes["taps-1"] == taps - 1, f"pool {pool} should have {taps - 1} columns for weight {weight}")
        has_dtype("weight", weight, dtype, "as x")
        has_dtype("pool", pool, dtype, "as x")
        bind_layout(axes, x, layout_of(self.layout, (read_slots, write_slots, query_starts)))
        return x, pool

    def reference(
        self,
        x: Array,
        weight: Array,
        pool: Array,
        read_slots: Array,
        write_slots: Array,
        query_starts: Array | None = None,
    ) -> tuple[Array, Array]:
        layout = layout_of(self.layout, (read_slots, write_slots, query_starts))
        return run_packed(self.one(), (x,), (weight,), pool, np.zeros_like(x), layout)

    def torch(self, torch: Any, x: Any, weight: Any, pool: Any, read_slots: Any, write_slots: Any, query_starts: Any = None) -> Any:
        layout = layout_of(self.layout, (read_slots, write_slots, query_starts))
        return run_packed_torch(torch, self.one(), (x,), (weight,), pool, torch.zeros_like(x), layout)

    def cost(
        self,
        x: TensorType,
        weight: TensorType,
        pool: TensorType,
        read_slots: TensorType,
        write_slots: TensorType,
        query_starts: TensorType | None = None,
    ) -> Cost:
        """Of the slots of a pool, one is read for each sequence and one written."""
        state = pool.with_shape(*pool.shape[1:]).nbytes()
        moved = 2 * x.nbytes() + weight.nbytes() + 2 * read_slots.shape[0] * state
        silu = 5 if self.activation == "silu" else 0
        return Cost((2 * weight.shape[2] + silu) * x.elements(), moved)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        steps, channels, taps = draw_steps(draw), draw.size(17), draw.choice(4, 1, 2, 3)
        slots = draw_slots(draw, steps)
        (x,) = steps.alike(draw.normal(1, steps.tokens, channels))
        pool = draw.normal(slots.count, channels, taps - 1)
        arrays = (x, draw.normal(channels, 1, taps), pool, slots.read, slots.write, *steps.query_starts())
        return Case(cls(draw.choice("none", "silu")), arrays)
