"""The gated delta rule over packed sequences."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw
from deltaloom.graph.types import TensorType, f32
from deltaloom.ops.precision import wide_dtype
from deltaloom.ops.serving import ServingForm, bind_layout, layout_of, run_packed
from deltaloom.ops.serving_cases import draw_slots, draw_steps
from deltaloom.ops.serving_torch import run_packed_torch
from deltaloom.ops.signature import Axes, floating, has_dtype


class PackedGatedDeltaRule(ServingForm):
    """``gated_delta_rule`` of every sequence, its state read from a slot and written to slots after chosen tokens.

    q, k [1, tokens, Hk, dk], v [1, tokens, Hv, dv], log_decay, beta [1, tokens, Hv], pool [slots, Hv, dk, dv]; the rest as in
    ``ops/serving.py``."""

    name: ClassVar[str] = "packed_gated_delta_rule"
    base: ClassVar[str] = "gated_delta_rule"
    layout: ClassVar[tuple[str, ...]] = ("read_slots", "write_slots", "query_starts")
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_pool")
    updates: ClassVar[dict[str, int]] = {"pool": 1}
    sharding: ClassVar[str] = (
        "1 t! h k!, 1 t! h k!, 1 t! (h r) v, 1 t! (h r), 1 t! (h r), n! (h r) k! v, s!, t!, q! -> 1 t! (h r) v, n! (h r) k! v"
    )
    scale: float

    def infer(
        self,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        log_decay: TensorType,
        beta: TensorType,
        pool: TensorType,
        read_slots: TensorType,
        write_slots: TensorType,
        query_starts: TensorType | None = None,
    ) -> tuple[TensorType, TensorType]:
        axes = Axes()
        axes.bind("q", q, "1 tokens key_heads key_dim")
        axes.bind("k", k, "1 tokens key_heads key_dim")
        axes.bind("v", v, "1 tokens value_heads value_dim")
        axes.bind("log_decay", log_decay, "1 tokens value_heads")
        axes.bind("beta", beta, "1 tokens value_heads")
        axes.bind("pool", pool, "slots value_heads key_dim value_dim")
        bind_layout(axes, q, layout_of(self.layout, (read_slots, write_slots, query_starts)))
        key_heads, value_heads = axes.number("key_heads"), axes.number("value_heads")
        require(value_heads % key_heads == 0, f"the heads of v {v} are not a multiple of those of k {k}")
        dtype = wide_dtype(floating("v", v))
        for name, type_ in (("q", q), ("k", k), ("log_decay", log_decay), ("beta", beta), ("pool", pool)):
            has_dtype(name, type_, dtype, f"for v {v}")
        return v, pool

    def reference(
        self,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array,
        beta: Array,
        pool: Array,
        read_slots: Array,
        write_slots: Array,
        query_starts: Array | None = None,
    ) -> tuple[Array, Array]:
        layout = layout_of(self.layout, (read_slots, write_slots, query_starts))
        return run_packed(self.one(), (q, k, v, log_decay, beta), (), pool, np.zeros_like(v), layout)

    def torch(
        self,
        torch: Any,
        q: Any,
        k: Any,
        v: Any,
        log_decay: Any,
        beta: Any,
        pool: Any,
        read_slots: Any,
        write_slots: Any,
        query_starts: Any = None,
    ) -> Any:
        layout = layout_of(self.layout, (read_slots, write_slots, query_starts))
        return run_packed_torch(torch, self.one(), (q, k, v, log_decay, beta), (), pool, torch.zeros_like(v), layout)

    def cost(
        self,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        log_decay: TensorType,
        beta: TensorType,
        pool: TensorType,
        read_slots: TensorType,
        write_slots: TensorType,
        query_starts: TensorType | None = None,
    ) -> Cost:
        """Of the recurrent form; one slot is read for each sequence and one written."""
        state = pool.with_shape(*pool.shape[1:])
        moved = q.nbytes() + k.nbytes() + 2 * v.nbytes() + log_decay.nbytes() + beta.nbytes()
        return Cost(7 * v.shape[1] * state.elements(), moved + 2 * read_slots.shape[0] * state.nbytes())

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        steps = draw_steps(draw)
        key_heads, repeats, key_dim, value_dim = draw.integer(1, 4), draw.integer(1, 3), draw.size(17), draw.size(17)
        slots, value_heads, tokens = draw_slots(draw, steps), key_heads * repeats, steps.tokens
        q, k = (_unit(draw.normal(1, tokens, key_heads, key_dim)) for _ in range(2))
        v = draw.uniform(-0.3, 5.0, 1, tokens, value_heads, value_dim)
        log_decay = draw.uniform(-2.0, 0.0, 1, tokens, value_heads) * draw.choice(1.0, 10.0, 0.0)
        beta = draw.uniform(0.0, 1.0, 1, tokens, value_heads)
        pool = draw.uniform(-1.0, 1.0, slots.count, value_heads, key_dim, value_dim)
        op = cls(scale=draw.choice(key_dim**-0.5, 1.0))
        arrays = (*steps.alike(q, k, v, log_decay, beta), pool, slots.read, slots.write, *steps.query_starts())
        return Case(op, arrays, (f32, f32, None, f32, f32, f32, None, None, None)[: len(arrays)])


def _unit(x: Array) -> Array:
    norms: Array = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    return x / norms
