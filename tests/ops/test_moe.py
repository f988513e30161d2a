"""Routing with ties, and experts against a loop over tokens."""

import ml_dtypes
import numpy as np
import pytest

from deltaloom.ops.moe import MoEExperts, RouterTopK


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_ties_take_the_lowest_id(dtype: type) -> None:
    logits = np.array([[[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-5.0, 2.0, -5.0, 9.0, 2.0]]]).astype(dtype)
    _, ids = RouterTopK(k=3, normalize=True).reference(logits)
    assert ids.tolist() == [[[1, 2, 4], [0, 1, 2], [3, 1, 4]]]
    torch = pytest.importorskip("torch")
    _, from_torch = RouterTopK(k=3, normalize=True).torch(torch, torch.from_numpy(logits.astype(np.float32)))
    assert from_torch.tolist() == ids.tolist()


def test_the_softmax_is_over_all_experts() -> None:
    logits = np.log(np.array([[[0.1, 0.2, 0.3, 0.4]]]))
    plain, ids = RouterTopK(k=2, normalize=False).reference(logits)
    normalised, _ = RouterTopK(k=2, normalize=True).reference(logits)
    assert ids.tolist() == [[[3, 2]]]
    np.testing.assert_allclose(plain, [[[0.4, 0.3]]])
    np.testing.assert_allclose(normalised, [[[4 / 7, 3 / 7]]])


def test_experts_token_by_token() -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((2, 3, 4)), rng.random((2, 3, 2))
    gate_up, down = rng.standard_normal((5, 6, 4)), rng.standard_normal((5, 4, 3))
    ids = np.array([[[0, 1], [1, 0], [4, 0]], [[2, 4], [0, 2], [1, 4]]], np.int32)  # nobody asks for expert 3
    y = MoEExperts().reference(x, weights, ids, gate_up, down)
    for b, t in np.ndindex(2, 3):
        total = np.zeros(4)
        for weight, expert in zip(weights[b, t], ids[b, t]):
            gate, up = gate_up[expert, :3] @ x[b, t], gate_up[expert, 3:] @ x[b, t]
            total += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
        np.testing.assert_allclose(y[b, t], total, atol=1e-13)
