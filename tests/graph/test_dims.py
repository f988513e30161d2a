"""Symbolic dimensions agree with integers, and orderings are decided exactly when the bounds decide them."""

import itertools
import operator
from collections.abc import Callable, Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deltaloom.graph.dims import Dim, Symbol, bounds, parse_dim, substitute, symbol, symbols_of
from deltaloom.graph.errors import GraphError
from deltaloom.graph.types import TensorType, bool_, f8_e4m3, f32, parse_type

Bounds = dict[str, tuple[int, int]]
LIMITS: Bounds = {"a": (0, 2), "b": (1, 3), "c": (2, 2), "d": (3, 5)}
SYMBOLS = {name: Symbol(name, *limits) for name, limits in LIMITS.items()}
ATOMS = {name: symbol(name, *limits) for name, limits in LIMITS.items()}
COMPARISONS: list[Callable[[Dim, Dim], bool]] = [operator.lt, operator.le, operator.gt, operator.ge]


def assignments() -> Iterator[dict[str, int]]:
    for values in itertools.product(*(range(low, high + 1) for low, high in LIMITS.values())):
        yield dict(zip(LIMITS, values, strict=True))


@st.composite
def formulas(draw: st.DrawFn, depth: int = 3) -> tuple[Dim, Callable[[dict[str, int]], int]]:
    """A dimension, and the same formula over integers."""
    if depth == 0 or not draw(st.integers(0, 3)):
        if draw(st.booleans()):
            name = draw(st.sampled_from(sorted(ATOMS)))
            return ATOMS[name], lambda values: values[name]
        number = draw(st.integers(-4, 4))
        return number, lambda values: number
    (x, left), (y, right) = draw(formulas(depth - 1)), draw(formulas(depth - 1))
    kind = draw(st.sampled_from(["+", "-", "*", "~"]))
    if kind == "+":
        return x + y, lambda values: left(values) + right(values)
    if kind == "-":
        return x - y, lambda values: left(values) - right(values)
    if kind == "*":
        return x * y, lambda values: left(values) * right(values)
    return -x, lambda values: -left(values)


@given(formulas())
def test_polynomials_agree_with_integers(formula: tuple[Dim, Callable[[dict[str, int]], int]]) -> None:
    dim, exact = formula
    for values in assignments():
        assert substitute(dim, values) == exact(values)


@given(formulas(), formulas())
def test_equal_polynomials_are_equal(left: tuple[Dim, object], right: tuple[Dim, object]) -> None:
    x, y = left[0], right[0]
    assert x + y == y + x and x * y == y * x and x - x == 0
    assert (x + y) * (x - y) == x * x - y * y
    assert hash(x * (y + 1)) == hash(x * y + x)


@given(formulas())
def test_dimensions_print_and_parse_back(formula: tuple[Dim, object]) -> None:
    assert parse_dim(str(formula[0]), SYMBOLS) == formula[0]


@given(formulas())
def test_bounds_hold_for_every_value(formula: tuple[Dim, Callable[[dict[str, int]], int]]) -> None:
    dim, exact = formula
    low, high = bounds(dim)
    assert high is not None
    assert all(low <= exact(values) <= high for values in assignments())


@given(formulas(2), formulas(2), st.sampled_from(COMPARISONS))
def test_a_decided_ordering_is_right_and_an_open_one_raises(
    left: tuple[Dim, Callable[[dict[str, int]], int]],
    right: tuple[Dim, Callable[[dict[str, int]], int]],
    compare: Callable[[Dim, Dim], bool],
) -> None:
    answers = {compare(left[1](values), right[1](values)) for values in assignments()}
    try:
        decided = compare(left[0], right[0])
    except GraphError as error:
        assert "cannot decide" in str(error)
    else:
        assert answers == {decided}


@given(st.dictionaries(st.sampled_from(sorted(ATOMS)), st.integers(-3, 3)), st.integers(-9, 9), st.sampled_from(COMPARISONS))
def test_orderings_of_linear_sums_are_always_decided_when_the_bounds_do(
    factors: dict[str, int], limit: int, compare: Callable[[Dim, Dim], bool]
) -> None:
    total: Dim = sum((ATOMS[name] * factor for name, factor in factors.items()), 0)
    assume(not isinstance(total, int))
    answers = {compare(sum(values[n] * f for n, f in factors.items()), limit) for values in assignments()}
    if len(answers) == 1:
        assert compare(total, limit) == answers.pop()
    else:
        with pytest.raises(GraphError, match="the bounds of its symbols allow both"):
            compare(total, limit)


def test_unbounded_symbols() -> None:
    batch, past = symbol("batch"), symbol("past", 0)
    assert past + batch > past and past >= 0 and batch > 0 and 0 < batch and 2 * batch >= batch
    assert bounds(past * 3 + 1) == (1, None) and bounds(-batch + 4 + batch) == (4, 4)
    with pytest.raises(GraphError, match="cannot decide past < batch"):
        assert past < batch
    with pytest.raises(GraphError, match="has no lower limit, because batch is unbounded"):
        bounds(past - batch)


def test_division_is_exact() -> None:
    batch = symbol("batch")
    assert (4 * batch + 8) // 4 == batch + 2
    with pytest.raises(GraphError, match="4\\*batch \\+ 2 is not divisible by 4"):
        (4 * batch + 2) // 4


def test_symbols() -> None:
    batch = symbol("batch")
    assert symbols_of(batch * 2 - symbol("past", 0)) == {Symbol("batch"), Symbol("past", 0)}
    assert symbols_of(3) == frozenset()
    assert substitute(batch * batch, {"batch": symbol("past", 0) + 1}) == substitute(
        (batch + 1) * (batch + 1), {"batch": symbol("past", 0)}
    )
    assert str(symbol("x", 1) + symbol("x", 1, 5)) == "x + x", "one name with two bounds can be printed; the verifier refuses it"
    with pytest.raises(GraphError, match="symbol 'x' has the bounds 3 to 2"):
        Symbol("x", 3, 2)


@pytest.mark.parametrize("text", ["", "a b", "a +", "+ a", "a ** b", "2a", "a//2", "unknown", "²"])
def test_other_texts_are_no_dimensions(text: str) -> None:
    with pytest.raises(GraphError, match="dimension"):
        parse_dim(text, SYMBOLS)


@pytest.mark.parametrize(
    "type_",
    [
        f32[()],
        f32[3, ATOMS["a"] * 2 - 1],
        bool_[ATOMS["a"] + ATOMS["b"], 1],
        TensorType(parse_type("fp8_e4m3{block 128x64, scale f32}[256, 64]", {}).dtype, (128, 64)),
        f8_e4m3[(ATOMS["d"],)],
    ],
    ids=str,
)
def test_types_print_and_parse_back(type_: TensorType) -> None:
    assert parse_type(str(type_), SYMBOLS) == type_
