"""Causal attention of packed sequences over a pool of blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw
from deltaloom.graph.types import TensorType
from deltaloom.ops.serving import ServingForm, bind_layout, layout_of, sequence_bounds
from deltaloom.ops.serving_cases import draw_blocks, draw_steps
from deltaloom.ops.serving_torch import paged_attention_torch
from deltaloom.ops.signature import Axes, floating, has_dtype


class PagedAttention(ServingForm):
    """``attention`` of every sequence over its blocks, into which its new keys and values are written first.

    q [1, tokens, Hq, D], k, v [1, tokens, Hkv, width], pools [blocks, Hkv, block_size, width]; the token i of a sequence is its
    position context_lengths[s] + i and sees all positions up to that one. The rest as in ``ops/serving.py``."""

    name: ClassVar[str] = "paged_attention"
    base: ClassVar[str] = "attention"
    layout: ClassVar[tuple[str, ...]] = ("block_tables", "context_lengths", "query_starts")
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_key_pool", "new_value_pool")
    updates: ClassVar[dict[str, int]] = {"key_pool": 1, "value_pool": 2}
    sharding: ClassVar[str] = (
        "1 t! (h r) d!, 1 t! h d!, 1 t! h v, n! h b! d!, n! h b! v, s! m!, s!, q! -> 1 t! (h r) v, n! h b! d!, n! h b! v"
    )
    scale: float

    def infer(
        self,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        key_pool: TensorType,
        value_pool: TensorType,
        block_tables: TensorType,
        context_lengths: TensorType,
        query_starts: TensorType | None = None,
    ) -> tuple[TensorType, TensorType, TensorType]:
        dtype = floating("q", q)
        axes = Axes()
        axes.bind("q", q, "1 tokens query_heads width")
        axes.bind("k", k, "1 tokens key_heads width")
        axes.bind("v", v, "1 tokens key_heads value_width")
        axes.bind("key_pool", key_pool, "blocks key_heads block_size width")
        axes.bind("value_pool", value_pool, "blocks key_heads block_size value_width")
        for name, type_ in (("k", k), ("v", v), ("key_pool", key_pool), ("value_pool", value_pool)):
            has_dtype(name, type_, dtype, "as q")
        bind_layout(axes, q, layout_of(self.layout, (block_tables, context_lengths, query_starts)))
        query_heads, key_heads = axes.number("query_heads"), axes.number("key_heads")
        require(query_heads % key_heads == 0, f"the heads of q {q} are not a multiple of those of k {k}")
        axes.number("block_size")
        return q.with_shape(1, axes["tokens"], query_heads, axes["value_width"]), key_pool, value_pool

    def reference(
        self,
        q: Array,
        k: Array,
        v: Array,
        key_pool: Array,
        value_pool: Array,
        block_tables: Array,
        context_lengths: Array,
        query_starts: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        keys, values, size = key_pool.copy(), value_pool.copy(), key_pool.shape[2]
        out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
        bounds = sequence_bounds(q.shape[1], len(context_lengths), query_starts)
        for table, past, start, stop in zip(block_tables, context_lengths.tolist(), bounds, bounds[1:]):
            if start == stop:
                continue
            now = slice(start, stop)
            old = [_positions(pool, table, past) for pool in (key_pool, value_pool)]
            out[:, now], _, _ = self.one().reference(q[:, now], k[:, now], v[:, now], *old)
            for token in range(start, stop):
                block, place = divmod(past + token - start, size)
                keys[table[block], :, place] = k[0, token]
                values[table[block], :, place] = v[0, token]
        return out, keys, values

    def torch(
        self,
        torch: Any,
        q: Any,
        k: Any,
        v: Any,
        key_pool: Any,
        value_pool: Any,
        block_tables: Any,
        context_lengths: Any,
        query_starts: Any = None,
    ) -> Any:
        layout = layout_of(self.layout, (block_tables, context_lengths, query_starts))
        return paged_attention_torch(torch, self.one(), (q, k, v), (key_pool, value_pool), layout)

    def cost(
        self,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        key_pool: TensorType,
        value_pool: TensorType,
        block_tables: TensorType,
        context_lengths: TensorType,
        query_starts: TensorType | None = None,
    ) -> Cost:
        """As if every token saw all columns that a table has room for."""
        columns = block_tables.shape[1] * key_pool.shape[2]
        block = sum((pool.with_shape(*pool.shape[1:]).nbytes() for pool in (key_pool, value_pool)), start=0)
        seen = block_tables.elements() * block
        flops = q.shape[1] * q.shape[2] * columns * (2 * q.shape[3] + 2 * v.shape[3] + 5)
        return Cost(flops, q.nbytes() + 2 * (k.nbytes() + v.nbytes()) + seen + q.with_shape(*q.shape[:3], v.shape[3]).nbytes())

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        steps = draw_steps(draw)
        heads, repeats, width, value_width = draw.integer(1, 4), draw.integer(1, 3), draw.size(17), draw.size(17)
        blocks, tokens = draw_blocks(draw, steps), steps.tokens
        new = steps.alike(
            draw.normal(1, tokens, heads * repeats, width),
            draw.normal(1, tokens, heads, width),
            draw.normal(1, tokens, heads, value_width),
        )
        pools = (draw.normal(blocks.count, heads, blocks.size, width), draw.normal(blocks.count, heads, blocks.size, value_width))
        op = cls(scale=draw.choice(width**-0.5, 1.0))
        return Case(op, (*new, *pools, blocks.tables, blocks.contexts, *steps.query_starts()))


def _positions(pool: Array, table: Array, count: int) -> Array:
    """The first ``count`` positions of a sequence, [1, heads, count, width]."""
    size = pool.shape[2]
    found = [pool[table[position // size], :, position % size] for position in range(count)]
    return np.stack(found, axis=1)[None] if found else np.empty((1, pool.shape[1], 0, pool.shape[3]), pool.dtype)
