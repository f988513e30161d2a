"""Attention against a loop over rows, heads and positions that was written from the definition."""

import numpy as np
import pytest

from deltaloom.graph.op import Array
from deltaloom.ops.attention import Attention


def by_loops(q: Array, k: Array, v: Array, keys: Array, values: Array, valid: Array, scale: float) -> Array:
    batch, seq, heads, _ = q.shape
    groups, past = heads // k.shape[2], keys.shape[2]
    out = np.zeros((batch, seq, heads, v.shape[3]))
    for b, t, h in np.ndindex(batch, seq, heads):
        scores, seen = [], []
        for column in range(past + t + 1):
            if valid[b, column]:
                key = keys[b, h // groups, column] if column < past else k[b, column - past, h // groups]
                scores.append(np.exp(scale * np.dot(q[b, t, h], key)))
                seen.append(values[b, h // groups, column] if column < past else v[b, column - past, h // groups])
        for score, value in zip(scores, seen):
            out[b, t, h] += score / sum(scores) * value
    return out


def example(past: int, seq: int, key_heads: int = 2) -> tuple[Array, ...]:
    rng = np.random.default_rng(past * 10 + seq)
    return (
        rng.standard_normal((2, seq, 4, 5)),
        rng.standard_normal((2, seq, key_heads, 5)),
        rng.standard_normal((2, seq, key_heads, 3)),
        rng.standard_normal((2, key_heads, past, 5)),
        rng.standard_normal((2, key_heads, past, 3)),
    )


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("past", "seq"), [(0, 1), (0, 6), (5, 1), (3, 4)])
def test_against_loops(past: int, seq: int, key_heads: int) -> None:
    arrays = example(past, seq, key_heads)
    rng = np.random.default_rng(0)
    valid = rng.random((2, past + seq)) < 0.7
    valid[1] = np.arange(past + seq) >= 2
    op = Attention(scale=0.4)
    out, keys, values = op.reference(*arrays, valid)
    np.testing.assert_allclose(out, by_loops(*arrays, valid, 0.4), atol=1e-14)
    np.testing.assert_array_equal(keys[:, :, past:].transpose(0, 2, 1, 3), arrays[1])
    np.testing.assert_array_equal(values[:, :, :past], arrays[4])
    unmasked, _, _ = op.reference(*arrays)
    np.testing.assert_allclose(unmasked, by_loops(*arrays, np.ones_like(valid), 0.4), atol=1e-14)


def test_a_row_that_sees_nothing_is_zero() -> None:
    arrays = example(0, 3)
    valid = np.array([[False, False, True], [False, False, False]])
    out, _, _ = Attention(scale=1.0).reference(*arrays, valid)
    assert (out[0, :2] == 0).all() and (out[0, 2] != 0).all() and (out[1] == 0).all()


def test_large_scores_do_not_overflow() -> None:
    arrays = example(2, 2)
    out, _, _ = Attention(scale=1e4).reference(*(array.astype(np.float32) for array in arrays))
    assert np.isfinite(out).all()
