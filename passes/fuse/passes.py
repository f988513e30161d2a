"""The passes that apply rewrite rules to a graph and its regions."""

from __future__ import annotations

from dataclasses import dataclass

import deltaloom.passes.fuse  # noqa: F401  (puts the built-in rules into the registry)
from deltaloom.graph.ir import Graph
from deltaloom.passes.pipeline import Context, Fuel, Pass
from deltaloom.passes.rewrite.engine import apply_rules
from deltaloom.passes.rewrite.rule import rules as registry

FOLD = ("conv_silu", "shared_expert")
"""Rules that must see the linears as the model has them, before siblings are packed."""

FUSE = (
    "add_rms_norm",
    "gated_attention",
    "gated_delta_net",
    "gated_qkv_norm_rope",
    "gated_router",
    "packed_swiglu",
    "qkv_norm_rope",
)
"""Rules for what packing leaves."""


@dataclass(frozen=True)
class Fuse(Pass):
    """Replace groups of nodes by fused ops, by rewrite rules: ``rules``, then, if ``plugins``, those of plugins. ``fuel`` ends the
    work after that many rewrites in all; without it, the configuration's is used up, which all passes share."""

    name = "fuse"
    requires = ("canonical",)
    establishes = ("fused",)
    rules: tuple[str, ...] = FUSE
    plugins: bool = True
    fuel: int | None = None

    def run(self, graph: Graph, ctx: Context) -> Graph:
        chosen = [registry.get(name)() for name in self.rules]
        chosen += [rule() for rule in registry.offered() if rule.name not in self.rules] if self.plugins else []
        fuel = ctx.fuel if self.fuel is None else Fuel(self.fuel)

        def one(part: Graph) -> Graph:
            changed, events = apply_rules(part, chosen, fuel)
            ctx.events.extend(events)
            return changed

        return one(graph.map_regions(one))


@dataclass(frozen=True)
class Fold(Fuse):
    """Fusions that come before packing."""

    name = "fold"
    establishes = ("folded",)
    excludes = ("packed", "lifted")
    rules: tuple[str, ...] = FOLD
    plugins: bool = False
