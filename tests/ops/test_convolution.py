"""The causal convolution against ``numpy.convolve`` and against a written-out sum."""

import numpy as np
import pytest

from deltaloom.ops.convolution import CausalConv1d


@pytest.mark.parametrize("taps", [1, 3, 4, 9])
@pytest.mark.parametrize("seq", [1, 2, 4, 5, 64])
def test_against_numpy_convolve(taps: int, seq: int) -> None:
    rng = np.random.default_rng(taps * 100 + seq)
    x, weight = rng.standard_normal((2, seq, 3)), rng.standard_normal((3, 1, taps))
    y, state = CausalConv1d().reference(x, weight, np.zeros((2, 3, taps - 1)))
    for row in range(2):
        for channel in range(3):
            flipped = weight[channel, 0, ::-1]  # convolve flips its kernel; ours is a correlation
            wanted = np.convolve(x[row, :, channel], flipped)[:seq]
            np.testing.assert_allclose(y[row, :, channel], wanted, atol=1e-13)
            columns = np.concatenate([np.zeros(taps - 1), x[row, :, channel]])[seq:]
            np.testing.assert_array_equal(state[row, channel], columns)


def test_the_last_tap_multiplies_the_current_position() -> None:
    weight = np.array([[[0.0, 0.0, 1.0]]])
    x = np.arange(1.0, 6.0).reshape(1, 5, 1)
    y, state = CausalConv1d().reference(x, weight, np.full((1, 1, 2), 7.0))
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(state, [[[4.0, 5.0]]])


def test_the_state_is_older_than_the_input() -> None:
    weight = np.array([[[100.0, 10.0, 1.0]]])
    y, _ = CausalConv1d().reference(np.array([[[3.0], [4.0]]]), weight, np.array([[[1.0, 2.0]]]))
    np.testing.assert_array_equal(y, [[[123.0], [234.0]]])


def test_silu_comes_after_the_sum() -> None:
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((1, 4, 2)), rng.standard_normal((2, 1, 4)), rng.standard_normal((1, 2, 3))
    plain, _ = CausalConv1d().reference(*arrays)
    silu, _ = CausalConv1d(activation="silu").reference(*arrays)
    np.testing.assert_allclose(silu, plain / (1 + np.exp(-plain)))
