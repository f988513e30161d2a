"""What our own ops promise beyond what every op must: nothing of the kit goes unclaimed."""

from typing import get_args

import pytest

import deltaloom.ops
from deltaloom.graph.interpret import type_of
from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.graph.types import f64
from deltaloom.ops.fused import Fused
from deltaloom.ops.laws import Law
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.evaluate import concrete, draw_case, in_float64, reference
from deltaloom.testing.sharding import read_factors

BUILT_IN = [ops.get(name) for name in sorted(deltaloom.ops.TABLE)]
UNEVEN_OUTPUTS = {"qkv_norm_rope", "split"}
"""Ops whose number of outputs is in their attributes."""


@pytest.mark.parametrize("op", BUILT_IN, ids=lambda op: op.name)
def test_an_op_runs_on_torch_can_be_divided_and_names_its_outputs(op: type[Op]) -> None:
    assert (op.decompose if issubclass(op, Fused) else op.torch) is not None
    case = draw_case(op, SeededDraw(0))
    arrays = in_float64(concrete(case, f64))
    outputs = case.op.output_types(*map(type_of, arrays))
    assert read_factors(case.op, arrays, reference(case.op, arrays)) is not None
    if op.name not in UNEVEN_OUTPUTS:
        assert len(op.outputs) == len(outputs)


def test_every_name_of_the_table_is_its_class_name() -> None:
    assert {op.name for op in BUILT_IN} == set(deltaloom.ops.TABLE)


@pytest.mark.parametrize("kind", get_args(Law), ids=lambda kind: kind.__name__)
def test_every_law_is_stated_by_some_op(kind: type[Law]) -> None:
    assert any(isinstance(law, kind) for op in BUILT_IN for law in op.laws)
