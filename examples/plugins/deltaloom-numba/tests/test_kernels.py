"""Sizes that the generated cases do not reach: many tiles, many rows, threads that share the work, weights that lie in a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltaloom_numba import delta_net, experts, linear, loops, table

import deltaloom
from deltaloom.backends.numpy import threads
from deltaloom.graph.types import bf16
from deltaloom.ops.fused_delta_net import GatedDeltaNet
from deltaloom.ops.linear import Linear
from deltaloom.ops.moe import MoEExperts
from deltaloom.testing import SeededDraw

RNG = np.random.default_rng(0)


@pytest.fixture(params=[1, 3])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many threads, which share work of any size."""
    monkeypatch.setattr(table, "STREAM", 0)
    monkeypatch.setattr(linear, "WORK", 0)
    before = threads.pool()
    yield threads.use_threads(request.param).n
    threads.use_threads(before.n)


def numbers(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def narrow(*shape: int) -> Any:
    return numbers(*shape).astype(bf16.numpy)


def in_float64(*arrays: Any) -> list[Any]:
    return [array.astype(np.float64) if array.dtype.kind != "i" else array for array in arrays]


@pytest.mark.parametrize("rows", [1, linear.FEW_ROWS, linear.FEW_ROWS + 1, 40])
@pytest.mark.parametrize("shape", [(1, 1), (2113, 513), (3, 300_000)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_any_size_is_the_reference(rows: int, shape: tuple[int, int], bias: bool, pool: int) -> None:
    weight, x, more = narrow(*shape), numbers(1, rows, shape[1]), [numbers(shape[0])] if bias else []
    want = Linear().reference(*in_float64(x, weight, *more))
    found = linear.linear(Linear(), x, weight, *more)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.sqrt(shape[1]))
    out = np.full(found.shape, np.nan, np.float32)
    assert linear.linear(Linear(), x, weight, *more, out=out) is out
    np.testing.assert_array_equal(out, found)


def test_a_weight_may_lie_in_a_file(tmp_path: Path) -> None:
    weight, x = narrow(70, 33), numbers(1, 1, 33)
    weight.view(np.uint16).tofile(tmp_path / "weight")
    mapped = np.memmap(tmp_path / "weight", np.uint16, mode="r", shape=(70, 33)).view(bf16.numpy)
    np.testing.assert_array_equal(linear.linear(Linear(), x, mapped), linear.linear(Linear(), x, weight))


def test_a_weight_and_an_input_may_be_views() -> None:
    weight, x = narrow(33, 70).T, numbers(33, 2).T[None]
    found = linear.linear(Linear(), x, weight)
    np.testing.assert_array_equal(found, linear.linear(Linear(), x.copy(), weight.copy(order="C")))


def test_all_bits_are_widened_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    out = np.empty(bits.shape, np.float32)
    loops.widen(bits, out)
    np.testing.assert_array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.parametrize("tokens", [1, 3, linear.FEW_ROWS, linear.FEW_ROWS + 1, 70])
def test_experts_are_the_reference_whoever_shares_them(tokens: int, pool: int) -> None:
    gate_up, down = narrow(9, 192, 256), narrow(9, 256, 96)
    x, weights = numbers(1, tokens, 256), RNG.random((1, tokens, 4)).astype(np.float32)
    ids = np.argsort(RNG.random((1, tokens, 9)), axis=-1)[..., :4].astype(np.int32)
    want = MoEExperts().reference(*in_float64(x, weights, ids, gate_up, down))
    found = experts.moe_experts(MoEExperts(), x, weights, ids, gate_up, down)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_a_step_has_the_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "STREAM", 0)
    gate_up, down, shared = narrow(9, 192, 256), narrow(9, 256, 96), (narrow(64, 256), narrow(256, 32))
    x, weights, gate = numbers(2, 1, 256), RNG.random((2, 1, 4)).astype(np.float32), numbers(2, 1, 1)
    ids = np.argsort(RNG.random((2, 1, 9)), axis=-1)[..., :4].astype(np.int32)
    before, found = threads.pool(), []
    for count in (1, 2, 5):
        threads.use_threads(count)
        found.append(experts.shared_moe(MoEExperts(), x, weights, ids, gate, gate_up, down, *shared))
    threads.use_threads(before.n)
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    other = ids.argsort(axis=-1)
    sorted_ = [np.take_along_axis(array, other, axis=-1) for array in (weights, ids)]
    again = experts.shared_moe(MoEExperts(), x, *sorted_, gate, gate_up, down, *shared)
    assert again.tobytes() == found[0].tobytes(), "the order in which experts were chosen matters"


def test_many_steps_of_the_delta_net_are_the_reference(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that are views of others, as a prefill leaves that of the convolution, and then those that the steps leave."""
    monkeypatch.setattr(delta_net, "STEP_WORK", 0)
    drawn = map(GatedDeltaNet.cases, map(SeededDraw, range(999)))
    case = next(c for c in drawn if len(c.arrays[0]) == 3 and c.op.key_heads > 2 and c.arrays[1].shape[2] == 4)
    projected, taps, *rest, conv, delta = case.arrays
    wide, exact = [part.astype(np.float32) for part in rest], [part.astype(np.float64) for part in rest]
    # Numbers with gaps between them: every other column and row of an array twice as large.
    states = (conv.astype(np.float32).repeat(2, -1)[..., ::2], delta.astype(np.float32).repeat(2, 1)[:, ::2])
    truth = (conv, delta)
    for _ in range(20):
        step = numbers(len(projected), 1, projected.shape[-1])
        want, *truth = case.op.reference(step.astype(np.float64), taps, *exact, *truth)
        stored = np.ascontiguousarray(taps.transpose(2, 1, 0), np.float32)
        found, *states = delta_net.delta_net_step(case.op, step, stored, *wide, *states)
        for one, other in zip((found, *states), (want, *truth), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


def test_a_model_runs_on_it_and_shows_who_runs_what() -> None:
    """The bundled checkpoint is in bfloat16, so weights that are stored so change nothing."""
    ids = [[5, 9, 11, 40, 17, 300]]
    narrowed, plain = (
        deltaloom.load("tiny-next", backend="numba", config=deltaloom.CompileConfig(threads=1, quantise=how))
        for how in ("bf16", {})
    )
    wanted = deltaloom.load("tiny-next", backend="numpy").forward(ids).logits
    for model in (narrowed, plain):
        state = model.new_state(1)
        rows = [model.forward([ids[0][:3]], state=state).logits, *(model.forward([[i]], state=state).logits for i in ids[0][3:])]
        np.testing.assert_allclose(np.concatenate(rows, axis=1), wanted, atol=1e-4)

    graphs = deltaloom.build_graph("tiny-next")
    compiled = deltaloom.compile(graphs.main, deltaloom.CompileConfig(backends=("numba",), quantise="bf16"))
    chosen = {row.op: row.kernel for row in compiled.explain("decode")}
    assert chosen["linear"] == "numba.linear" and chosen["shared_moe"] == "numba.shared_moe"
    assert chosen["gated_delta_net"] == "numba.delta_net_step" and chosen["add_rms_norm"] == "numba.numpy.add_rms_norm"
    compiled = deltaloom.compile(graphs.main, deltaloom.CompileConfig(backends=("numba",)))
    row = next(row for row in compiled.explain("decode") if row.op == "linear")
    assert row.kernel == "numba.numpy.linear" and "--quantise bf16" in row.refusals[0].reason
