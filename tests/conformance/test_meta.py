"""The registry and the kit are complete: nothing that an op promises goes unchecked."""

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
from deltaloom.testing.laws import check_law
from deltaloom.testing.sharding import check_sharding, read_factors

BUILT_IN = [ops.get(name) for name in sorted(deltaloom.ops.TABLE)]
UNEVEN_OUTPUTS = {"qkv_norm_rope", "split"}
"""Ops whose number of outputs is in their attributes."""


@pytest.mark.parametrize("op", BUILT_IN, ids=lambda op: op.name)
def test_an_op_is_complete(op: type[Op]) -> None:
    assert op.reference is not None and op.cases is not None
    assert (op.decompose if issubclass(op, Fused) else op.torch) is not None
    assert op.__doc__ and op.__doc__.splitlines()[0].endswith((".", ";", "``"))
    case = draw_case(op, SeededDraw(0))
    outputs = case.op.output_types(*map(type_of, concrete(case, f64)))
    if op.name not in UNEVEN_OUTPUTS:
        assert len(op.outputs) == len(outputs) == len(set(op.outputs))
    assert set(op.updates) <= set(op.input_names())
    assert all(0 < output < len(outputs) for output in op.updates.values())
    assert set(op.appends) <= set(op.updates)


def test_every_name_of_the_table_is_its_class_name() -> None:
    assert {op.name for op in BUILT_IN} == set(deltaloom.ops.TABLE)


@pytest.mark.parametrize("kind", get_args(Law), ids=lambda kind: kind.__name__)
def test_every_law_is_checked(kind: type[Law]) -> None:
    with_law = [(op, law) for op in BUILT_IN for law in op.laws if isinstance(law, kind)]
    assert with_law
    for op, law in with_law:
        said = 0
        for seed in range(20):
            draw = SeededDraw(seed)
            case = draw_case(op, draw)
            said += check_law(law, case.op, in_float64(concrete(case, f64)), draw)
        assert said, f"no case of {op.name} has anything to do with {law}"


@pytest.mark.parametrize("op", BUILT_IN, ids=lambda op: op.name)
def test_every_factor_is_cut_once(op: type[Op]) -> None:
    """Every op has a sharding string, and the kit's check gets to each factor that it says may be divided."""
    cut: set[str] = set()
    known: set[str] = set()
    for seed in range(40):
        case = draw_case(op, SeededDraw(seed, sizes=(2, 4, 8, 16)))
        arrays = in_float64(concrete(case, f64))
        factors = read_factors(case.op, arrays, reference(case.op, arrays))
        assert factors is not None, f"{op.name} has no sharding string"
        known |= set(factors.cuttable)
        cut |= set(check_sharding(case.op, arrays, 2))
    assert cut == known
