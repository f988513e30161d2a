"""Rewrite rules: what to look for and what to put there, both in the builder's own syntax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from deltaloom.graph.errors import CompileError
from deltaloom.graph.op import Array, Attribute, Draw
from deltaloom.graph.registry import Registry
from deltaloom.graph.types import DType
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.pattern import Pattern, record


@dataclass(frozen=True)
class Example:
    """Values for a pattern's inputs, in order (optional ones at the end may be missing), and for its ``Any`` attributes. ``dtypes``
    as in ``deltaloom.graph.op.Case``."""

    arrays: tuple[Array, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    dtypes: tuple[DType | None, ...] = ()


class Rule:
    """One rewrite; a rule has no state. Every value that ``pattern`` gives is replaced by what ``rewrite`` gives in its place, and
    may be used anywhere. What else the matched nodes compute must be used by them alone, which the matcher checks."""

    name: ClassVar[str]
    root: ClassVar[str | None] = None
    """The op at which the search begins and whose nodes get near misses reported: one that is rare. None: the pattern's last."""
    pattern: ClassVar[Callable[..., Any]]
    """``(self, g, *values)``: what to look for, with ``g`` a ``PatternGraph``. The parameters name the inputs; those with the
    default None are optional."""
    rewrite: ClassVar[Callable[..., Any]]
    """``(self, g, m)``: the replacement, with ``g`` a graph builder and ``m`` a ``Match``; as many values as ``pattern`` gives."""

    def check(self, m: Match) -> str | None:
        """Why a match must stay as it is, as a sentence; None if it may be rewritten."""
        return None

    def examples(self, draw: Draw) -> Example:
        """Inputs for which the pattern is evaluated before and after the rewrite, to prove that it changes no result."""
        raise CompileError(f"rule {self.name} has no examples, so nothing proves that it keeps the meaning")

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """The recorded patterns, one for every choice of optional inputs."""
        return record(self.name, self.pattern, self.root)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


rules: Registry[Rule] = Registry("rewrite rule", Rule, "rules")
"""The rules of this process; ``deltaloom.passes.fuse`` puts the built-in table into it when it is imported."""
