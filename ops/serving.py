"""Serving forms: ops with state over many sequences packed into one row of tokens, their states in shared pools.

A serving form takes the inputs of its base op, each ``[1, tokens, ...]`` with the tokens of all sequences one after the other,
a pool in the place of each state, and, by name:

- ``query_starts`` i32 [seqs + 1]: sequence s has the tokens query_starts[s] to query_starts[s + 1] - 1, perhaps none. Tokens from
  query_starts[seqs] on are padding: their output is 0 and they write nothing. Without it every sequence has tokens / seqs of them.
- ``read_slots`` i32 [seqs]: the slot of the pool [slots, ...] that holds a sequence's state before this step; -1: it starts at 0.
- ``write_slots`` i32 [tokens]: the slot that gets the sequence's state after this token; -1: none.
- ``block_tables`` i32 [seqs, max_blocks]: the position p of a sequence lies in the block block_tables[s, p // block_size] of the
  pool [blocks, heads, block_size, width], at place p % block_size. Entries beyond the last position are not looked at.
- ``context_lengths`` i32 [seqs]: positions of a sequence before this step.

Reads see the pool of slots as it was before the step. Several sequences may read one slot; one that is written is read by the
same sequence or by nobody, so that a kernel may advance a state where it lies. No two tokens of a step write the same slot or the
same place of a block, and no sequence writes to a block that another one reads, but for slot 0 and block 0: these are scratch for
padding rows, and nothing that counts is ever read there.

The reference of a serving form is a loop over the sequences that calls the reference of its base op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.builder import GraphBuilder, OpMethod
from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import GraphError, require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.registry import OpRegistry, ops
from deltaloom.graph.types import TensorType, i32
from deltaloom.ops.signature import Axes, has_dtype


class ServingForm(Op):
    """An op that serves many sequences at once what its ``base`` op does for a batch. It has the attributes of the base op; its
    inputs are those of the base op without ``valid``, then ``layout``, of which ``query_starts``, the last, is optional."""

    base: ClassVar[str]
    layout: ClassVar[tuple[str, ...]]

    def one(self) -> Any:
        """The base op with the same attributes."""
        base: Any = ops.get(self.base)
        return base(**self.attributes())


def serving_forms(registry: OpRegistry) -> dict[str, type[ServingForm]]:
    """Base op -> its serving form."""
    return {op.base: op for op in registry if issubclass(op, ServingForm)}


class ServingBuilder:
    """A builder that puts the serving form of every op with state in its place, so that the decomposition of a base op becomes
    that of its serving form. ``layout``: the inputs that serving forms take, by name."""

    def __init__(self, builder: GraphBuilder, layout: dict[str, Any]) -> None:
        self._builder = builder
        self._layout = layout
        self._forms = serving_forms(ops)

    def __getattr__(self, name: str) -> Any:
        if name in vars(self._builder) or hasattr(type(self._builder), name):
            return getattr(self._builder, name)
        return ops.attribute(name, self._method)

    def _method(self, op: type[Op]) -> Callable[..., Any]:
        form = self._forms.get(op.name)
        if form is None:
            return OpMethod(self._builder, op)

        def packed(*inputs: Any, **attributes: Any) -> Any:
            layout = [self._layout[key] for key in form.layout if key in self._layout]
            return OpMethod(self._builder, form)(*inputs, *layout, **attributes)

        return packed


def layout_of(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """``values`` by name; ``query_starts``, the last, may be None and is left out then."""
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


# Rules that serving forms share.


def bind_layout(axes: Axes, tokens: TensorType, layout: dict[str, TensorType]) -> None:
    """Check the layout inputs against each other and against the first input, ``tokens`` [1, tokens, ...]."""
    shapes = {
        "read_slots": "seqs",
        "write_slots": "tokens",
        "block_tables": "seqs max_blocks",
        "context_lengths": "seqs",
        "query_starts": "seqs+1",
    }
    for name, type_ in layout.items():
        has_dtype(name, type_, i32, "for numbers of tokens, slots or blocks")
        axes.bind(name, type_, shapes[name])
    if "query_starts" in layout:
        starts = layout["query_starts"]
        require(axes["seqs+1"] == axes["seqs"] + 1, f"query_starts {starts} should be one longer than {axes['seqs']} sequences")
    else:
        tokens_each(tokens.shape[1], axes["seqs"])


def tokens_each(tokens: Dim, seqs: Dim) -> int:
    """How many of ``tokens`` each of ``seqs`` sequences has where all have as many; ``GraphError`` where that is no number."""
    first, of = (size if isinstance(size, int) else size.terms[0][1] for size in (tokens, seqs))
    each = first // of if of else 0
    if each < 1 or each * seqs != tokens:
        raise GraphError(f"{tokens} tokens are no whole number for each of {seqs} sequences; give query_starts")
    return each


def sequence_bounds(tokens: int, seqs: int, query_starts: Iterable[Any] | None) -> list[int]:
    """Where the sequences begin and the last one ends: seqs + 1 numbers. ``query_starts`` is an array or a tensor."""
    if query_starts is None:
        return list(range(0, tokens + 1, tokens // seqs))
    return [int(start) for start in query_starts]


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of a sequence; the state after them goes to ``slot`` (-1: to none)."""

    start: int
    stop: int
    slot: int


def pieces(start: int, stop: int, write_slots: Sequence[int]) -> Iterator[Piece]:
    """The tokens of one sequence, cut behind every token that writes its state."""
    for token in range(start, stop):
        if write_slots[token] >= 0 or token == stop - 1:
            yield Piece(start, token + 1, write_slots[token])
            start = token + 1


def run_packed(
    op: Any, sequence: Sequence[Array], fixed: Sequence[Array], pool: Array, out: Array, layout: dict[str, Array]
) -> tuple[Array, Array]:
    """The reference of a form with one slot pool: fills ``out`` [1, tokens, ...] and gives it with the new pool. ``op`` is the base
    op, whose inputs are those of ``sequence``, cut into tokens along axis 1, then ``fixed``, then the state."""
    writes = layout["write_slots"].tolist()
    bounds = sequence_bounds(out.shape[1], len(layout["read_slots"]), layout.get("query_starts"))
    new_pool = pool.copy()
    for read, start, stop in zip(layout["read_slots"].tolist(), bounds, bounds[1:]):
        state = pool[read : read + 1] if read >= 0 else np.zeros_like(pool[:1])
        for piece in pieces(start, stop, writes):
            now = slice(piece.start, piece.stop)
            out[:, now], state = op.reference(*(x[:, now] for x in sequence), *fixed, state)
            if piece.slot >= 0:
                new_pool[piece.slot] = state[0]
    return out, new_pool


class TakeRows(Op):
    """The chosen tokens of x [1, tokens, ...], as [1, rows, ...]: out[0, i] = x[0, rows[i]]."""

    name: ClassVar[str] = "take_rows"
    sharding: ClassVar[str] = "1 t! ..., r! -> 1 r! ..."

    def infer(self, x: TensorType, rows: TensorType) -> TensorType:
        axes = Axes()
        axes.bind("x", x, "1 tokens ...")
        axes.bind("rows", rows, "rows")
        has_dtype("rows", rows, i32, "for numbers of tokens")
        return TensorType(x.plain_dtype, (1, rows.shape[0], *x.shape[2:]))

    def reference(self, x: Array, rows: Array) -> Array:
        return x[:, rows]

    def torch(self, torch: Any, x: Any, rows: Any) -> Any:
        return x.index_select(1, rows)

    def cost(self, x: TensorType, rows: TensorType) -> Cost:
        return Cost(0, rows.nbytes() + 2 * self.infer(x, rows).nbytes())

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        tokens = draw.size(17)
        x = draw.normal(1, tokens, *(draw.size(17) for _ in range(draw.integer(0, 2))))
        return Case(cls(), (x, draw.integers(0, tokens - 1, draw.size()).astype(np.int32)))
