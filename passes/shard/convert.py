"""From one form of a value on the ranks to another: the collectives, and what a rank does alone."""

from __future__ import annotations

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Node, Value
from deltaloom.graph.naming import free_name
from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.passes.shard.cuts import Cut, Piece
from deltaloom.passes.shard.layout import WHOLE, Layout, plain_axis


class Converter:
    """Writes nodes over the ranks of one mesh axis; ``taken`` are names that new values may not have."""

    def __init__(self, mesh: str, ranks: int, taken: set[str]) -> None:
        self.mesh = mesh
        self.ranks = ranks
        self.taken = taken
        self.nodes: list[Node] = []
        self._known: dict[tuple[Value, Layout], Value] = {}

    def __call__(self, value: Value, own: Layout, wanted: Layout) -> Value:
        """``value``, which has the form ``own``, in the form ``wanted``. Each conversion is made once."""
        if own == wanted:
            return value
        key = (value, wanted)
        if key not in self._known:
            self._known[key] = self._convert(value, own, wanted)
        return self._known[key]

    def _convert(self, value: Value, own: Layout, wanted: Layout) -> Value:
        if not own.whole:
            direct = self._direct(value, own, wanted)
            return self(self._whole(value, own), WHOLE, wanted) if direct is None else direct
        if wanted.partial:
            return self._node(self._op("on_first_rank"), value, "summand", wanted)
        done: dict[int, Cut] = {}
        for axis, cut in sorted(wanted.cuts.items()):
            done[axis] = cut
            value = self._node(self._op("shard", axis=axis, pieces=tuple(map(tuple, cut))), value, "shard", Layout(dict(done)))
        return value

    def _direct(self, value: Value, own: Layout, wanted: Layout) -> Value | None:
        """The one collective that does it without making the whole value, if there is one."""
        if len(wanted.cuts) != 1:
            return None
        ((axis, cut),) = wanted.cuts.items()
        if not plain_axis(cut, self.ranks):
            return None
        if own.partial:
            return self._node(self._op("reduce_scatter", axis=axis), value, "scattered", wanted)
        if len(own.cuts) == 1 and axis not in own.cuts:
            ((old, before),) = own.cuts.items()
            if plain_axis(before, self.ranks):
                return self._node(self._op("all_to_all", split_axis=axis, concat_axis=old), value, "turned", wanted)
        return None

    def _whole(self, value: Value, own: Layout) -> Value:
        """The whole value, by an exchange; made once."""
        key = (value, WHOLE)
        if key in self._known:
            return self._known[key]
        if own.partial:
            whole = self._node(self._op("all_reduce"), value, "reduced", WHOLE)
        else:
            whole, left = value, dict(own.cuts)
            for axis, cut in sorted(own.cuts.items()):
                del left[axis]
                whole = self._gathered(whole, axis, cut, Layout(left))
        self._known[key] = whole
        return whole

    def _gathered(self, value: Value, axis: int, cut: Cut, after: Layout) -> Value:
        """One axis put together, piece by piece."""
        if len(cut) == 1:
            return self._gather(value, axis, cut[0], after)
        split = self._op_of("split", sizes=tuple(piece.local for piece in cut), axis=axis)
        local = [Layout({**after.cuts, axis: (piece,)} if piece.parts > 1 else after.cuts) for piece in cut]
        parts = self._nodes(split, value, "pieces", [layout.text(self.mesh, self.ranks) for layout in local])
        found = [part if piece.parts == 1 else self._gather(part, axis, piece, after) for part, piece in zip(parts, cut)]
        concat = self._op_of("concat", axis=axis)
        (whole,) = self._write(concat, found, f"{value.name}.whole", [after.text(self.mesh, self.ranks)])
        return whole

    def _gather(self, value: Value, axis: int, piece: Piece, after: Layout) -> Value:
        if piece.outer != 1:
            raise GraphError(
                f"{value}: {value.type} is divided in {piece.parts} behind {piece.outer} along axis {axis}, and no collective "
                "puts that together; divide the axis, or what it is made of, over all ranks"
            )
        copies = self.ranks // piece.parts
        return self._node(self._op("all_gather", axis=axis, copies=copies), value, "gathered", after)

    def _op(self, name: str, **attributes: object) -> Op:
        return self._op_of(name, mesh=self.mesh, ranks=self.ranks, **attributes)

    def _op_of(self, name: str, **attributes: object) -> Op:
        return ops.get(name)(**attributes)

    def _node(self, op: Op, value: Value, suffix: str, layout: Layout) -> Value:
        (made,) = self._nodes(op, value, suffix, [layout.text(self.mesh, self.ranks)])
        return made

    def _nodes(self, op: Op, value: Value, suffix: str, shardings: list[str]) -> tuple[Value, ...]:
        return self._write(op, [value], f"{value.name}.{suffix}", shardings)

    def _write(self, op: Op, inputs: list[Value], name: str, shardings: list[str]) -> tuple[Value, ...]:
        types = op.output_types(*(value.type for value in inputs))
        others = [part for part in inputs[0].sharding.split(", ") if part and not part.startswith(f"{self.mesh}:")]
        outputs = []
        for type_, sharding in zip(types, shardings, strict=True):
            divided = ", ".join([*others, sharding] if sharding else others)
            outputs.append(Value(free_name(name, self.taken), type_, sharding=divided))
            self.taken.add(outputs[-1].name)
        origins = tuple(dict.fromkeys(value.name for value in inputs))
        scope = inputs[0].name.rpartition(".")[0]
        self.nodes.append(Node(op, tuple(inputs), tuple(outputs), scope, "", origins))
        return tuple(outputs)
