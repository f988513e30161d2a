"""The NumPy delta rule in float32 against the float64 recurrence: NMSE of at most 1e-10, a thousandth of what peers ask."""

import tracemalloc

import numpy as np
import pytest

from deltaloom.backends.numpy import delta_rule
from deltaloom.backends.numpy.threads import use_threads
from deltaloom.backends.numpy.triangular import unit_lower_inverse
from deltaloom.ops.delta_rule import GatedDeltaRule

LIMIT = 1e-10
LENGTHS = (1, 2, 3, 12, 13, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200)


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    yield use_threads(request.param)
    use_threads(None)


def inputs(batch, seq, key_heads, repeats, key_dim, value_dim, *, decay=(-20, -1e-4), beta=(0, 1), same_keys=False, seed=0):
    """As llama.cpp's test of its op draws them."""
    rng = np.random.default_rng(seed)
    q, k = (rng.uniform(-1, 1, (batch, seq, key_heads, key_dim)) for _ in range(2))
    if same_keys:
        k[:] = k[:, :1]
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    gate = (batch, seq, key_heads * repeats)
    arrays = [q, k, rng.uniform(-0.3, 5, (*gate, value_dim)), rng.uniform(*decay, gate), rng.uniform(*beta, gate)]
    arrays.append(rng.standard_normal((*gate[::2], key_dim, value_dim)))
    return [array.astype(np.float32) for array in arrays]


def nmse(got, want):
    return float(((got - want) ** 2).sum() / max((want**2).sum(), 1e-30))


def check(arrays, kernel=delta_rule.delta_chunks, scale=None):
    op = GatedDeltaRule(scale=scale or arrays[0].shape[-1] ** -0.5)
    want = op.reference(*(array.astype(np.float64) for array in arrays))
    own = [array.copy() for array in arrays]
    out, state = kernel(op, *own)
    assert out.dtype == state.dtype == np.float32
    assert state is own[5], "the state is updated in place"
    assert out.shape == want[0].shape
    assert nmse(out, want[0]) <= LIMIT
    assert nmse(state, want[1]) <= LIMIT


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("decay", [(-20, -1e-4), (0, 0), (-20, -20), (-0.1, 0)], ids=str)
def test_lengths_and_decays(seq, decay):
    check(inputs(2, seq, 2, 2, 16, 24, decay=decay, seed=seq))


@pytest.mark.parametrize("beta", [(0, 0), (1, 1), (0.9, 1)], ids=str)
@pytest.mark.parametrize("decay", [(0, 0), (-1e-4, 0), (-1, 0)], ids=str)
def test_repeated_identical_keys(beta, decay):
    check(inputs(1, 130, 2, 2, 32, 32, beta=beta, decay=decay, same_keys=True))


@pytest.mark.parametrize(
    "heads, size, seq, batch, repeats",
    [(32, 128, 1, 1, 1), (32, 16, 1, 1, 1), (16, 64, 1, 2, 1), (4, 64, 4, 1, 1), (4, 64, 4, 2, 1), (8, 32, 4, 2, 2)]
    + [(4, 64, 256, 1, 1), (4, 64, 127, 2, 1), (3, 8, 13, 2, 2), (4, 60, 500, 1, 1), (1, 128, 1000, 2, 4)],
)
def test_shapes_of_the_peers(heads, size, seq, batch, repeats):
    check(inputs(batch, seq, heads, repeats, size, size, decay=(-2, 0)))
    if seq == 1:
        check(inputs(batch, seq, heads, repeats, size, size), delta_rule.delta_step)


@pytest.mark.parametrize("seed", range(6))
def test_a_small_decay_after_a_large_one_keeps_its_digits(seed):
    """Sums of -20 reach -1000 inside a chunk; differences of them must still be exact to a rounding."""
    arrays = inputs(1, 64, 1, 1, 8, 8, seed=seed)
    arrays[3][:] = -1e-3
    arrays[3][:, 5:50:3] = -20
    check(arrays)


@pytest.mark.parametrize("cuts", [(1,), (63,), (64,), (65, 66), (10, 80, 128), (0, 200)], ids=str)
def test_split_anywhere_is_the_same(cuts):
    arrays = inputs(1, 200, 2, 2, 16, 16, decay=(-0.5, 0))
    op = GatedDeltaRule(scale=0.25)
    whole, end = delta_rule.delta_chunks(op, *[array.copy() for array in arrays])
    state, pieces = arrays[5].copy(), []
    for low, high in zip((0, *cuts), (*cuts, 200)):
        if low == high:
            continue
        kernel = delta_rule.delta_step if high - low == 1 else delta_rule.delta_chunks
        out, state = kernel(op, *(array[:, low:high] for array in arrays[:5]), state)
        pieces.append(out)
    assert nmse(np.concatenate(pieces, axis=1), whole) <= LIMIT
    assert nmse(state, end) <= LIMIT


def test_views_of_one_projection_are_accepted():
    arrays = inputs(2, 70, 2, 2, 16, 16, decay=(-0.5, 0))
    wide = np.concatenate([array.reshape(2, 70, -1) for array in arrays[:3]], axis=-1)
    q, k, v = (part.reshape(array.shape) for part, array in zip(np.split(wide, [32, 64], axis=-1), arrays))
    assert not q.flags.c_contiguous
    op = GatedDeltaRule(scale=0.25)
    got = delta_rule.delta_chunks(op, q, k, v, *arrays[3:5], arrays[5].copy())
    want = delta_rule.delta_chunks(op, *arrays[:5], arrays[5].copy())
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])


def test_large_states_are_shared_over_threads():
    check(inputs(2, 1, 16, 2, 128, 128, decay=(-2, 0)), delta_rule.delta_step)
    check(inputs(1, 80, 7, 2, 96, 64, decay=(-2, 0)))


def test_a_prompt_takes_scratch_for_its_tokens_once():
    """Chunks are padded to their own length alone: not a chunk of memory for each token."""
    arrays = inputs(1, 512, 2, 2, 32, 32)
    tracemalloc.start()
    delta_rule.delta_chunks(GatedDeltaRule(scale=0.25), *arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * sum(array.nbytes for array in arrays[:5]), f"{peak} bytes"


@pytest.mark.parametrize("n", [1, 2, 7, 16, 64])
def test_triangular_inverse(n):
    rng = np.random.default_rng(n)
    matrices = rng.uniform(-1, 1, (5, n, n))
    expected = np.linalg.inv(np.tril(matrices, -1) + np.eye(n))
    found = unit_lower_inverse(matrices)
    assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()
    assert np.all(np.triu(found, 1) == 0)


def test_triangular_inverse_of_repeated_keys():
    matrices = np.tril(np.ones((3, 64, 64), np.float32), -1)
    found = unit_lower_inverse(matrices)
    expected = np.eye(64) - np.eye(64, k=-1)
    assert np.array_equal(found[1], expected)
