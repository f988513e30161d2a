"""What a plugin or a part of it claims, so that the kit knows what it has to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from deltaloom.graph.errors import ConfigError, require

FEATURES: Mapping[str, str] = {
    "decompose": "an op: it can be taken apart into smaller ops",
    "torch": "an op: it has a torch rule",
    "onnx": "an op: it has an ONNX rule",
    "laws": "an op: it states laws, such as that a sequence may be cut (streaming)",
    "commutative": "an op: its two inputs may change places",
    "sharding": "an op: it says how its axes may be divided over ranks",
    "float32": "a backend: it computes in float32",
    "float64": "a backend: it computes in float64",
    "bfloat16": "a backend: it computes in bfloat16, and holds tensors of it",
    "float16": "a backend: it computes in float16, and holds tensors of it",
    "quantised": "a backend: it holds weights of quantised types",
    "memory": "a backend: its kernels can be given parts of one block of memory",
    "states": "a backend: it runs whole programs, whose states go from call to call",
    "mixed": "a backend: its programs may have nodes on the NumPy backend",
    "meaning": "a pass: graphs compute the same after it",
    "idempotent": "a pass: run a second time, it changes nothing",
    "inventory": "a model: there is a published checkpoint whose tensors are known",
}
"""Feature -> what it means. A check that needs a feature is run where the feature is claimed."""

Verdict = Literal["run", "unclaimed", "missing", "limited"]


@dataclass(frozen=True)
class Requirements:
    """The claims of a plugin. ``claims`` None: a feature is claimed by having it (a ``torch`` rule, a dtype that ``compute_dtype``
    takes). With ``claims``, what is listed must be there, and what is not listed is skipped; both are counted in reports.

    ``limitations``: pattern of a check's title (as reports show it; ``*`` stands for any text) -> the reason why it is left out.
    ``ConfigError`` for a claim that is no feature."""

    claims: frozenset[str] | None = None
    limitations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.claims or ():
            known = f"known are {', '.join(FEATURES)}"
            require(name in FEATURES, f"'{name}' is claimed, but there is no such feature; {known}", ConfigError)

    def verdict(self, title: str, feature: str, present: bool) -> Verdict:
        """What becomes of the check ``title`` of ``feature`` ("": needed in any case), which is ``present`` or not."""
        if self.limitation(title):
            return "limited"
        if not feature:
            return "run"
        if self.claims is None:
            return "run" if present else "unclaimed"
        if feature not in self.claims:
            return "unclaimed"
        return "run" if present else "missing"

    def limitation(self, title: str) -> str:
        """The reason why the check ``title`` is left out, or nothing."""
        return next((reason for pattern, reason in self.limitations.items() if fnmatchcase(title, pattern)), "")


def claims(*features: str, limitations: Mapping[str, str] | None = None) -> Requirements:
    """Requirements with exactly these features: ``claims("float32", "states")``."""
    return Requirements(frozenset(features), limitations or {})
