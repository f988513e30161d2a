"""The chunked delta rule equals the recurrence that defines it, and the recurrence equals a loop written out here."""

import numpy as np
import pytest

from deltaloom.graph.op import Array
from deltaloom.ops.delta_rule import GatedDeltaRule, chunked_delta_rule

# (batch, seq, key heads, value heads, key dim, value dim): the shapes that llama.cpp, transformers and fla test, smaller where
# only the size differs, and the edges of a chunk.
SHAPES = [
    (1, 1, 4, 4, 128, 128),
    (2, 1, 4, 4, 64, 64),
    (1, 4, 2, 2, 64, 64),
    (2, 4, 2, 4, 32, 32),
    (1, 3, 3, 3, 8, 16),
    (2, 12, 3, 3, 8, 16),
    (2, 13, 2, 6, 8, 16),
    (1, 15, 2, 2, 60, 60),
    (1, 63, 1, 1, 64, 64),
    (1, 64, 2, 4, 64, 64),
    (1, 65, 2, 2, 64, 64),
    (1, 75, 2, 8, 32, 32),
    (1, 100, 2, 2, 64, 64),
    (2, 127, 2, 2, 64, 64),
    (1, 130, 2, 4, 16, 8),
    (1, 200, 2, 2, 64, 64),
    (1, 256, 1, 2, 128, 128),
    (1, 300, 2, 2, 32, 32),
]
DECAYS = ["mild", "strong", "none", "-20"]


def unit(x: Array) -> Array:
    norms: Array = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    return x / norms


def example(shape: tuple[int, ...], decay: str, *, same_keys: bool = False) -> tuple[Array, ...]:
    batch, seq, key_heads, value_heads, key_dim, value_dim = shape
    rng = np.random.default_rng(sum(shape))
    q, k = (unit(rng.uniform(-1, 1, (batch, seq, key_heads, key_dim))) for _ in range(2))
    if same_keys:
        k = np.broadcast_to(k[:, :1], k.shape).copy()
    v = rng.uniform(-0.3, 5, (batch, seq, value_heads, value_dim))
    gate = (batch, seq, value_heads)
    log_decay = {
        "mild": -rng.uniform(0, 1, gate),
        "strong": rng.uniform(-20, -1e-4, gate),
        "none": np.zeros(gate),
        "-20": np.full(gate, -20.0),
    }[decay]
    beta = rng.uniform(0, 1, gate)
    beta[:, ::5], beta[:, 1::5] = 0, 1
    return q, k, v, log_decay, beta, rng.standard_normal((batch, value_heads, key_dim, value_dim))


def normalised_square_error(result: Array, truth: Array) -> float:
    return float(np.sum((result - truth) ** 2) / np.sum(truth**2))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunked_is_recurrent(shape: tuple[int, ...], decay: str) -> None:
    arrays = example(shape, decay)
    scale = shape[4] ** -0.5
    truth = GatedDeltaRule(scale=scale).reference(*arrays)
    for result, wanted in zip(chunked_delta_rule(*arrays, scale), truth, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-12 * max(1.0, np.abs(wanted).max()))
    small = tuple(array.astype(np.float32) for array in arrays)
    exact = GatedDeltaRule(scale=scale).reference(*(array.astype(np.float64) for array in small))
    for result, wanted in zip(chunked_delta_rule(*small, scale), exact, strict=True):
        assert result.dtype == np.float32
        assert normalised_square_error(result, wanted) <= 1e-10


@pytest.mark.parametrize("decay", DECAYS)
def test_equal_keys_do_not_break_the_inverse(decay: str) -> None:
    """Powers of the strict triangle grow like binomials when all keys are equal; the solve must not."""
    arrays = example((1, 200, 1, 2, 16, 16), decay, same_keys=True)
    arrays = (*arrays[:4], np.ones_like(arrays[4]), arrays[5])
    truth = GatedDeltaRule(scale=0.25).reference(*arrays)
    small = tuple(array.astype(np.float32) for array in arrays)
    for result, single, wanted in zip(chunked_delta_rule(*arrays, 0.25), chunked_delta_rule(*small, 0.25), truth, strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-12 * np.abs(wanted).max())
        assert normalised_square_error(single, wanted) <= 1e-10


def test_the_recurrence_step_by_step() -> None:
    """Head by head and token by token, as the specification writes it: value head h uses key head h // 2."""
    q, k, v, log_decay, beta, state = example((2, 5, 2, 4, 3, 6), "mild")
    out, new_state = GatedDeltaRule(scale=0.5).reference(q, k, v, log_decay, beta, state)
    for row in range(2):
        for head in range(4):
            S = state[row, head]
            for t in range(5):
                S = np.exp(log_decay[row, t, head]) * S
                error = v[row, t, head] - S.T @ k[row, t, head // 2]
                S = S + np.outer(k[row, t, head // 2], beta[row, t, head] * error)
                np.testing.assert_allclose(out[row, t, head], S.T @ (0.5 * q[row, t, head // 2]), atol=1e-14)
            np.testing.assert_allclose(new_state[row, head], S, atol=1e-14)


def test_a_token_with_beta_one_stores_its_value() -> None:
    """With beta = 1 and a key of length 1, reading back with the key gives exactly the value."""
    q, k, v, log_decay, beta, state = example((1, 3, 1, 1, 4, 4), "mild")
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    out, _ = GatedDeltaRule(scale=1.0).reference(k, k, v, log_decay, np.ones_like(beta), state)
    np.testing.assert_allclose(out, v, atol=1e-13)


@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 130])
def test_torch_rule_on_every_length_class(seq: int) -> None:
    torch = pytest.importorskip("torch")
    arrays = example((2, seq, 2, 4, 16, 8), "strong")
    op = GatedDeltaRule(scale=0.25)
    results = op.torch(torch, *map(torch.from_numpy, arrays))
    for result, wanted in zip(results, op.reference(*arrays), strict=True):
        np.testing.assert_allclose(result.numpy(), wanted, atol=1e-12 * np.abs(wanted).max())
