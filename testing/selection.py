"""From a name to the suites of everything that has it, and to one pytest test of them. A plugin's test file is one line::

test_mylab = conformance("mylab.")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

import deltaloom.ops
import deltaloom.passes.fuse  # noqa: F401 - these two put the built-in ops and rules into their registries
from deltaloom.graph.registry import ops
from deltaloom.passes.kernel import Backend
from deltaloom.passes.rewrite.rule import rules
from deltaloom.testing.op_suite import OpSuite
from deltaloom.testing.plugin_suites import plugin_suites
from deltaloom.testing.requirements import Requirements
from deltaloom.testing.rule_suite import RuleSuite
from deltaloom.testing.suite import Check, Suite, attempt, cases

Test = Callable[..., None]


def conformance(prefix: str = "", *, backends: Sequence[Backend] | None = None, requirements: Requirements | None = None) -> Test:
    """One pytest test with a case for every check of everything that a plugin offers: ``prefix`` is its name with a dot, or the
    beginning of some of its names. Without a dot: of the built-in ops and rules whose names begin so.

    Ops are run with all kernels of ``backends`` (None: the built-in ones that are installed and run kernels one by one).
    ``requirements`` are the claims; None: those of the plugin. ``PluginError`` where there is nothing of that name."""

    def test_conformance(check: Check) -> None:
        attempt(check)

    test: Test = pytest.mark.parametrize("check", cases(selected(prefix, backends, requirements)))(test_conformance)
    return test


def selected(prefix: str, backends: Sequence[Backend] | None, requirements: Requirements | None) -> list[Suite]:
    """The suites of ``conformance``."""
    if "." in prefix:
        return plugin_suites(prefix.partition(".")[0], backends, requirements, prefix=prefix)
    claimed = requirements or Requirements()
    found: list[Suite] = []
    found += [OpSuite.of(op=op, backends=backends, requirements=claimed) for op in ops.built_in() if op.name.startswith(prefix)]
    found += [RuleSuite.of(rule=rule, requirements=claimed) for rule in rules.built_in() if rule.name.startswith(prefix)]
    return found
