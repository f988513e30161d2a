"""Counting what compiling backends do in a run: how often they compile, and how often they leave their graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deltaloom.graph.errors import CompileError, require
from deltaloom.passes.kernel import CountsCompilations
from deltaloom.runtime.model import Model

TOKENS = (5, 1, 1, 3, 1)
"""Tokens of the calls of one state: every class of sizes, and each a second time in other sizes."""


@dataclass(frozen=True)
class Compilations:
    """How often a backend compiled, by name of the emitted function (prefill and decode have functions of one name), and how often
    it broke a graph to run a part of it in Python."""

    compilations: Mapping[str, int]
    graph_breaks: int


def count_compilations(model: Model) -> dict[str, Compilations]:
    """By backend, what a run of ``model`` for one and for two sequences, by one and by several tokens, made it do. ``CompileError``
    where no backend of the model compiles."""
    backends = {one.name: one for one in model.ctx.backends if isinstance(one, CountsCompilations)}
    names = ", ".join(one.name for one in model.ctx.backends)
    require(bool(backends), f"none of the model's backends ({names}) compiles; use --backend inductor", CompileError)
    breaks = {name: one.graph_breaks() for name, one in backends.items()}
    for batch in (1, 2, 3):
        state = model.new_state(batch)
        for tokens in TOKENS:
            model.forward(np.ones((batch, tokens), np.int64), state=state, logits="last")
    return {name: Compilations(one.compilations(), one.graph_breaks() - breaks[name]) for name, one in backends.items()}
