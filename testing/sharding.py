"""Sharding strings, proved by simulation: cut a factor over ranks, run the reference on each, put the outputs together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaloom.graph.errors import GraphError
from deltaloom.graph.interpret import type_of
from deltaloom.graph.op import Array, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import TensorType
from deltaloom.ops.collectives import Shard
from deltaloom.ops.factors import Factors, Operand, parse_factors
from deltaloom.ops.quantized import plain
from deltaloom.passes.shard.cuts import Division, Piece
from deltaloom.passes.shard.layout import Layout
from deltaloom.testing.evaluate import Value, reference
from deltaloom.testing.measure import assert_close

RANKS = (2, 4)


def read_factors(op: Op, arrays: tuple[Value, ...], whole: tuple[Value, ...]) -> Factors | None:
    """The op's sharding string for these inputs and outputs; None if it has none."""
    text = op.factors(*map(type_of, arrays))
    return None if text is None else parse_factors(text, tuple(len(a.shape) for a in arrays), tuple(len(a.shape) for a in whole))


def check_sharding(op: Op, arrays: tuple[Value, ...], ranks: int) -> tuple[str, ...]:
    """Cut every factor that ``ranks`` divide, one at a time, and the ``+`` inputs into summands; ``AssertionError`` where the
    outputs differ from those of one rank. Returns the factors that were cut. Plain ``arrays`` are float64; quantised ones are
    cut at borders of their blocks alone."""
    whole = reference(op, arrays)
    factors = read_factors(op, arrays, whole)
    if factors is None:
        return ()
    _check_summands(op, factors, arrays, whole)
    sizes = factors.sizes([a.shape for a in arrays], [a.shape for a in whole])
    cut = []
    for factor in factors.cuttable:
        size = sizes[factor]
        assert isinstance(size, int)
        if size > 1 and size % ranks == 0:
            division = Division(sizes, {factor: (Piece(size, ranks),)})
            inputs = [_layout(operand, division, array) for operand, array in zip(factors.inputs, arrays)]
            if all(_divides(layout, array, ranks) for layout, array in zip(inputs, arrays)):
                _check_factor(op, factors, division, inputs, arrays, whole, ranks)
                cut.append(factor)
    return tuple(cut)


def _check_factor(
    op: Op,
    factors: Factors,
    division: Division,
    inputs: Sequence[Layout],
    arrays: tuple[Value, ...],
    whole: tuple[Value, ...],
    ranks: int,
) -> None:
    (factor,) = division.cuts
    summed = factors.summed(factor)
    outputs = [Layout(_layout(operand, division, array).cuts, summed) for operand, array in zip(factors.outputs, whole)]
    local = op.resized(*(layout.local(type_of(array)) for layout, array in zip(outputs, whole)))
    results = []
    for rank in range(ranks):
        own = tuple(
            np.zeros(array.shape) if summed and operand.added and rank and layout.whole else _part(layout, array, rank, ranks)
            for operand, layout, array in zip(factors.inputs, inputs, arrays)
        )
        results.append(_run(f"{local}, factor {factor} cut over {ranks} ranks", local, own))
    for position, (layout, truth) in enumerate(zip(outputs, whole)):
        parts, expected = [_plain(result[position]) for result in results], _plain(truth)
        for found in parts if layout.whole else [layout.assemble(parts)]:
            assert_close(f"output {position} of {op}, factor {factor} cut over {ranks} ranks", found, expected, expected)


def _run(what: str, op: Op, arrays: tuple[Value, ...]) -> tuple[Value, ...]:
    """The results on one rank, where the op must accept what the string gives it and keep its promise of types."""
    types: tuple[TensorType, ...] = tuple(map(type_of, arrays))
    try:
        inferred = op.output_types(*types)
    except GraphError as error:
        raise AssertionError(f"{what} refuses {', '.join(map(str, types))}: {error}") from error
    results = reference(op, arrays)
    assert tuple(map(type_of, results)) == inferred, f"{what} computes other types than it infers"
    return results


def _divides(layout: Layout, array: Value, ranks: int) -> bool:
    """Whether an array can be cut so: a quantised one has no parts inside a block."""
    try:
        for axis, cut in layout.cuts.items() if isinstance(array, QuantizedArray) else ():
            Shard("tp", ranks, 0, axis, cut).infer(type_of(array))
    except GraphError:
        return False
    return True


def _part(layout: Layout, array: Value, rank: int, ranks: int) -> Value:
    if not isinstance(array, QuantizedArray):
        return layout.part(array, rank, ranks)
    for axis, cut in layout.cuts.items():
        array = Shard("tp", ranks, rank, axis, cut).on_rank(rank, array)
    return array


def _plain(array: Value) -> Array:
    return plain(array, np.dtype(np.float64)) if isinstance(array, QuantizedArray) else array


def _layout(operand: Operand, division: Division, array: Value) -> Layout:
    cuts = {axis: division.axis(factors) for axis, factors in enumerate(operand.axes) if array.shape[axis] != 1}
    return Layout({axis: cut for axis, cut in cuts.items() if cut})


def _check_summands(op: Op, factors: Factors, arrays: tuple[Value, ...], whole: tuple[Value, ...]) -> None:
    """Two ranks with a part of each summand, element by element another part, give parts of the result. A summand that is
    quantised has no such parts."""
    added = {place: array for place, (array, operand) in enumerate(zip(arrays, factors.inputs)) if operand.added}
    first, second = list(arrays), list(arrays)
    for place, array in added.items():
        if isinstance(array, QuantizedArray):
            return
        share = array * np.random.default_rng(place).random(array.shape)
        first[place], second[place] = share, array - share
    results = zip(reference(op, tuple(first)), reference(op, tuple(second)), whole) if added else ()
    for position, result in enumerate(results):
        one, other, truth = map(_plain, result)
        assert_close(f"output {position} of {op}, from two summands", np.asarray(one + other), truth, truth)
