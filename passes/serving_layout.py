"""Serving layout: from ``[batch, seq]`` and a state for each row to one row of packed tokens and pools of slots and blocks.

What the inputs of a program in this layout mean is in ``deltaloom.ops.serving``. Besides those that its ops read, the top level
takes the token ids and positions ``[1, tokens]`` and, where tokens are chosen, ``logit_rows`` i32 [rows].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from deltaloom.graph.dims import Dim, symbol
from deltaloom.graph.errors import CompileError, require
from deltaloom.graph.ir import Call, Graph, Node, State, Value
from deltaloom.graph.registry import ops
from deltaloom.graph.types import TensorType, i32
from deltaloom.ops.serving import ServingForm, TakeRows, serving_forms
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.pipeline import Context, Pass
from deltaloom.passes.specialise import AssumeUnpadded
from deltaloom.passes.table import SERVING, Step, without

TOKENS = symbol("tokens")
SEQS = symbol("seqs")
ROWS = symbol("rows")
SLOTS = symbol("slots")
BLOCKS = symbol("blocks")
MAX_BLOCKS = symbol("max_blocks")
BLOCK_SIZE = 16
"""Positions of a block, unless asked otherwise."""


@dataclass(frozen=True)
class ServingLayout(Pass):
    """Give every op with state its serving form: ``valid`` goes, a fixed state becomes a pool ``[slots, ...]``, a growing one a
    pool ``[blocks, ...]`` with ``block_size`` entries in the place of its growing axis, and calls pass what the forms read.

    ``tokens_each`` is the number of tokens that every sequence has in a step; None: any, by ``query_starts``. With it all tokens
    are taken where the last one was (``take_last``), without it those of ``logit_rows``. Raises ``CompileError`` for a graph
    without the symbols ``batch`` and ``seq``, and for an op with state that has no serving form."""

    name = "serving_layout"
    establishes = ("padding_decided", "serving")
    given = ("tokens_each", "block_size")
    tokens_each: int | None = None
    block_size: int = BLOCK_SIZE

    def run(self, graph: Graph, ctx: Context) -> Graph:
        require(self.block_size >= 1, f"block_size is {self.block_size}, expected at least 1", CompileError)
        each = self.tokens_each
        require(each is None or each >= 1, f"tokens_each is {each}, expected at least 1 or None", CompileError)
        graph = AssumeUnpadded().run(graph, ctx)
        missing = sorted({"batch", "seq"}.difference(graph.symbols()))
        require(
            not missing,
            f"graph '{graph.name}' has no symbol {' and '.join(missing)}; lay it out for serving before sizes are specialised",
            CompileError,
        )
        layout = _Layout(self.tokens_each, self.block_size, serving_forms(ops))
        graph = graph.substitute({"batch": 1, "seq": layout.tokens})
        regions = {name: layout.laid_out(region, {}) for name, region in graph.regions.items()}
        return layout.laid_out(graph, regions)


@dataclass(frozen=True)
class _Layout:
    """The new types, and the rewriting of one graph after the other."""

    tokens_each: int | None
    block_size: int
    forms: dict[str, type[ServingForm]] = field(default_factory=dict)

    @property
    def tokens(self) -> Dim:
        """Tokens of a step."""
        return TOKENS if self.tokens_each is None else self.tokens_each * SEQS

    def inputs(self) -> dict[str, TensorType]:
        """What a program may take besides the inputs of the model, in the order in which it takes them."""
        types = {
            "block_tables": i32[SEQS, MAX_BLOCKS],
            "context_lengths": i32[SEQS],
            "read_slots": i32[SEQS],
            "write_slots": i32[self.tokens],
        }
        return types if self.tokens_each is not None else {**types, "query_starts": i32[SEQS + 1], "logit_rows": i32[ROWS]}

    def pool(self, state: State) -> State:
        """The pool in the place of a state."""
        shape = list(state.value.type.shape)
        shape[0] = SLOTS if state.append_axis is None else BLOCKS
        if state.append_axis is not None:
            shape[state.append_axis] = self.block_size
        return State(replace(state.value, type=state.value.type.with_shape(*shape)))

    def laid_out(self, graph: Graph, regions: dict[str, Graph]) -> Graph:
        """``graph`` with serving forms; its calls run ``regions``, which are laid out already."""
        own = {name: Value(name, type_, "input") for name, type_ in self.inputs().items()}
        pools = tuple(self.pool(state) for state in graph.states)
        swap = {old.value: new.value for old, new in zip(graph.states, pools, strict=True)}
        nodes: list[Node] = []
        for node in graph.nodes:
            node = replace(node, inputs=tuple(swap.get(value, value) for value in node.inputs))
            if node.op.name == "take_last":
                if self.tokens_each is not None:
                    swap[node.outputs[0]] = node.inputs[0]
                    continue
                node = replace(node, op=TakeRows(), inputs=(*node.inputs, own["logit_rows"]))
            elif isinstance(node.op, Call):
                wanted = regions[node.op.region].inputs[len(node.inputs) :]
                node = replace(node, inputs=(*node.inputs, *(own[value.name] for value in wanted)))
            elif node.op.updates:
                node = self._form(node, own)
            types = replace(graph, regions=regions).node_types(node)
            outputs = tuple(replace(value, type=type_) for value, type_ in zip(node.outputs, types, strict=True))
            swap.update(zip(node.outputs, outputs, strict=True))
            nodes.append(replace(node, outputs=outputs))
        used = {value for node in nodes for value in node.inputs}
        return replace(
            graph,
            inputs=(*graph.inputs, *(value for value in own.values() if value in used)),
            states=pools,
            nodes=tuple(nodes),
            outputs=_exchanged(graph.outputs, swap),
            updates=_exchanged(graph.updates, swap),
            regions=regions,
        )

    def _form(self, node: Node, own: dict[str, Value]) -> Node:
        """A node with state as its serving form."""
        form = self.forms.get(node.op.name)
        if form is None:
            raise CompileError(
                f"%{node.name} = {node.op.name} keeps a state and has no serving form, so graph nodes like it cannot serve packed "
                f"sequences; register an op with base = '{node.op.name}' (deltaloom.ops.serving.ServingForm)"
            )
        attributes: dict[str, object] = dict(node.op.attributes())
        layout = tuple(own[name] for name in form.layout if name in own)
        return replace(node, op=form(**attributes), inputs=(*node.inputs, *layout))


def _exchanged(pairs: Iterable[tuple[str, Value]], swap: dict[Value, Value]) -> tuple[tuple[str, Value], ...]:
    return tuple((name, swap.get(value, value)) for name, value in pairs)


ServingKind = Literal["mixed", "decode", "verify"]


@dataclass(frozen=True)
class ServingVariant:
    """Which serving program of a model: ``mixed`` for any number of tokens a sequence, ``decode`` for one, ``verify`` for one and
    ``drafts`` more. A sequence with fewer drafts fills up with any tokens that write no slot; their keys and values lie behind
    the position that is committed in the end and are overwritten. ``outputs`` are names of the model graph; ``last_logits``
    and its like hold the tokens of ``logit_rows`` in a mixed program and all tokens in the others."""

    kind: ServingKind
    outputs: tuple[str, ...]
    drafts: int = 0
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        known = get_args(ServingKind)
        require(self.kind in known, f"there is no serving program '{self.kind}'; there are {', '.join(known)}", CompileError)
        fits = self.drafts >= 1 if self.kind == "verify" else self.drafts == 0
        wanted = "at least 1" if self.kind == "verify" else "0"
        require(fits, f"a {self.kind} program with {self.drafts} drafts: expected {wanted}", CompileError)

    def __str__(self) -> str:
        return f"{self.kind}{self.drafts or ''}"

    @property
    def tokens_each(self) -> int | None:
        """Tokens of every sequence in a step; None: any."""
        return None if self.kind == "mixed" else 1 + self.drafts

    @property
    def title(self) -> str:
        """The program and its outputs, as ledgers name it."""
        return f"{self} -> {', '.join(self.outputs)}"

    @property
    def facts(self) -> dict[str, object]:
        """What the passes of a serving program are given."""
        return {"outputs": self.outputs, "tokens_each": self.tokens_each, "block_size": self.block_size}

    def steps(self, config: CompileConfig) -> tuple[Step, ...]:
        """The passes from the shared graph to this program's."""
        return without(SERVING, config.skip)
