"""Every registered rewrite rule keeps the meaning of what it replaces."""

from deltaloom.testing.rules import rule_conformance

test_rules = rule_conformance()
