"""Divisions of axes and of factors: the same thing said in two ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.graph.errors import GraphError
from deltaloom.graph.types import f32
from deltaloom.ops.factors import parse_factors
from deltaloom.passes.shard.cuts import Cut, Division, Piece, factor_cuts, join, whole
from deltaloom.passes.shard.layout import Layout, read_layout

SIZES = {"h": 4, "r": 6, "d": 3, "q": 4, "k": 8, "2": 2}
AXES = [(("h",),), (("h", "r"),), (("r", "d"),), (("2", "h"),), (("q",), ("k",)), (("h", "d"), ("q",))]


@given(axis=st.sampled_from(AXES), data=st.data())
def test_factors_and_axes_say_the_same(axis: tuple[tuple[str, ...], ...], data: st.DataObject) -> None:
    """A division of one factor becomes one of the axis, and that one becomes the division of the factor again."""
    factor = data.draw(st.sampled_from([f for term in axis for f in term if f != "2"]))
    parts = data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if SIZES[factor] % n == 0]))
    division = Division(SIZES, {factor: (Piece(SIZES[factor], parts),)} if parts > 1 else {})
    cut = division.axis(axis)
    assert cut is not None and (parts == 1) == (not cut)
    if cut:
        assert factor_cuts(axis, cut, SIZES) == division.cuts


def test_what_has_no_factor_form_is_refused() -> None:
    assert factor_cuts((("h", "r"),), (Piece(24, 8),), SIZES) == {"h": (Piece(4, 4),), "r": (Piece(6, 2, 4),)}
    assert factor_cuts((("r", "d"),), (Piece(18, 9),), SIZES) is None  # 9 parts of 6 and 3
    assert factor_cuts((("q",), ("k",)), (Piece(12, 2),), SIZES) is None  # a part across the border
    assert Division(SIZES, {"h": (Piece(4, 2),), "r": (Piece(6, 2, 2),)}).axis((("h", "r"),)) is None


def test_sizes_of_factors_that_occur_in_products_alone() -> None:
    factors = parse_factors("(h k|h r v), (h r), k, v -> (h r v)", (1, 1, 1, 1), (1,))
    assert factors.sizes([[4 * 5 + 4 * 3 * 2], [12], [5], [2]], [[24]]) == {"h": 4, "r": 3, "k": 5, "v": 2}
    with pytest.raises(GraphError, match="the factors h and r of one axis have no size of their own elsewhere"):
        parse_factors("(h r) -> (h r)", (1,), (1,)).sizes([[12]], [[12]])


def test_factors_of_different_pieces_are_alternatives_if_they_never_meet() -> None:
    split = parse_factors("a (f|g) -> a f, a g", (2,), (2, 2))
    assert split.alternatives("f", "g") and not split.alternatives("a", "f")
    assert not parse_factors("(h k|h r v), (h r) -> k", (1, 1), (1,)).alternatives("h", "r")


CUTS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 1, 2])), min_size=1, max_size=4)


@given(first=CUTS, extra=st.integers(0, 3))
def test_joining(first: list[tuple[int, int]], extra: int) -> None:
    cut: Cut = tuple(Piece(size * parts, parts) for size, parts in first) + ((Piece(extra),) if extra else ())
    blank = (Piece(sum(piece.size for piece in cut)),)
    one, other = join(cut, blank), join(blank, cut)
    assert one == other == join(one, one) and whole(one) == whole(cut)
    assert [p for p in one if p.parts > 1] == [p for p in cut if p.parts > 1]


def test_contradictions_keep_what_was_first() -> None:
    assert join((Piece(8, 2),), (Piece(4, 2), Piece(4, 2))) == (Piece(8, 2),)
    assert join((Piece(4, 2), Piece(4)), (Piece(4), Piece(4, 2))) == (Piece(4, 2), Piece(4, 2))


def test_layouts_are_written_and_read() -> None:
    for layout in (
        Layout(),
        Layout(partial=True),
        Layout({1: (Piece(8, 4),)}),
        Layout({0: (Piece(4, 2), Piece(2), Piece(8, 4)), 1: (Piece(6, 2, 2),)}),
    ):
        text = layout.text("tp", 4)
        assert read_layout(text, layout.local(f32[14, 8]), 4) == layout, text
    with pytest.raises(GraphError, match="is not how a value is divided"):
        read_layout("tp: everywhere", f32[2], 2)
