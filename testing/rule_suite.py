"""What every rewrite rule is held to; see ``deltaloom.testing.rules``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import deltaloom.passes.fuse  # noqa: F401 - puts the built-in rules into the registry
from deltaloom.graph.op import Draw
from deltaloom.passes.rewrite.rule import Rule, rules
from deltaloom.testing.rules import check_interior_use, check_rule
from deltaloom.testing.suite import Check, Suite


class RuleSuite(Suite):
    """The checks of one rewrite rule: it fires on each of its examples and keeps the meaning, and it refuses where an inner value
    is used outside. ``rule``: the class, or its registered name."""

    rule: type[Rule] | str

    def subject(self) -> str:
        return f"rule {self.rule if isinstance(self.rule, str) else self.rule.name}"

    def checks(self) -> Iterator[Check]:
        rule, subject = rules.get(self.rule) if isinstance(self.rule, str) else self.rule, self.subject()
        yield Check(subject, "keeps the meaning", partial(_on, check_rule, rule))
        yield Check(subject, "respects other uses", partial(_on, check_interior_use, rule))


def _on(check: object, rule: type[Rule], draw: Draw) -> None:
    check(rule(), draw)  # type: ignore[operator]
