"""Collectives between several ranks: what they exchange, and how they are made of one another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.graph.errors import GraphError
from deltaloom.graph.interpret import type_of
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType, bf16, f8_e4m3, f32
from deltaloom.ops.collectives import AllGather, AllReduce, AllToAll, Collective, OnFirstRank, ReduceScatter, Shard

RANKS = st.integers(1, 4)


def drawn(ranks: int, *shape: int) -> list[np.ndarray]:
    generator = np.random.default_rng(sum(shape))
    return [generator.integers(-9, 9, shape).astype(np.float32) for _ in range(ranks)]


def exchanged(op: Collective, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """What the ranks have afterwards, its types compared with the inferred ones."""
    found = op.together(arrays)
    assert len(found) == len(arrays)
    for before, after in zip(arrays, found):
        assert op.output_types(type_of(before)) == (type_of(after),)
    return found


@given(ranks=RANKS, rows=st.integers(1, 3), columns=st.integers(1, 3), axis=st.integers(0, 1))
def test_a_reduction_is_scattered_and_gathered(ranks: int, rows: int, columns: int, axis: int) -> None:
    arrays = drawn(ranks, rows * ranks, columns * ranks)
    total = exchanged(AllReduce("tp", ranks), arrays)
    assert all(np.array_equal(array, sum(arrays)) for array in total)
    scattered = exchanged(ReduceScatter("tp", ranks, axis), arrays)
    gathered = exchanged(AllGather("tp", ranks, axis), scattered)
    assert all(np.array_equal(a, b) for a, b in zip(gathered, total))


@given(ranks=RANKS, rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_turning_there_and_back(ranks: int, rows: int, columns: int) -> None:
    """Divided by rows, then by columns, then by rows again; each is a division of the same whole."""
    arrays = drawn(ranks, rows, columns * ranks)
    turned = exchanged(AllToAll("tp", ranks, 1, 0), arrays)
    whole = np.concatenate(arrays, axis=0)
    for rank, array in enumerate(turned):
        assert np.array_equal(array, whole[:, rank * columns : (rank + 1) * columns])
    assert all(np.array_equal(a, b) for a, b in zip(exchanged(AllToAll("tp", ranks, 0, 1), turned), arrays))


def test_one_of_each_group_of_copies_is_gathered() -> None:
    first, second = drawn(2, 2, 3)
    (found, *rest) = exchanged(AllGather("tp", 4, 1, copies=2), [first, first, second, second])
    assert np.array_equal(found, np.concatenate([first, second], axis=1)) and len(rest) == 3


def test_sums_are_rounded_once() -> None:
    small = np.array([2.0**-9], bf16.numpy)
    arrays = [np.ones(1, bf16.numpy), *[small] * 4]
    assert AllReduce("tp", 5).together(arrays)[0][0] == 1 + 2.0**-7  # each alone would be lost in the rounding


def test_gathering_shards_gives_the_whole() -> None:
    whole = drawn(1, 12, 2)[0]
    shard = Shard("tp", 4, axis=0, pieces=((12, 4, 1),))
    parts = [shard.on_rank(rank, whole) for rank in range(4)]
    assert np.array_equal(AllGather("tp", 4, 0).together(parts)[0], whole)
    assert np.shares_memory(parts[1], whole)


def test_a_shard_of_pieces() -> None:
    """Ranks 0 and 1 share the first piece's first half; the second piece is divided among all."""
    shard = Shard("tp", 4, axis=0, pieces=((4, 2, 1), (3, 1, 1), (8, 4, 1), (4, 2, 2)))
    whole = np.arange(19)
    wanted = [
        [0, 1, 4, 5, 6, 7, 8, 15, 16],
        [0, 1, 4, 5, 6, 9, 10, 17, 18],
        [2, 3, 4, 5, 6, 11, 12, 15, 16],
        [2, 3, 4, 5, 6, 13, 14, 17, 18],
    ]
    assert [shard.on_rank(rank, whole).tolist() for rank in range(4)] == wanted


def test_quantised_weights_are_cut_at_blocks() -> None:
    form = QuantType(f8_e4m3, (2, 2), f32)
    codes = np.arange(32).reshape(8, 4).astype(f8_e4m3.numpy)
    weight = QuantizedArray(codes, np.arange(8, dtype=np.float32).reshape(4, 2), form, (8, 4))
    part = Shard("tp", 2, axis=0, pieces=((8, 2, 1),)).on_rank(1, weight)
    assert part.shape == (4, 4) and part.scale.tolist() == [[4, 5], [6, 7]] and np.shares_memory(part.data, codes)
    with pytest.raises(GraphError, match=r"cannot be divided at 1 of axis 1: that is inside a block of its scales"):
        Shard("tp", 4, axis=1, pieces=((4, 4, 1),)).output_types(form[8, 4])


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (AllReduce("tp", 0), "has 0 ranks, expected at least 1"),
        (AllGather("tp", 2, 2), r"x f32\[4, 6\] has no axis 2"),
        (AllGather("tp", 4, 0, copies=3), "groups of 3, which do not divide them"),
        (ReduceScatter("tp", 4, 1), r"axis 1 of x f32\[4, 6\] is not a known multiple of 4"),
        (Shard("tp", 2, axis=0, pieces=((6, 2, 1),)), "is not of size 6, that of the pieces"),
        (Shard("tp", 4, axis=1, pieces=((6, 4, 1),)), "a piece of 6 elements cannot be divided into 4"),
        (Shard("tp", 2, 2, axis=0, pieces=((4, 2, 1),)), "bound to rank 2, but 'tp' has ranks 0 to 1"),
    ],
)
def test_refusals(op: Collective, reason: str) -> None:
    with pytest.raises(GraphError, match=reason):
        op.output_types(f32[4, 6])


def test_one_rank_alone_cannot_exchange() -> None:
    with pytest.raises(GraphError, match="all_reduce over 2 ranks of 'tp' cannot run in one rank alone"):
        AllReduce("tp", 2).reference(np.ones(2, np.float32))
    with pytest.raises(GraphError, match="on_first_rank over 2 ranks of 'tp' does not know its rank"):
        OnFirstRank("tp", 2).reference(np.ones(2, np.float32))
