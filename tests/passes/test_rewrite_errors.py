"""Rules that cannot work: patterns that nothing can match, replacements that do not fit, rules that never come to an end."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from toy_rules import SiluMul, chain, only, silu_mul

from deltaloom.graph.errors import CompileError, GraphError
from deltaloom.passes.rewrite import pattern as p
from deltaloom.passes.rewrite.engine import apply_rules
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Rule


class Back(Rule):
    name: ClassVar[str] = "back"

    def pattern(self, g: Any, gate: Any, up: Any) -> Any:
        return g.swiglu(gate, up)

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.mul(g.silu(m.gate), m.up)


def test_rules_that_undo_one_another_are_an_error() -> None:
    g, _, y = silu_mul()
    g.output("y", y)
    with pytest.raises(CompileError, match="after 300 rewrites rules still apply to graph 'toy'; .*: back, silu_mul"):
        apply_rules(g.build(), [SiluMul(), Back()])


class Narrow(SiluMul):
    name: ClassVar[str] = "narrow"

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.split(g.swiglu(m.gate, m.up), sizes=(2, 2))[0]


class TooMany(SiluMul):
    name: ClassVar[str] = "too_many"

    def rewrite(self, g: Any, m: Match) -> Any:
        return m.gate, m.up


class Identity(SiluMul):
    name: ClassVar[str] = "identity"

    def rewrite(self, g: Any, m: Match) -> Any:
        return m.gate


def test_a_replacement_must_have_the_types_of_what_it_replaces() -> None:
    g, _, y = silu_mul()
    g.output("y", y)
    with pytest.raises(GraphError, match="types differ") as caught:
        apply_rules(g.build(), [Narrow()])
    assert "rule narrow" in "".join(caught.value.__notes__)
    with pytest.raises(CompileError, match="gives 2 values for 1 of its pattern"):
        apply_rules(g.build(), [TooMany()])
    after, _ = apply_rules(g.build(), [Identity()])
    assert not after.nodes and str(after.output("y")) == "%gate"


def unsaid(self: Rule, g: Any, x: Any, w: Any) -> Any:
    return g.rms_norm(x, w)


def unknown(self: Rule, g: Any, x: Any) -> Any:
    return g.silu(x, speed=3)


def pieces(self: Rule, g: Any, x: Any, y: Any) -> Any:
    return g.silu(x), g.silu(y)


def passed_on(self: Rule, g: Any, x: Any) -> Any:
    g.silu(x)
    return x


def idle(self: Rule, g: Any, x: Any, y: Any) -> Any:
    return g.silu(x)


def no_value(self: Rule, g: Any, x: Any) -> Any:
    return g.add(x, 1)


def loose_split(self: Rule, g: Any, x: Any) -> Any:
    return g.split(x, sizes=p.Any("sizes"))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (unsaid, "says nothing about attribute 'eps' of rms_norm, which has no default"),
        (unknown, "has an attribute 'speed', which silu has not"),
        (pieces, "falls into pieces that share no value"),
        (passed_on, "gives an input as output"),
        (idle, "does not use its input 'y'"),
        (no_value, "add is given 1, expected pattern values"),
        (loose_split, "the sizes of a split in a pattern are a tuple"),
    ],
)
def test_a_pattern_that_cannot_be_matched_is_refused(method: Any, message: str) -> None:
    broken = type("Broken", (Rule,), {"name": "broken", "pattern": method})
    with pytest.raises(CompileError, match=message):
        apply_rules(chain(1), [broken()])


def test_a_rule_asks_only_for_what_its_pattern_binds() -> None:
    class Curious(SiluMul):
        name: ClassVar[str] = "curious"

        def check(self, m: Match) -> str | None:
            with pytest.raises(AttributeError, match="the pattern has no input 'x'; it has gate, up"):
                m.x  # noqa: B018
            with pytest.raises(CompileError, match="the pattern binds no attribute 'eps'; it binds none"):
                m["eps"]
            return None

    g, _, y = silu_mul()
    g.output("y", y)
    assert only(apply_rules(g.build(), [Curious()])[1]).kind == "hit"
