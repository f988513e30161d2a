"""Every op's ONNX lowering, in every profile, beside its float64 definition: on ONNX Runtime with all optimisations and with none,
and on the reference evaluator of the package onnx."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom.backends.onnx.functions import domains_of
from deltaloom.backends.onnx.profiles import ALL, CONTRIB, Profile, profile
from deltaloom.graph.distance import distance
from deltaloom.graph.errors import ExportError
from deltaloom.graph.interpret import type_of
from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.graph.types import bool_, f32, i32, i64
from deltaloom.ops.fused import Fused
from deltaloom.ops.serving import ServingForm
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.evaluate import concrete, draw_case, in_float64, reference
from deltaloom.testing.onnx_rule import EVALUATOR, EVERYTHING, NOTHING, op_model, run_model

POINTWISE, SUMS, DELTA, SEVERAL = 2e-6, 1e-5, 1e-5, 5e-5
"""Largest error relative to the largest element, in float32, whose unit is 6e-8. Pointwise ops, norms, RoPE and routing: some 30
roundings. Products: as many again, for sums in another order, and scores of attention that are large cancel in the exponential.
The delta rule: its state carries the roundings of every position on; where keys are nearly equal, it subtracts what it added.
Ops that are several: the error of each goes on into the next, and norms divide by small numbers."""

LIMITS = {"causal_conv1d": SUMS, "linear": SUMS, "attention": SUMS, "moe_experts": SUMS, "gated_delta_rule": DELTA}
TOKENS = (1, 4, 5, 15, 16, 17, 63, 64, 65)
FEW = (1, 5, 16, 65)
"""Those of ``TOKENS`` that the quick tests take: both forms of the delta rule, and a last chunk that is full or one position."""
KINDS = (f32, i32, i64, bool_)


def exportable() -> list[type[Op]]:
    return [op for op in ops.built_in() if op.onnx is not None or issubclass(op, Fused) and not issubclass(op, ServingForm)]


def check(op: Op, arrays: tuple[Any, ...], used: Profile, limit: float) -> None:
    """Every way to run the op is within ``limit`` of its definition in float64."""
    model = op_model(op, tuple(map(type_of, arrays)), used)
    truth = reference(op, in_float64(arrays))
    for how in (EVERYTHING, NOTHING, *(() if used.contrib else (EVALUATOR,))):
        results = run_model(model, arrays, how)
        assert len(results) == len(truth)
        for position, (found, true) in enumerate(zip(results, truth, strict=True)):
            assert found.shape == true.shape, f"{op.name}, {used}, {how}: output {position} is {found.shape}, not {true.shape}"
            if true.dtype.kind in "iub":
                assert np.array_equal(found, true), f"{op.name}, {used}, {how}: output {position} differs"
            else:
                error = distance(found, true)
                assert error <= limit, f"{op.name}, {used}, {how}: output {position} is {error:.2g} off, allowed {limit:.2g}"


def drawn(op: type[Op], seeds: range) -> Iterator[tuple[Op, tuple[Any, ...]]]:
    """Cases of the op in float32."""
    for seed in seeds:
        case = draw_case(op, SeededDraw(seed))
        arrays = concrete(case, f32)
        types = tuple(map(type_of, arrays))
        if all(type_.dtype in KINDS for type_ in (*types, *case.op.output_types(*types))):
            yield case.op, arrays


def compare_drawn(op: type[Op], used: Profile, seeds: range, most: int) -> None:
    cases = list(islice(drawn(op, seeds), most))
    assert cases, f"no case of {op.name} among {len(seeds)} is of float32 alone"
    for instance, arrays in cases:
        check(instance, arrays, used, LIMITS.get(op.name, SEVERAL if issubclass(op, Fused) else POINTWISE))


each_op = pytest.mark.parametrize("op", exportable(), ids=lambda op: op.name)
each_profile = pytest.mark.parametrize("used", ALL, ids=str)


@each_op
@each_profile
def test_drawn_cases(op: type[Op], used: Profile) -> None:
    compare_drawn(op, used, range(40), 6)


@pytest.mark.slow
@each_op
@each_profile
def test_many_drawn_cases(op: type[Op], used: Profile) -> None:
    compare_drawn(op, used, range(40, 200), 50)


def normal(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def delta_case(batch: int, seq: int, *, near: bool) -> tuple[Op, tuple[Any, ...]]:
    """``near``: keys that are nearly equal, no decay to speak of, and beta of nearly 1, which subtracts all that was added."""
    rng = np.random.default_rng(seq * 10 + batch)
    heads, key_heads, width = 4, 2, 16
    q, k = normal(rng, batch, seq, key_heads, width), normal(rng, batch, seq, key_heads, width)
    decay, beta = -rng.uniform(0, 2, (batch, seq, heads)), rng.uniform(0, 1, (batch, seq, heads))
    if near:
        k = k[:, :1] + 1e-3 * k
        decay, beta = decay * 1e-4, 1 - 1e-3 * beta
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    state = normal(rng, batch, heads, width, width)
    arrays = (q, k, normal(rng, batch, seq, heads, width), decay.astype(np.float32), beta.astype(np.float32), state)
    return ops.get("gated_delta_rule")(scale=width**-0.5), arrays


def attention_case(batch: int, seq: int, past: int, *, padded: bool) -> tuple[Op, tuple[Any, ...]]:
    """``padded``: rows begin with padding, the first with more than its past, so that some positions see nothing."""
    rng = np.random.default_rng(seq * 10 + past + batch)
    q, k, v = normal(rng, batch, seq, 4, 8), normal(rng, batch, seq, 2, 8), normal(rng, batch, seq, 2, 6)
    caches = normal(rng, batch, 2, past, 8), normal(rng, batch, 2, past, 6)
    valid = np.ones((batch, past + seq), bool)
    for row in range(batch):
        valid[row, : max(0, min(past + seq - 1, past + 2 - row))] = False
    return ops.get("attention")(scale=8**-0.5), (q, k, v, *caches, *((valid,) if padded else ()))


def conv_case(batch: int, seq: int) -> tuple[Op, tuple[Any, ...]]:
    rng = np.random.default_rng(seq + batch)
    return ops.get("causal_conv1d")("silu"), (normal(rng, batch, seq, 6), normal(rng, 6, 1, 4), normal(rng, batch, 6, 3))


def experts_case(batch: int, seq: int, chosen: tuple[int, ...]) -> tuple[Op, tuple[Any, ...]]:
    """Of 8 experts only ``chosen`` get tokens."""
    rng = np.random.default_rng(seq + batch)
    ids = np.broadcast_to(np.array(chosen, np.int32), (batch, seq, len(chosen))).copy()
    shares = rng.uniform(0, 1, ids.shape).astype(np.float32)
    arrays = (normal(rng, batch, seq, 12), shares, ids, normal(rng, 8, 20, 12) / 4, normal(rng, 8, 12, 10) / 4)
    return ops.get("moe_experts")(), arrays


def stateful(batch: int, seq: int, past: int) -> Iterator[tuple[Op, tuple[Any, ...]]]:
    yield attention_case(batch, seq, past, padded=False)
    yield attention_case(batch, seq, past, padded=True)
    if past:
        return
    yield delta_case(batch, seq, near=False)
    yield delta_case(batch, seq, near=True)
    yield conv_case(batch, seq)
    yield experts_case(batch, seq, (3,))
    yield experts_case(batch, seq, (7, 0))


@each_profile
@pytest.mark.parametrize("seq", FEW)
@pytest.mark.parametrize("past", [0, 7])
def test_lengths(seq: int, past: int, used: Profile) -> None:
    for op, arrays in stateful(1 if seq == 1 else 3, seq, past):
        check(op, arrays, used, LIMITS[op.name])


@pytest.mark.slow
@each_profile
@pytest.mark.parametrize("seq", TOKENS)
@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_lengths(batch: int, seq: int, past: int, used: Profile) -> None:
    for op, arrays in stateful(batch, seq, past):
        check(op, arrays, used, LIMITS[op.name])


NEWER = {
    "rms_norm": ("RMSNormalization", 24),
    "gated_rms_norm": ("RMSNormalization", 24),
    "rope": ("RotaryEmbedding", 24),
    "attention": ("Attention", 24),
    "gated_delta_rule": ("LinearAttention", 27),
    "causal_conv1d": ("CausalConvWithState", 27),
}
"""Op -> the newer standard op that does it, and from which opset on we use it."""


def op_types(nodes: Any) -> set[str]:
    found = {node.op_type for node in nodes}
    return found.union(*(op_types(attribute.g.node) for node in nodes for attribute in node.attribute))


@each_profile
@pytest.mark.parametrize("name", NEWER)
def test_a_profile_uses_what_it_has_and_nothing_else(name: str, used: Profile) -> None:
    instance, arrays = conv_case(1, 5) if name == "causal_conv1d" else next(drawn(ops.get(name), range(20)))
    model = op_model(instance, tuple(map(type_of, arrays)), used)
    (body,) = model.functions
    wanted, since = NEWER[name]
    own = used.contrib and name in ("gated_delta_rule", "causal_conv1d")
    assert (wanted in op_types(body.node)) == (used.opset >= since or own)
    assert (CONTRIB in domains_of(body.node)) == own
    assert {one.domain: one.version for one in model.opset_import}[""] == used.opset and model.ir_version == used.ir_version
    assert body.doc_string and body.domain == "deltaloom" and body.name == type(instance).__name__


@pytest.mark.parametrize(
    ("name", "opset", "said"),
    [
        ("portable", 22, "opset is 22, but profile 'portable' is written for 21; leave opset out, or take another profile"),
        ("modern", 21, "opset is 21, but profile 'modern' is written for 24 or 27"),
        ("modern", True, "opset is True, but"),
        ("ort", 27, "is written for 21"),
        ("newest", None, "profile is 'newest', expected portable, modern, ort"),
    ],
)
def test_other_opsets_are_refused(name: str, opset: int | None, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        profile(name, opset)


@each_profile
def test_without_functions_the_results_are_the_same_bits(used: Profile) -> None:
    op, arrays = delta_case(3, 17, near=False)
    flat, block = (op_model(op, tuple(map(type_of, arrays)), used, functions=functions) for functions in (False, True))
    assert not flat.functions and block.functions
    for left, right in zip(run_model(flat, arrays), run_model(block, arrays), strict=True):
        np.testing.assert_array_equal(left, right)
