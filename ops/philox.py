"""Philox4x32-10, the counter-based generator behind every random choice: the same integers in NumPy, torch and Triton.

Algorithm: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A number is a pure
function of (seed, sample index, position, purpose), so a result depends neither on batching nor on what was drawn
before. ``numpy.random.Philox`` is another member of the family (4x64) and gives other integers.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

MULTIPLIER_0 = np.uint64(0xD2511F53)
MULTIPLIER_1 = np.uint64(0xCD9E8D57)
KEY_STEP_0 = np.uint32(0x9E3779B9)
KEY_STEP_1 = np.uint32(0xBB67AE85)
ROUNDS = 10
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes at one position are independent."""

    SAMPLE = 0
    ACCEPT_DRAFT = 1
    RESAMPLE = 2


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32: ``counter`` uint32 [..., 4] and ``key`` uint32 [..., 2] give uint32 [..., 4].

    The leading axes broadcast.
    """
    counters = np.asarray(counter, dtype=np.uint32)
    keys = np.asarray(key, dtype=np.uint32)
    c0, c1, c2, c3 = (counters[..., lane] for lane in range(4))
    k0, k1 = keys[..., 0], keys[..., 1]
    with np.errstate(over="ignore"):  # the keys are meant to wrap around
        for _ in range(ROUNDS):
            product0 = MULTIPLIER_0 * c0.astype(np.uint64)
            product1 = MULTIPLIER_1 * c2.astype(np.uint64)
            c0, c1, c2, c3 = _high(product1) ^ c1 ^ k0, _low(product1), _high(product0) ^ c3 ^ k1, _low(product0)
            k0, k1 = k0 + KEY_STEP_0, k1 + KEY_STEP_1
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)


def random_words(
    seed: ArrayLike, sample_index: ArrayLike, position: ArrayLike, purpose: ArrayLike = Purpose.SAMPLE
) -> NDArray[np.uint32]:
    """Four random words, uint32 [..., 4], for each broadcast (seed, sample index, position, purpose).

    The seed is the key (low word first); the counter is (position low, position high, sample index, purpose). Seeds and
    positions are integers in [0, 2**64), sample indices and purposes in [0, 2**32).
    """
    seeds = np.asarray(seed, dtype=np.uint64)
    positions = np.asarray(position, dtype=np.uint64)
    lanes = np.broadcast_arrays(
        _low(positions), _high(positions), np.asarray(sample_index, np.uint32), np.asarray(purpose, np.uint32)
    )
    return philox4x32(np.stack(lanes, axis=-1), np.stack((_low(seeds), _high(seeds)), axis=-1))


def uniform(
    seed: ArrayLike, sample_index: ArrayLike, position: ArrayLike, purpose: ArrayLike = Purpose.SAMPLE
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 of the broadcast shape: the upper 24 bits of the first word over 2**24.

    24 bits are exactly representable in float32, so a backend that computes in float32 holds the very same number.
    """
    words = random_words(seed, sample_index, position, purpose)[..., 0]
    return (words >> np.uint32(8)).astype(np.float64) * 2.0**-24


def _low(values: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return (values & LOW_WORD).astype(np.uint32)


def _high(values: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return (values >> WORD_BITS).astype(np.uint32)
