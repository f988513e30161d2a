"""The activation of the causal convolution."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.op import Draw
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Example, Rule


class FuseConvSilu(Rule):
    """silu directly after the causal convolution becomes its activation."""

    name: ClassVar[str] = "conv_silu"
    root: ClassVar[str] = "causal_conv1d"

    def pattern(self, g: Any, x: Any, weight: Any, state: Any) -> Any:
        y, new_state = g.causal_conv1d(x, weight, state)
        return g.silu(y), new_state

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.causal_conv1d(m.x, m.weight, m.state, activation="silu")

    def examples(self, draw: Draw) -> Example:
        batch, seq, channels, taps = draw.integer(1, 3), draw.size(), draw.size(), draw.integer(1, 4)
        arrays = (draw.normal(batch, seq, channels), draw.normal(channels, 1, taps), draw.normal(batch, channels, taps - 1))
        return Example(arrays)
