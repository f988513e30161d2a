"""Sharding strings, proved by simulation: cut a factor over ranks, run the reference on each, put the outputs together."""

from __future__ import annotations

from math import prod

import numpy as np

from deltaloom.graph.op import Array, Op
from deltaloom.ops.factors import Factors, Operand, parse_factors
from deltaloom.testing.evaluate import Value, reference
from deltaloom.testing.measure import assert_close

RANKS = (2, 4)


def check_sharding(op: Op, arrays: tuple[Value, ...], ranks: int) -> tuple[str, ...]:
    """Cut every factor that ``ranks`` divide, one at a time; ``AssertionError`` where the outputs differ from those of one
    rank. Returns the factors that were cut. ``arrays`` are float64."""
    if op.sharding is None or not all(isinstance(array, np.ndarray) for array in arrays):
        return ()
    plain = tuple(array for array in arrays if isinstance(array, np.ndarray))
    whole = reference(op, plain)
    factors = parse_factors(op.sharding, [a.ndim for a in plain], [a.ndim for a in whole])
    sizes = factors.sizes([a.shape for a in plain])
    cut = tuple(f for f in factors.cuttable if sizes[f] > 1 and sizes[f] % ranks == 0)
    for factor in cut:
        results = [reference(op, _inputs(factors, plain, sizes, factor, rank, ranks)) for rank in range(ranks)]
        partial = not any(operand.find(factor) for operand in factors.outputs)
        for position, (operand, truth) in enumerate(zip(factors.outputs, whole)):
            name = f"output {position} of {op}, factor {factor} cut over {ranks} ranks"
            parts = [result[position] for result in results]
            if partial:
                parts = [np.asarray(sum(parts))]
            elif operand.find(factor):
                parts = [_join(parts, operand, sizes, factor, truth)]
            for part in parts:
                assert_close(name, part, truth, truth)
    return cut


def _inputs(
    factors: Factors, arrays: tuple[Array, ...], sizes: dict[str, int], factor: str, rank: int, ranks: int
) -> tuple[Array, ...]:
    """What one rank gets."""
    partial = not any(operand.find(factor) for operand in factors.outputs)
    given = []
    for operand, array in zip(factors.inputs, arrays):
        place = operand.find(factor)
        if place is not None and array.shape[place[0]] > 1:
            axis, position = place
            parts = _unfolded(operand, sizes, array, axis)
            block = np.split(parts, ranks, axis=axis + position)[rank]
            array = block.reshape(*array.shape[:axis], array.shape[axis] // ranks, *array.shape[axis + 1 :])
        elif partial and operand.added and rank > 0:
            array = np.zeros_like(array)
        given.append(array)
    return tuple(given)


def _join(results: list[Array], operand: Operand, sizes: dict[str, int], factor: str, truth: Array) -> Array:
    """The outputs of all ranks as one array, side by side along the factor."""
    place = operand.find(factor)
    assert place is not None
    axis, position = place
    smaller = {**sizes, factor: sizes[factor] // len(results)}
    parts = [_unfolded(operand, smaller, result, axis) for result in results]
    return np.concatenate(parts, axis=axis + position).reshape(truth.shape)


def _unfolded(operand: Operand, sizes: dict[str, int], array: Array, axis: int) -> Array:
    """``array`` with one axis taken apart into its factors."""
    inner = [sizes[f] for f in operand.axes[axis]]
    assert prod(inner) == array.shape[axis], f"axis {axis} of {array.shape} is not {operand.axes[axis]} = {inner}"
    return array.reshape(*array.shape[:axis], *inner, *array.shape[axis + 1 :])
