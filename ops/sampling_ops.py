"""The choice of a token as ops, for programs that sample on their device; the arithmetic is that of ``sampling`` and ``philox``."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Draw, Op
from deltaloom.graph.types import TensorType, bool_, f32, i32, i64
from deltaloom.ops import philox, sampling
from deltaloom.ops.laws import PermutationEquivariant
from deltaloom.ops.precision import wide_dtype
from deltaloom.ops.signature import Axes, floating, has_dtype, integral

WORD = 0xFFFFFFFF
MULTIPLIERS = int(philox.MULTIPLIER_0), int(philox.MULTIPLIER_1)
KEY_STEPS = int(philox.KEY_STEP_0), int(philox.KEY_STEP_1)


class PhiloxUniform(Op):
    """u = upper 24 bits of the first word of Philox4x32-10(key seed, counter (position, sample_index, purpose)) / 2^24, exact.

    seed, sample_index, position i64 [rows] give f32 [rows] in [0, 1)."""

    name: ClassVar[str] = "philox_uniform"
    sharding: ClassVar[str] = "r, r, r -> r"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("seed", "sample_index", "position")),)
    purpose: int = 0

    def infer(self, seed: TensorType, sample_index: TensorType, position: TensorType) -> TensorType:
        axes = Axes()
        for name, type_ in (("seed", seed), ("sample_index", sample_index), ("position", position)):
            axes.bind(name, type_, "rows")
            has_dtype(name, type_, i64, "for the generator")
        require(0 <= self.purpose <= WORD, f"purpose is {self.purpose}, expected a number of 32 bits")
        return seed.with_dtype(f32)

    def reference(self, seed: Array, sample_index: Array, position: Array) -> Array:
        drawn = philox.uniform(seed.view(np.uint64), sample_index.astype(np.uint32), position.view(np.uint64), self.purpose)
        return drawn.astype(np.float32)

    def torch(self, torch: Any, seed: Any, sample_index: Any, position: Any) -> Any:
        purposes = torch.full_like(seed, self.purpose)
        counter = [position & WORD, position >> 32 & WORD, sample_index & WORD, purposes]
        key = [seed & WORD, seed >> 32 & WORD]
        for _ in range(philox.ROUNDS):
            high0, low0 = _product(MULTIPLIERS[0], counter[0])
            high1, low1 = _product(MULTIPLIERS[1], counter[2])
            counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
            key = [(word + step) & WORD for word, step in zip(key, KEY_STEPS)]
        return (counter[0] >> 8).to(torch.float32) * 2.0**-24

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        rows = draw.size()
        seed = draw.integers(-(2**63), 2**63 - 2, rows)
        sample_index = draw.integers(0, 2**32 - 1, rows)
        position = draw.integers(0, draw.choice(1000, 2**40), rows)
        return Case(cls(purpose=draw.choice(0, 1, 2)), (seed, sample_index, position))


class PenalizeLogits(Op):
    """Logits of seen tokens divided (positive) or multiplied by repetition; minus frequency a count, minus presence once.

    In float64, rounded once to float32. logits [rows, vocab]; seen bool, output_counts i32 alike; the others [rows]."""

    name: ClassVar[str] = "penalize_logits"
    sharding: ClassVar[str] = "r v, r v, r v, r, r, r -> r v"
    laws: ClassVar[tuple[Any, ...]] = (
        PermutationEquivariant(("logits", "seen", "output_counts", "repetition", "presence", "frequency")),
    )

    def infer(
        self,
        logits: TensorType,
        seen: TensorType,
        output_counts: TensorType,
        repetition: TensorType,
        presence: TensorType,
        frequency: TensorType,
    ) -> TensorType:
        axes = Axes()
        axes.bind("logits", logits, "rows vocab")
        axes.bind("seen", seen, "rows vocab")
        has_dtype("seen", seen, bool_, "for a mask")
        axes.bind("output_counts", output_counts, "rows vocab")
        has_dtype("output_counts", output_counts, i32, "for counts")
        for name, type_ in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
            axes.bind(name, type_, "rows")
            floating(name, type_)
        return logits.with_dtype(wide_dtype(floating("logits", logits)))

    def reference(
        self, logits: Array, seen: Array, output_counts: Array, repetition: Array, presence: Array, frequency: Array
    ) -> Array:
        scores, *strengths = (x.astype(np.float64) for x in (logits, repetition, presence, frequency))
        penalised = sampling.apply_penalties(scores, seen, output_counts, *strengths)
        return penalised.astype(np.promote_types(logits.dtype, np.float32))

    def torch(
        self, torch: Any, logits: Any, seen: Any, output_counts: Any, repetition: Any, presence: Any, frequency: Any
    ) -> Any:
        scores = logits.to(torch.float64)
        strength = repetition.to(torch.float64)[:, None]
        scores = torch.where(seen, torch.where(scores > 0, scores / strength, scores * strength), scores)
        scores = scores - frequency.to(torch.float64)[:, None] * output_counts
        scores = scores - presence.to(torch.float64)[:, None] * (output_counts > 0)
        return scores.to(torch.promote_types(logits.dtype, torch.float32))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        rows, vocab = draw.size(), draw.size(70)
        counts = draw.integers(0, 3, rows, vocab).astype(np.int32) * draw.choice(1, 0)
        seen = (draw.integers(0, 1, rows, vocab) == 1) | (counts > 0)
        strengths = (draw.uniform(0.5, 2.0, rows), draw.uniform(-2.0, 2.0, rows), draw.uniform(-2.0, 2.0, rows))
        return Case(cls(), (draw.normal(rows, vocab), seen, counts, *strengths), (None, None, None, f32, f32, f32))


class SampleToken(Op):
    """The id where the cumulated softmax(logits / temperature) passes uniform, of those that top_k, top_p, min_p leave; float64.

    logits [rows, vocab]; uniform, temperature > 0, top_p, min_p float [rows]; top_k int [rows], 0 for all; gives i32 [rows]."""

    name: ClassVar[str] = "sample_token"
    sharding: ClassVar[str] = "r v!, r, r, r, r, r -> r"
    laws: ClassVar[tuple[Any, ...]] = (
        PermutationEquivariant(("logits", "uniform", "temperature", "top_k", "top_p", "min_p")),
    )

    def infer(
        self,
        logits: TensorType,
        uniform: TensorType,
        temperature: TensorType,
        top_k: TensorType,
        top_p: TensorType,
        min_p: TensorType,
    ) -> TensorType:
        axes = Axes()
        axes.bind("logits", logits, "rows vocab")
        floating("logits", logits)
        for name, type_ in (("uniform", uniform), ("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
            axes.bind(name, type_, "rows")
            floating(name, type_)
        axes.bind("top_k", top_k, "rows")
        integral("top_k", top_k)
        return TensorType(i32, (axes["rows"],))

    def reference(
        self, logits: Array, uniform: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array
    ) -> Array:
        scores, uniforms, temperatures, nucleus, least = (
            x.astype(np.float64) for x in (logits, uniform, temperature, top_p, min_p)
        )
        scaled = sampling.scale_by_temperature(scores, temperatures)
        kept = sampling.filter_top_k_top_p_min_p(scaled, top_k.astype(np.int64), nucleus, least)
        return sampling.draw(kept, uniforms).astype(np.int32)

    def torch(
        self, torch: Any, logits: Any, uniform: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any
    ) -> Any:
        columns = [x.to(torch.float64)[:, None] for x in (uniform, temperature, top_p, min_p)]
        uniforms, temperatures, nucleus, least = columns
        scores = logits.to(torch.float64)
        ranked = ((scores - scores.amax(-1, keepdim=True)) / temperatures).sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(logits.shape[1], device=logits.device)
        limit = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
        weights = ranked.values.exp().masked_fill(ranks >= limit, 0)
        short = (weights.cumsum(-1) < nucleus * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        kept = ((ranks <= short) | (nucleus >= 1)) & (weights >= least)
        mass = torch.zeros_like(scores).scatter(-1, ranked.indices, weights.masked_fill(~kept, 0))
        cumulative = mass.cumsum(-1)
        chosen = (cumulative <= uniforms * cumulative[:, -1:]).sum(-1)
        last = torch.where(mass > 0, ranks, 0).amax(-1)
        return torch.minimum(chosen, last).to(torch.int32)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        rows, vocab = draw.size(), draw.size(70)
        logits = draw.normal(rows, vocab)
        if draw.choice(False, True):
            logits = np.round(logits)
        temperature = draw.uniform(0.1, 2.0, rows)
        top_k = draw.integers(0, vocab + 1, rows).astype(np.int32) * draw.choice(1, 0)
        top_p = np.minimum(draw.uniform(0.05, 1.5, rows), 1.0)
        min_p = np.maximum(draw.uniform(-0.5, 0.5, rows), 0.0)
        arrays = (logits, draw.uniform(0.0, 1.0, rows) * (1 - 2.0**-20), temperature, top_k, top_p, min_p)
        return Case(cls(), arrays, (None, f32, f32, None, f32, f32))


class ArgmaxToken(Op):
    """The id of the largest logit of each row, the lowest of equal ones: logits [rows, vocab] give i32 [rows]."""

    name: ClassVar[str] = "argmax_token"
    sharding: ClassVar[str] = "r v! -> r"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("logits",)),)

    def infer(self, logits: TensorType) -> TensorType:
        floating("logits", logits)
        axes = Axes()
        axes.bind("logits", logits, "rows vocab")
        return TensorType(i32, (axes["rows"],))

    def reference(self, logits: Array) -> Array:
        ids: Array = logits.argmax(axis=-1).astype(np.int32)
        return ids

    def torch(self, torch: Any, logits: Any) -> Any:
        best = logits == logits.amax(-1, keepdim=True)
        ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
        return torch.where(best, ids, logits.shape[1]).amin(-1).to(torch.int32)

    def onnx(self, b: Any, logits: str) -> Any:
        return b.cast(b.ArgMax(logits, axis=1, keepdims=0), i32)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        logits = draw.normal(draw.size(), draw.size(70))
        return Case(cls(), (draw.choice(logits, np.round(logits)),))


def _product(factor: int, x: Any) -> tuple[Any, Any]:
    """High and low 32 bits of ``factor * x`` for 32-bit numbers in int64, 16 bits of ``x`` at a time so that nothing overflows."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & WORD
