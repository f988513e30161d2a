"""The conformance kit: the tests of ops, kernels, rewrite rules, passes, backends and models, ours and those of plugins.

The public names are imported when they are first used; they need the packages of the extra ``testing``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "deltaloom.testing":
    raise ImportError("import deltaloom.testing, not testing: this folder is the source of deltaloom.testing")

if TYPE_CHECKING:
    from deltaloom.testing.backend_suite import BackendSuite
    from deltaloom.testing.draw import CaseDraw, SeededDraw
    from deltaloom.testing.measure import FACTOR, FLOOR, assert_close
    from deltaloom.testing.model_suite import ModelSuite
    from deltaloom.testing.op_suite import OpSuite
    from deltaloom.testing.pass_suite import PassSuite
    from deltaloom.testing.requirements import FEATURES, Requirements, claims
    from deltaloom.testing.rule_suite import RuleSuite
    from deltaloom.testing.samples import dtypes, graphs, shapes
    from deltaloom.testing.selection import conformance
    from deltaloom.testing.suite import Check, Outcome, Suite, outcomes

_MODULES = {
    "FACTOR": "measure",
    "FEATURES": "requirements",
    "FLOOR": "measure",
    "BackendSuite": "backend_suite",
    "CaseDraw": "draw",
    "Check": "suite",
    "ModelSuite": "model_suite",
    "OpSuite": "op_suite",
    "Outcome": "suite",
    "PassSuite": "pass_suite",
    "Requirements": "requirements",
    "RuleSuite": "rule_suite",
    "SeededDraw": "draw",
    "Suite": "suite",
    "assert_close": "measure",
    "claims": "requirements",
    "conformance": "selection",
    "dtypes": "samples",
    "graphs": "samples",
    "outcomes": "suite",
    "shapes": "samples",
}

__all__ = [
    "FACTOR",
    "FEATURES",
    "FLOOR",
    "BackendSuite",
    "CaseDraw",
    "Check",
    "ModelSuite",
    "OpSuite",
    "Outcome",
    "PassSuite",
    "Requirements",
    "RuleSuite",
    "SeededDraw",
    "Suite",
    "assert_close",
    "claims",
    "conformance",
    "dtypes",
    "graphs",
    "outcomes",
    "shapes",
]


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it, once."""
    if name not in _MODULES:
        raise AttributeError(f"module 'deltaloom.testing' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value: object = getattr(import_module(f"deltaloom.testing.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
