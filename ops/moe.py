"""Routing and experts (Qwen3-Next specification, section 8)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import TensorType, i32, i64
from deltaloom.ops import precision
from deltaloom.ops.laws import PermutationEquivariant
from deltaloom.ops.precision import wide, wide_tensor
from deltaloom.ops.quantized import draw_stored, is_weight, plain, plain_tensor
from deltaloom.ops.signature import Axes, floating, has_dtype


class RouterTopK(Op):
    """The k largest of p = softmax(logits) over all experts, in float32; divided by their sum if asked; then rounded.

    Largest first, ties to the lowest id; the order is that of the logits, so it does not depend on how the softmax is
    rounded. logits [batch, seq, E] give weights [batch, seq, k] in their dtype and ids i32."""

    name: ClassVar[str] = "router_topk"
    outputs: ClassVar[tuple[str, ...]] = ("weights", "ids")
    sharding: ClassVar[str] = "b s e! -> b s k!, b s k!"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("logits",)),)
    k: int
    normalize: bool

    def infer(self, logits: TensorType) -> tuple[TensorType, TensorType]:
        floating("logits", logits)
        axes = Axes()
        axes.bind("logits", logits, "batch seq experts")
        experts = axes.number("experts")
        require(1 <= self.k <= experts, f"k is {self.k}, but logits {logits} have {experts} experts")
        weights = logits.with_shape(axes["batch"], axes["seq"], self.k)
        return weights, weights.with_dtype(i32)

    def reference(self, logits: Array) -> tuple[Array, Array]:
        f = wide(logits)
        p = np.exp(f - f.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        ids = np.argsort(-f, axis=-1, kind="stable")[..., : self.k]
        weights = np.take_along_axis(p, ids, axis=-1)
        if self.normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights.astype(logits.dtype), ids.astype(np.int32)

    def torch(self, torch: Any, logits: Any) -> Any:
        f = wide_tensor(torch, logits)
        ids = f.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        weights = f.softmax(-1).gather(-1, ids)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(logits.dtype), ids.to(torch.int32)

    def onnx(self, b: Any, logits: str) -> Any:
        f = b.wide(logits)
        top, ids = b.TopK(f, b.reshape(b.attribute("k"), 1), axis=-1, largest=1, sorted=1, outputs=2)
        highest = b.slice(top, -1, 0, 1)
        weights = b.Exp(b.Sub(top, highest))
        whole = weights if self.normalize else b.Exp(b.Sub(f, highest))
        return b.narrow(b.Div(weights, b.ReduceSum(whole, b.ints(-1), keepdims=1)), logits), b.cast(ids, i32)

    def cost(self, logits: TensorType) -> Cost:
        return Cost(5 * logits.elements(), self.moved_bytes(logits))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        experts = draw.size(20)
        logits = draw.normal(draw.integer(1, 3), draw.size(), experts).clip(-30, 30)
        if draw.choice(False, True):
            logits = np.round(logits * 2) / 2
        k = draw.choice(draw.integer(1, experts), experts)
        return Case(cls(k, normalize=draw.choice(True, False)), (logits,))


class MoEExperts(Op):
    """y = sum_j weights_j * down[e] swiglu(gate_up[e] x) with e = ids_j; in the model dtype, the sum in float32.

    x [batch, seq, H]; weights, ids [batch, seq, k]; gate_up [E, 2 I, H] (gate rows, then up rows); down [E, H, I]. Quantised
    experts mean what ``dequantize`` makes of them in the dtype of x, those in bfloat16 their numbers widened to that."""

    name: ClassVar[str] = "moe_experts"
    sharding: ClassVar[str] = "b s h!, b s k!, b s k!, e! (2 i) h!, e! h! i -> b s h!"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("x", "weights", "ids")),)

    def infer(self, x: TensorType, weights: TensorType, ids: TensorType, gate_up: TensorType, down: TensorType) -> TensorType:
        dtype = floating("x", x)
        axes = Axes()
        axes.bind("x", x, "batch seq hidden")
        axes.bind("weights", weights, "batch seq k")
        axes.bind("ids", ids, "batch seq k")
        axes.bind("down", down, "experts hidden intermediate")
        axes.bind("gate_up", gate_up, "experts 2*intermediate hidden")
        fits = axes["2*intermediate"] == 2 * axes.number("intermediate")
        require(fits, f"gate_up {gate_up} should have twice as many rows an expert as down {down} has columns")
        has_dtype("ids", ids, i32, "for expert ids")
        has_dtype("weights", weights, dtype, "as x")
        is_weight("gate_up", gate_up, dtype)
        is_weight("down", down, dtype)
        return x

    def reference(
        self, x: Array, weights: Array, ids: Array, gate_up: Array | QuantizedArray, down: Array | QuantizedArray
    ) -> Array:
        gate_up, down = plain(gate_up, x.dtype), plain(down, x.dtype)
        y = np.zeros(x.shape, wide(x).dtype)
        for expert in np.unique(ids):
            batch, seq, rank = np.nonzero(ids == expert)
            both = (wide(x[batch, seq]) @ wide(gate_up[expert]).T).astype(x.dtype)
            gate, up = np.split(both, 2, axis=-1)
            hidden = precision.silu(gate) * up
            result = (wide(hidden) @ wide(down[expert]).T).astype(x.dtype)
            np.add.at(y, (batch, seq), wide(weights[batch, seq, rank][:, None] * result))
        return y.astype(x.dtype)

    def torch(self, torch: Any, x: Any, weights: Any, ids: Any, gate_up: Any, down: Any) -> Any:
        gate_up, down = plain_tensor(torch, gate_up, x.dtype), plain_tensor(torch, down, x.dtype)
        rows = x.flatten(0, 1)
        y = wide_tensor(torch, torch.zeros_like(rows))
        for expert in range(gate_up.shape[0]):
            row, rank = torch.nonzero(ids.flatten(0, 1) == expert, as_tuple=True)
            gate, up = torch.nn.functional.linear(rows[row], gate_up[expert]).chunk(2, dim=-1)
            result = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[expert])
            y = y.index_add(0, row, (weights.flatten(0, 1)[row, rank, None] * result).to(y.dtype))
        return y.to(x.dtype).unflatten(0, x.shape[:2])

    def onnx(self, b: Any, x: str, weights: str, ids: str, gate_up: str, down: str) -> Any:
        """A loop over the experts that some token chose: its tokens are gathered, and its results added where they belong."""
        hidden, k = b.type(x).shape[-1], b.type(ids).shape[-1]
        rows = b.reshape(x, -1, hidden)
        chosen, shares = b.cast(b.reshape(ids, -1, k), i64), b.reshape(weights, -1, k)
        hit = b.Unique(b.cast(b.reshape(ids, -1), i64), outputs=1)
        wider = b.wide(rows)
        start = b.Mul(wider, b.like(0.0, wider))

        def expert(b: Any, number: str, sums: str) -> tuple[str]:
            which = b.Gather(hit, number, axis=0)
            places = b.Transpose(b.NonZero(b.Equal(chosen, which)), perm=[1, 0])
            row = b.slice(places, 1, 0, 1)
            own = b.GatherND(rows, row)
            both = b.narrow(b.Gemm(b.wide(own), b.wide(b.Gather(gate_up, which, axis=0)), transB=1), x)
            gate, up = b.Split(both, axis=-1, num_outputs=2, outputs=2)
            f = b.wide(gate)
            inner = b.Mul(b.narrow(b.silu(f), x), up)
            made = b.narrow(b.Gemm(b.wide(inner), b.wide(b.Gather(down, which, axis=0)), transB=1), x)
            share = b.Unsqueeze(b.GatherND(shares, places), b.ints(-1))
            return (b.ScatterND(sums, row, b.wide(b.Mul(made, share)), reduction="add"),)

        (sums,) = b.loop(expert, b.reshape(b.Size(hit)), states=[(start, b.kind(start, 2))])
        return b.narrow(b.Reshape(sums, b.Shape(x)), x)

    def reads(
        self, x: TensorType, weights: TensorType, ids: TensorType, gate_up: TensorType, down: TensorType
    ) -> dict[str, Fraction]:
        return dict.fromkeys(("gate_up", "down"), Fraction(ids.with_shape(ids.shape[2]).static_shape()[0], down.static_shape()[0]))

    def cost(self, x: TensorType, weights: TensorType, ids: TensorType, gate_up: TensorType, down: TensorType) -> Cost:
        """FLOPs of the routed tokens; bytes of the experts that they reach if every expert is as likely. Where the number of tokens
        is not known, those of all experts."""
        flops = 2 * ids.elements() * 3 * down.shape[1] * down.shape[2]
        experts, moved = down.static_shape()[0], self.moved_bytes(x, weights, ids, gate_up, down)
        chosen, tokens, stacked = ids.shape[2], ids.shape[0] * ids.shape[1], gate_up.nbytes() + down.nbytes()
        if isinstance(chosen, int) and isinstance(tokens, int) and isinstance(stacked, int):
            moved = moved - round((1 - chosen / experts) ** tokens * stacked)
        return Cost(flops, moved)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, seq, experts = draw.integer(1, 3), draw.size(), draw.size(9)
        hidden, inner = draw.size(17), draw.size(17)
        k = draw.choice(draw.integer(1, experts), experts)
        ids = np.argsort(draw.uniform(0.0, 1.0, batch, seq, experts), axis=-1)[..., :k]
        if draw.choice(False, True):
            ids = np.broadcast_to(ids[:1, :1], ids.shape).copy()
        gate_up = draw.normal(experts, 2 * inner, hidden) / np.sqrt(hidden)
        down = draw.normal(experts, hidden, inner) / np.sqrt(inner)
        x, weights = draw.normal(batch, seq, hidden), draw.uniform(0.0, 1.0, batch, seq, k)
        stored, dtypes = draw_stored(draw, gate_up, down)
        return Case(cls(), (x, weights, ids.astype(np.int32), *stored), (None, None, None, *dtypes))
