"""The NumPy attention kernels over caches with room, against the float64 reference, at block borders and in bounded memory."""

import tracemalloc

import numpy as np
import pytest

import deltaloom.ops  # noqa: F401 - fills the registry
from deltaloom.backends.numpy import attention, elementwise
from deltaloom.backends.numpy.threads import use_threads
from deltaloom.ops.attention import Attention
from deltaloom.ops.fused_attention import GatedAttention
from deltaloom.passes.kernel import Appended
from deltaloom.testing.evaluate import reference


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    yield use_threads(request.param)
    use_threads(None)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 4)
    monkeypatch.setattr(attention, "KEYS", 8)


def check(batch, past, seq, heads, repeats, width, value_width, valid=None, kernel=attention.attention_blocks, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = normal(batch, seq, heads * repeats, width), normal(batch, seq, heads, width), normal(batch, seq, heads, value_width)
    caches = [normal(batch, heads, past, width), normal(batch, heads, past, value_width)]
    op = Attention(scale=width**-0.5)
    given = [] if valid is None else [valid]
    wide = [array.astype(np.float64) for array in (q, k, v, *caches)]
    with np.errstate(all="ignore"):
        want = op.reference(*wide, *given)
    states = []
    for cache in caches:
        data = np.full((batch, heads, past + seq + 5, cache.shape[3]), np.nan, np.float32)
        data[:, :, :past] = cache
        states.append(Appended(data, past))
    out = kernel(op, q, k, v, *states, *given)
    assert out.shape == want[0].shape and out.dtype == np.float32
    assert np.abs(out - want[0]).max() < 3e-6
    for state, expected in zip(states, want[1:]):
        assert np.array_equal(state.data[:, :, : past + seq], expected.astype(np.float32))
        assert np.isnan(state.data[:, :, past + seq :]).all()
    return out


@pytest.mark.parametrize("past", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("seq", [1, 2, 3, 4, 5, 8, 9, 17])
def test_blocks(small_blocks, past, seq):
    check(2, past, seq, 2, 3, 5, 7, seed=seq)


@pytest.mark.parametrize("past, seq", [(0, 11), (5, 9), (20, 6), (3, 1)])
def test_any_mask(small_blocks, past, seq):
    for seed in range(10):
        valid = np.random.default_rng(seed).random((3, past + seq)) < (seed + 1) / 11
        valid[0] = seed % 2
        out = check(3, past, seq, 2, 2, 8, 8, valid, seed=seed)
        for row in range(seq):
            if not valid[0, : past + row + 1].any():
                assert np.all(out[0, row] == 0)


@pytest.mark.parametrize("past", [0, 1, 40, 700])
@pytest.mark.parametrize("masked", [None, "left", "all", "none"])
def test_one_token(past, masked):
    valid = None
    if masked is not None:
        valid = np.ones((2, past + 1), bool)
        valid[1, : past // 2] = masked != "left"
        valid[1] &= masked != "all"
    out = check(2, past, 1, 2, 4, 16, 12, valid, attention.attention_step)
    if masked == "all":
        assert np.all(out[1] == 0) and np.any(out[0] != 0)


def test_large_calls_over_threads():
    check(1, 700, 130, 3, 2, 32, 32)
    check(1, 40_000, 1, 3, 2, 64, 64, kernel=attention.attention_step)


def test_a_gate_of_many_rows_is_applied_block_by_block(monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK", 64)
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, 9, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    gate = rng.standard_normal((2, 9, 64)).astype(np.float32)
    caches = [np.zeros((2, 2, 0, 16), np.float32)] * 2
    states = [Appended(np.empty((2, 2, 9, 16), np.float32), 0) for _ in caches]
    op = GatedAttention(scale=0.25)
    wide = [array.astype(np.float64) for array in (q, k, v, gate, *caches)]
    found = attention.gated_attention_blocks(op, q, k, v, gate, *states)
    np.testing.assert_allclose(found, reference(op, wide)[0], atol=1e-5)


def test_large_scores_do_not_overflow(small_blocks):
    op = Attention(scale=1.0)
    q = np.full((1, 9, 1, 4), 100, np.float32)
    k = np.arange(36, dtype=np.float32).reshape(1, 9, 1, 4)
    states = [Appended(np.empty((1, 1, 9, 4), np.float32), 0) for _ in range(2)]
    out = attention.attention_blocks(op, q, k, k, *states)
    assert np.allclose(out[0, :, 0], k[0, :, 0])


def test_memory_is_bounded_by_blocks():
    """Scores of 4096 by 4096 for two heads would take 134 MB."""
    rng = np.random.default_rng(0)
    seq = 4096
    q, k = rng.standard_normal((2, 1, seq, 2, 16)).astype(np.float32)
    states = [Appended(np.zeros((1, 2, seq, 16), np.float32), 0) for _ in range(2)]
    tracemalloc.start()
    attention.attention_blocks(Attention(scale=0.25), q, k, k, *states)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < q.nbytes + 4e6
