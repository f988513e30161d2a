"""Philox4x32-10 against the published known answers, and the uniform numbers made of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.ops.philox import Purpose, philox4x32, random_words, uniform

KNOWN_ANSWERS = [  # counter, key, result: the Random123 distribution's vectors for philox4x32-10
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox4x32(counter, key).tolist() == words


def test_known_answers_in_one_batch() -> None:
    counters, keys, words = (np.array(column, np.uint32) for column in zip(*KNOWN_ANSWERS, strict=True))
    assert np.array_equal(philox4x32(counters, keys), words)
    assert np.array_equal(philox4x32(counters[:, None], keys[:, None])[:, 0], words)


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The algorithm once more in Python's own integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**64 - 1),
    purpose=st.sampled_from(Purpose),
)
def test_words_follow_the_counter_layout(seed: int, sample: int, position: int, purpose: Purpose) -> None:
    low, high = position % (1 << 32), position >> 32
    want = plain_philox([low, high, sample, int(purpose)], [seed % (1 << 32), seed >> 32])
    assert random_words(seed, sample, position, purpose).tolist() == want
    number = float(uniform(seed, sample, position, purpose))
    assert number == (want[0] >> 8) / 2**24
    assert 0.0 <= number < 1.0
    assert float(np.float32(number)) == number


def test_pinned_uniform_numbers() -> None:
    """A change of these numbers changes every seeded text that users have saved."""
    assert float(uniform(0, 0, 0)) == (0x6627E8D5 >> 8) / 2**24
    assert random_words(1234, 1, 17).tolist() == plain_philox([17, 0, 1, 0], [1234, 0])


def test_batched_numbers_equal_single_ones() -> None:
    positions = np.arange(50)
    batch = uniform(7, 3, positions)
    assert batch.shape == (50,)
    assert batch.tolist() == [float(uniform(7, 3, position)) for position in range(50)]


def test_numbers_look_uniform_and_purposes_differ() -> None:
    numbers = uniform(np.arange(40)[:, None], 0, np.arange(500)[None])
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    expected = numbers.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi squared, 19 degrees of freedom, p about 0.0007
    others = uniform(np.arange(40)[:, None], 0, np.arange(500)[None], Purpose.RESAMPLE)
    assert abs(np.corrcoef(numbers.ravel(), others.ravel())[0, 1]) < 0.03
