"""The compile driver: one symbolic graph in, the programs that a runtime asks for out."""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.graph.ir import Graph
from deltaloom.passes.assign import Assign, LayoutKey
from deltaloom.passes.canonicalise import Canonicalise
from deltaloom.passes.emit import Program, emit
from deltaloom.passes.lift_weights import LiftWeights
from deltaloom.passes.pack_siblings import PackSiblings
from deltaloom.passes.pipeline import Compiled, Context, LedgerRow, Pass, run_pipeline
from deltaloom.passes.prepack import Conflict, decide_layouts
from deltaloom.passes.segment import Transfers
from deltaloom.passes.specialise import AssumeUnpadded, SelectOutputs, Specialise

SHARED: tuple[Pass, ...] = (Canonicalise(), PackSiblings(), LiftWeights())
"""What changes the layout of a weight or a state happens here, once, before the programs fork."""


@dataclass(frozen=True)
class Variant:
    """Which program of a model: one token a step or many, with padding or without, and its outputs."""

    decode: bool
    padded: bool
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'decode' if self.decode else 'prefill'}{'_padded' if self.padded else ''}"


class Driver:
    """Compiles the programs of one model graph on demand; all of them share weights in one layout."""

    def __init__(self, graph: Graph, ctx: Context, *, planned: tuple[Variant, ...]) -> None:
        """``planned``: the variants whose kernels decide the layouts of weights."""
        self.ctx = ctx
        self.shared: Compiled = run_pipeline(graph, SHARED, ctx)
        self.ledgers: dict[str, tuple[LedgerRow, ...]] = {"shared": self.shared.ledger}
        self._programs: dict[Variant, Program] = {}
        forks = [self._place(variant, {}).graph for variant in planned]
        self.layouts: dict[LayoutKey, tuple[int, ...]]
        self.conflicts: tuple[Conflict, ...]
        self.layouts, self.conflicts = decide_layouts(forks)

    def program(self, variant: Variant) -> Program:
        """The compiled program of ``variant``, made when first asked for."""
        if variant not in self._programs:
            done = self._place(variant, self.layouts, Transfers())
            self.ledgers[f"{variant} -> {', '.join(variant.outputs)}"] = done.ledger
            self._programs[variant] = emit(done.graph, self.ctx, str(variant))
        return self._programs[variant]

    def _place(self, variant: Variant, layouts: dict[LayoutKey, tuple[int, ...]], *last: Pass) -> Compiled:
        graph = self.shared.graph
        passes: list[Pass] = [SelectOutputs(variant.outputs)]
        if not variant.padded:
            passes.append(AssumeUnpadded())
        passes += [Specialise(1 if variant.decode else None), Assign(layouts), *last]
        title = f"{variant}-{variant.outputs[-1] if variant.outputs else 'state'}"
        return run_pipeline(graph, passes, self.ctx, properties=self.shared.properties, title=title)
