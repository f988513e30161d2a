"""Symbolic dimensions: polynomials with integer coefficients over named symbols that have bounds.

``batch * seq``, ``past + seq`` and ``2 * seq - 1`` are dimensions. Two dimensions are equal when their polynomials are; an
ordering is answered from the bounds of the symbols and raises ``GraphError`` where these do not decide it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from deltaloom.graph.errors import GraphError


@dataclass(frozen=True)
class Symbol:
    """A named non-negative integer with bounds, both included; ``high=None`` means unbounded."""

    name: str
    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        if self.low < 0 or (self.high is not None and self.high < self.low):
            raise GraphError(f"symbol '{self.name}' has the bounds {self.low} to {self.high}; expected 0 <= low <= high")

    def __lt__(self, other: Symbol) -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[str, int, bool, int]:
        return self.name, self.low, self.high is None, self.high or 0

    def __str__(self) -> str:
        return self.name


Monomial = tuple[Symbol, ...]


@dataclass(frozen=True)
class Expr:
    """A sum of monomials, kept sorted; at least one has a symbol (a plain number is an ``int``)."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Dim) -> Dim:
        return _build([*self.terms, *_terms(other)])

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return _build([(monomial, -factor) for monomial, factor in self.terms])

    def __sub__(self, other: Dim) -> Dim:
        return self + (-other)

    def __rsub__(self, other: Dim) -> Dim:
        return (-self) + other

    def __mul__(self, other: Dim) -> Dim:
        return _build([(tuple(sorted(a + b)), x * y) for a, x in self.terms for b, y in _terms(other)])

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Dim:
        """Exact division only: a dimension that ``other`` does not divide for every value of its symbols is refused."""
        if any(factor % other for _, factor in self.terms):
            raise GraphError(f"dimension {self} is not divisible by {other} for every value of its symbols")
        return _build([(monomial, factor // other) for monomial, factor in self.terms])

    def __lt__(self, other: Dim) -> bool:
        return _decide(self - other, f"{self} < {other}", strict=True)

    def __le__(self, other: Dim) -> bool:
        return _decide(self - other, f"{self} <= {other}", strict=False)

    def __gt__(self, other: Dim) -> bool:
        return not self <= other

    def __ge__(self, other: Dim) -> bool:
        return not self < other

    def __str__(self) -> str:
        text = ""
        for monomial, factor in self.terms:
            names = "*".join(symbol.name for symbol in monomial)
            size = abs(factor)
            body = str(size) if not names else names if size == 1 else f"{size}*{names}"
            text += (" - " if factor < 0 else " + ") + body
        return text[3:] if text.startswith(" + ") else "-" + text[3:]

    def __repr__(self) -> str:
        return str(self)


Dim = int | Expr


def symbol(name: str, low: int = 1, high: int | None = None) -> Expr:
    """A dimension that is one symbol."""
    return Expr((((Symbol(name, low, high),), 1),))


def symbols_of(dim: Dim) -> frozenset[Symbol]:
    """The symbols that occur in ``dim``."""
    return frozenset() if isinstance(dim, int) else frozenset(s for monomial, _ in dim.terms for s in monomial)


def substitute(dim: Dim, values: Mapping[str, Dim]) -> Dim:
    """``dim`` with every symbol named in ``values`` replaced."""
    if isinstance(dim, int):
        return dim
    total: Dim = 0
    for monomial, factor in dim.terms:
        term: Dim = factor
        for atom in monomial:
            term = term * values.get(atom.name, Expr((((atom,), 1),)))
        total = total + term
    return total


def bounds(dim: Dim) -> tuple[int, int | None]:
    """The least and the greatest value of ``dim`` (None: no upper limit known); a lower limit always exists for sums with
    positive factors, otherwise ``GraphError`` names the term without one."""
    low: int = 0
    high: int | None = 0
    for monomial, factor in _terms(dim):
        small, large = _monomial_bounds(monomial)
        if factor >= 0:
            low += factor * small
            high = None if high is None or large is None else high + factor * large
        else:
            if large is None:
                raise GraphError(f"dimension {dim} has no lower limit, because {monomial[0]} is unbounded")
            low += factor * large
            high = None if high is None else high + factor * small
    return low, high


def parse_dim(text: str, known: Mapping[str, Symbol]) -> Dim:
    """Read what ``str(dim)`` printed; ``known`` maps symbol names to symbols."""
    if not re.fullmatch(r"\s*-?\s*[^+\-\s]+(\s*[+-]\s*[^+\-\s]+)*\s*", text):
        raise GraphError(f"'{text}' is not a dimension; expected for example 2*past + seq - 1")
    total: Dim = 0
    for sign, body in re.findall(r"([+-]?)\s*([^+\-\s]+)", text):
        term: Dim = -1 if sign == "-" else 1
        for factor in body.split("*"):
            if factor.isdecimal():
                term = term * int(factor)
            elif factor in known:
                term = term * Expr((((known[factor],), 1),))
            else:
                raise GraphError(f"dimension '{text}' uses '{factor}', which is neither a number nor a declared symbol")
        total = total + term
    return total


def _terms(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    return (((), dim),) if isinstance(dim, int) else dim.terms


def _build(terms: list[tuple[Monomial, int]]) -> Dim:
    sums: dict[Monomial, int] = {}
    for monomial, factor in terms:
        sums[monomial] = sums.get(monomial, 0) + factor
    kept = tuple(sorted((m, f) for m, f in sums.items() if f))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Expr(tuple(sorted(kept, key=lambda term: (not term[0], term[0]))))


def _monomial_bounds(monomial: Monomial) -> tuple[int, int | None]:
    low, high = 1, 1
    unbounded = False
    for atom in monomial:
        low *= atom.low
        unbounded = unbounded or atom.high is None
        high *= atom.high or 0
    return low, None if unbounded else high


def _decide(difference: Dim, question: str, *, strict: bool) -> bool:
    """Whether ``difference`` is below zero (``strict``) or at most zero, for every value of its symbols."""
    if isinstance(difference, int):
        return difference < 0 if strict else difference <= 0
    negative = -difference
    for value, answer in ((negative, True), (difference, False)):
        try:
            low, _ = bounds(value)
        except GraphError:
            continue
        needed = 1 if strict == answer else 0
        if low >= needed:
            return answer
    raise GraphError(f"cannot decide {question}: the bounds of its symbols allow both")
