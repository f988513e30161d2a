"""What the conformance kit checks of an op: each check draws one case and raises ``AssertionError`` where it fails."""

from __future__ import annotations

import numpy as np

from deltaloom.graph.errors import GraphError
from deltaloom.graph.interpret import type_of
from deltaloom.graph.op import Array, Draw, Op
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.serialize import from_json, to_json
from deltaloom.graph.text import print_graph
from deltaloom.graph.types import DType, TensorType, bf16, bool_, f16, f32, f64, i32, i64
from deltaloom.passes.kernel import Backend, Kernel
from deltaloom.testing import kernels
from deltaloom.testing.evaluate import (
    Value,
    concrete,
    decomposed,
    draw_case,
    in_float64,
    one_node,
    reference,
    torch_rule,
)
from deltaloom.testing.laws import check_law
from deltaloom.testing.measure import assert_close
from deltaloom.testing.onnx_rule import onnx_rule
from deltaloom.testing.sharding import RANKS, check_sharding


def check_types(op: type[Op], draw: Draw) -> None:
    """The inferred types are those of the reference's results, and the cost is a count."""
    instance, arrays = _drawn(op, draw)
    types = tuple(map(type_of, arrays))
    inferred = instance.output_types(*types)
    real = tuple(map(type_of, reference(instance, arrays)))
    assert inferred == real, f"{instance} infers {_list(inferred)} from {_list(types)}, but computes {_list(real)}"
    cost = instance.cost(*types)
    assert isinstance(cost.flops, int) and cost.flops >= 0, f"{instance} costs {cost.flops} operations on {_list(types)}"
    assert isinstance(cost.bytes, int) and cost.bytes >= 0, f"{instance} moves {cost.bytes} bytes on {_list(types)}"


def check_decompose(op: type[Op], draw: Draw) -> None:
    """The decomposition computes what the reference does."""
    instance, arrays = _drawn(op, draw)
    results = decomposed(instance, arrays)
    if results is not None:
        _compare(f"decomposition of {instance}", instance, arrays, results)


def check_torch(op: type[Op], draw: Draw) -> None:
    """The torch rule computes what the reference does, in the same dtypes."""
    instance, arrays = _drawn(op, draw)
    _compare(f"torch rule of {instance}", instance, arrays, torch_rule(instance, arrays))


def check_onnx(op: type[Op], draw: Draw) -> bool:
    """The ONNX rule computes in float32 what the reference does; False for a case with other float dtypes or quantised values."""
    case = draw_case(op, draw)
    arrays = concrete(case, f32)
    types = tuple(map(type_of, arrays))
    if any(type_.dtype not in (f32, i32, i64, bool_) for type_ in (*types, *case.op.output_types(*types))):
        return False
    _compare(f"ONNX rule of {case.op}", case.op, arrays, onnx_rule(case.op, arrays))
    return True


def check_round_trip(op: type[Op], draw: Draw) -> None:
    """A graph with the op survives its text and its JSON form."""
    instance, arrays = _drawn(op, draw)
    graph = one_node(instance, tuple(map(type_of, arrays)))
    assert parse_graph(print_graph(graph)) == graph
    assert from_json(to_json(graph)) == graph


def check_bad_types(op: type[Op], draw: Draw) -> None:
    """An input type that is changed is refused with ``GraphError``, or legal: then the reference agrees."""
    instance, arrays = _drawn(op, draw)
    position = draw.integer(0, len(arrays) - 1)
    changed = _changed(type_of(arrays[position]), draw)
    types = [type_of(array) for array in arrays]
    types[position] = changed
    try:
        inferred = instance.output_types(*types)
    except GraphError as error:
        assert len(str(error)) > len("too short"), f"{instance} refuses {_list(types)} without a sentence"
        return
    old = arrays[position]
    numbers = np.ones(1) if isinstance(old, QuantizedArray) else old
    array = np.resize(numbers, changed.static_shape()).astype(changed.plain_dtype.numpy)
    real = tuple(map(type_of, reference(instance, (*arrays[:position], array, *arrays[position + 1 :]))))
    assert inferred == real, f"{instance} accepts {_list(types)} as {_list(inferred)}, but computes {_list(real)}"


def check_laws(op: type[Op], draw: Draw) -> None:
    """Every law of the op holds."""
    case = draw_case(op, draw)
    for law in op.laws:
        check_law(law, case.op, in_float64(concrete(case, f64)), draw)


def check_commutative(op: type[Op], draw: Draw) -> None:
    """The two inputs of a commutative op can change places."""
    instance, arrays = _drawn(op, draw)
    for result, swapped in zip(reference(instance, arrays), reference(instance, arrays[::-1]), strict=True):
        assert np.array_equal(result, swapped, equal_nan=True), f"{instance} is not commutative"


def check_sharding_string(op: type[Op], draw: Draw) -> None:
    """The op's sharding string is true on 2 and on 4 ranks."""
    case = draw_case(op, draw)
    for ranks in RANKS:
        check_sharding(case.op, in_float64(concrete(case, f64)), ranks)


def check_kernel(backend: Backend, kernel: Kernel, op: type[Op], draw: Draw) -> bool:
    """A kernel computes what the reference does; False if it does not accept the case."""
    case = draw_case(op, draw)
    arrays = concrete(case, draw.choice(*kernels.dtypes_of(backend)))
    node = kernels.accepted_node(kernel, case.op, arrays)
    if node is None:
        return False
    for buffers in (False, True) if kernels.takes_buffers(kernel) else (False,):
        results = kernels.run_kernel(backend, kernel, node, arrays, buffers=buffers)
        _compare(f"{kernel.name}{' with buffers' if buffers else ''} for {case.op}", case.op, arrays, results)
    return True


def _drawn(op: type[Op], draw: Draw) -> tuple[Op, tuple[Value, ...]]:
    case = draw_case(op, draw)
    dtype: DType = draw.choice(*kernels.DTYPES_UNDER_TEST)
    return case.op, concrete(case, dtype)


def _compare(name: str, op: Op, arrays: tuple[Value, ...], results: tuple[Array, ...]) -> None:
    truth, rounded = reference(op, in_float64(arrays)), reference(op, arrays)
    assert len(results) == len(truth), f"{name} gives {len(results)} results, expected {len(truth)}"
    for position, result in enumerate(results):
        if isinstance(result, QuantizedArray):
            _same_codes(f"output {position} of the {name}", result, rounded[position])
            continue
        assert_close(f"output {position} of the {name}", result, truth[position], rounded[position])


def _same_codes(name: str, result: QuantizedArray, wanted: QuantizedArray) -> None:
    assert type_of(result) == type_of(wanted), f"{name} is {type_of(result)}, expected {type_of(wanted)}"
    for found, true in ((result.data, wanted.data), (result.scale, wanted.scale)):
        assert found.tobytes() == true.tobytes(), f"{name} has other codes or scales than the reference"


def _changed(type_: TensorType, draw: Draw) -> TensorType:
    """The type with another rank, size or dtype, never quantised."""
    shape, dtype = list(type_.static_shape()), type_.dtype
    kind = draw.choice("rank", "size", "dtype", "fewer") if shape else draw.choice("rank", "dtype")
    if kind == "rank":
        shape.append(draw.integer(1, 3))
    elif kind == "fewer":
        shape.pop()
    elif kind == "size":
        shape[draw.integer(0, len(shape) - 1)] += draw.integer(1, 2)
    if kind == "dtype" or not isinstance(dtype, DType):
        dtype = draw.choice(*(other for other in (f32, f64, f16, bf16, i32, i64, bool_) if other != dtype))
    return TensorType(dtype, tuple(shape))


def _list(types: tuple[TensorType, ...] | list[TensorType]) -> str:
    return ", ".join(map(str, types))
