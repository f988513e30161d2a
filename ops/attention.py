"""Causal attention with a growing cache (Qwen3-Next specification, section 6)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import TensorType, bool_, f32, f64, i64
from deltaloom.ops.laws import PaddingIsNoOp, PermutationEquivariant, Streaming
from deltaloom.ops.padding import left_padded
from deltaloom.ops.precision import wide, wide_tensor
from deltaloom.ops.signature import Axes, floating, has_dtype


class Attention(Op):
    """out = cast(softmax(scale q K^T + mask)) V: scores and softmax in float32, weights rounded, summed in float32.

    q [batch, seq, Hq, D] sees the past and, causally, itself: K = key_cache ++ k, V = value_cache ++ v along axis 2 of
    [batch, Hkv, past + seq, width]. Query head h uses key head h // (Hq / Hkv). ``valid`` [batch, past + seq] forbids
    columns; a row that may see none gives 0."""

    name: ClassVar[str] = "attention"
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_key_cache", "new_value_cache")
    updates: ClassVar[dict[str, int]] = {"key_cache": 1, "value_cache": 2}
    appends: ClassVar[dict[str, int]] = {"key_cache": 2, "value_cache": 2}
    sharding: ClassVar[str] = (
        "b s! (h r) d!, b s! h d!, b s! h v, b h past! d!, b h past! v, b all! -> b s! (h r) v, b h all! d!, b h all! v"
    )
    laws: ClassVar[tuple[Any, ...]] = (
        Streaming(("q", "k", "v"), prefix=("valid",)),
        PaddingIsNoOp(("q", "k", "v"), zero=("valid",), prefix=("valid",)),
        PermutationEquivariant(("q", "k", "v", "key_cache", "value_cache", "valid")),
    )
    scale: float

    def infer(
        self,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        key_cache: TensorType,
        value_cache: TensorType,
        valid: TensorType | None = None,
    ) -> tuple[TensorType, TensorType, TensorType]:
        dtype = floating("q", q)
        axes = Axes()
        axes.bind("q", q, "batch seq query_heads width")
        axes.bind("k", k, "batch seq key_heads width")
        axes.bind("v", v, "batch seq key_heads value_width")
        axes.bind("key_cache", key_cache, "batch key_heads past width")
        axes.bind("value_cache", value_cache, "batch key_heads past value_width")
        for name, type_ in (("k", k), ("v", v), ("key_cache", key_cache), ("value_cache", value_cache)):
            has_dtype(name, type_, dtype, "as q")
        query_heads, key_heads = axes.number("query_heads"), axes.number("key_heads")
        require(query_heads % key_heads == 0, f"the heads of q {q} are not a multiple of those of k {k}")
        columns = axes["past"] + axes["seq"]
        if valid is not None:
            axes.bind("valid", valid, "batch past+seq")
            has_dtype("valid", valid, bool_, "for a mask")
            require(valid.shape[1] == columns, f"valid {valid} should have {columns} columns, the past and k {k}")
        batch, width, value_width = axes["batch"], axes["width"], axes["value_width"]
        return (
            q.with_shape(batch, axes["seq"], query_heads, value_width),
            q.with_shape(batch, key_heads, columns, width),
            q.with_shape(batch, key_heads, columns, value_width),
        )

    def reference(
        self, q: Array, k: Array, v: Array, key_cache: Array, value_cache: Array, valid: Array | None = None
    ) -> tuple[Array, Array, Array]:
        keys = np.concatenate([key_cache, k.transpose(0, 2, 1, 3)], axis=2)
        values = np.concatenate([value_cache, v.transpose(0, 2, 1, 3)], axis=2)
        past, columns = key_cache.shape[2], keys.shape[2]
        repeats = q.shape[2] // k.shape[2]
        scores = self.scale * (wide(q).transpose(0, 2, 1, 3) @ wide(keys).repeat(repeats, axis=1).swapaxes(2, 3))
        allowed = np.arange(columns) <= past + np.arange(q.shape[1])[:, None]
        if valid is not None:
            allowed = allowed & valid[:, None, None, :]
        scores = np.where(allowed, scores, -np.inf)
        highest = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
        total = weights.sum(axis=-1, keepdims=True)
        weights = (weights / np.where(total == 0, 1, total)).astype(q.dtype)
        out = wide(weights) @ wide(values).repeat(repeats, axis=1)
        return out.transpose(0, 2, 1, 3).astype(q.dtype), keys, values

    def torch(self, torch: Any, q: Any, k: Any, v: Any, key_cache: Any, value_cache: Any, valid: Any = None) -> Any:
        keys = torch.cat([key_cache, k.transpose(1, 2)], dim=2)
        values = torch.cat([value_cache, v.transpose(1, 2)], dim=2)
        past, columns = key_cache.shape[2], keys.shape[2]
        repeats = q.shape[2] // k.shape[2]
        spread = wide_tensor(torch, keys).repeat_interleave(repeats, dim=1)
        scores = self.scale * (wide_tensor(torch, q).transpose(1, 2) @ spread.mT)
        rows = past + torch.arange(q.shape[1], device=q.device)
        allowed = torch.arange(columns, device=q.device) <= rows[:, None]
        if valid is not None:
            allowed = allowed & valid[:, None, None, :]
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        weights = weights.masked_fill(~allowed, 0).to(q.dtype)
        return (weights @ values.repeat_interleave(repeats, dim=1)).transpose(1, 2), keys, values

    def onnx(self, b: Any, q: str, k: str, v: str, key_cache: str, value_cache: str, *valid: str) -> Any:
        if b.has("Attention") and b.dtypes[q] != f64:
            return _attention(b, q, k, v, key_cache, value_cache, *valid)
        heads, key_heads, width = b.type(q).shape[2], b.type(k).shape[2], b.type(q).shape[3]
        value_width, group = b.type(v).shape[3], heads // key_heads
        keys = b.Concat(key_cache, b.Transpose(k, perm=[0, 2, 1, 3]), axis=2)
        values = b.Concat(value_cache, b.Transpose(v, perm=[0, 2, 1, 3]), axis=2)
        batch, seq, past = b.size(q, 0), b.size(q, 1), b.size(key_cache, 2)
        columns = b.Add(past, seq)
        # All query heads of a key head are rows of one product, so that keys are not repeated.
        grouped = b.reshape(b.Transpose(b.wide(q), perm=[0, 2, 1, 3]), batch, key_heads, b.Mul(seq, b.ints(group)), width)
        scores = b.Mul(b.MatMul(grouped, b.Transpose(b.wide(keys), perm=[0, 1, 3, 2])), b.attribute("scale"))
        scores = b.reshape(scores, batch, key_heads, group, seq, columns)
        rows = b.Unsqueeze(b.Range(*map(b.scalar, (past, columns)), b.constant(1, i64)), b.ints(1))
        seen = b.LessOrEqual(b.Range(b.constant(0, i64), b.scalar(columns), b.constant(1, i64)), rows)
        if valid:
            seen = b.And(seen, b.Unsqueeze(valid[0], b.ints(1, 2, 3)))
        # A finite number and not -inf: rows that may see nothing stay finite, and are 0 afterwards.
        weights = b.Softmax(b.Where(seen, scores, b.like(-1e30, scores)), axis=-1)
        weights = b.narrow(b.Where(seen, weights, b.like(0.0, weights)), q)
        weights = b.reshape(b.wide(weights), batch, key_heads, b.Mul(seq, b.ints(group)), columns)
        out = b.reshape(b.MatMul(weights, b.wide(values)), batch, heads, seq, value_width)
        return b.narrow(b.Transpose(out, perm=[0, 2, 1, 3]), q), keys, values

    def cost(
        self,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        key_cache: TensorType,
        value_cache: TensorType,
        valid: TensorType | None = None,
    ) -> Cost:
        """Of the columns that each position sees; the caches are read and their new entries written."""
        past, seq = key_cache.shape[2], q.shape[1]
        twice_seen = seq * (2 * past + seq + 1)
        flops = q.shape[0] * q.shape[2] * twice_seen * (q.shape[3] + v.shape[3] + 3)
        out, _, _ = self.infer(q, k, v, key_cache, value_cache, valid)
        read = q.nbytes() + key_cache.nbytes() + value_cache.nbytes() + 2 * (k.nbytes() + v.nbytes())
        return Cost(flops, read + out.nbytes())

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, past, seq = draw.integer(1, 3), draw.choice(0, 1, 7, 64), draw.choice(1, 2, 3, 5, 13, 63, 64, 65)
        heads, repeats, width, value_width = draw.integer(1, 4), draw.integer(1, 3), draw.size(17), draw.size(17)
        arrays: list[Array] = [
            draw.normal(batch, seq, heads * repeats, width),
            draw.normal(batch, seq, heads, width),
            draw.normal(batch, seq, heads, value_width),
            draw.normal(batch, heads, past, width),
            draw.normal(batch, heads, past, value_width),
        ]
        if draw.choice(False, True):
            arrays.append(left_padded(draw, batch, past + seq))
        return Case(cls(scale=draw.choice(width**-0.5, 1.0)), tuple(arrays))


def _attention(b: Any, q: str, k: str, v: str, key_cache: str, value_cache: str, *valid: str) -> Any:
    """With the standard op, from opset 24 on."""
    queries, keys, values = (b.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    past, seq = b.size(key_cache, 2), b.size(q, 1)
    columns, one = b.Add(past, seq), b.constant(1, i64)
    rows = b.Unsqueeze(b.Range(*map(b.scalar, (past, columns)), one), b.ints(1))
    seen = b.LessOrEqual(b.Range(b.constant(0, i64), b.scalar(columns), one), rows)
    seen = b.And(seen, b.Unsqueeze(valid[0], b.ints(1, 2))) if valid else b.Unsqueeze(seen, b.ints(0, 1))
    out, *caches = b.Attention(queries, keys, values, seen, key_cache, value_cache, scale=b.reference("scale"), outputs=3)
    if valid:
        # What a row gives that may see nothing is left open.
        some = b.ReduceMax(b.cast(seen, f32), b.ints(-1), keepdims=1)
        out = b.Where(b.cast(some, bool_), out, b.like(0.0, out))
    return b.Transpose(out, perm=[0, 2, 1, 3]), *caches
