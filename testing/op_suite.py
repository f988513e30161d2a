"""What every op is held to: its rules agree with its reference, and every kernel for it, on every backend, does too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom.backends import backend as named_backend
from deltaloom.graph.interpret import type_of
from deltaloom.graph.op import Draw, Op
from deltaloom.graph.registry import ops
from deltaloom.graph.types import f64
from deltaloom.ops.fused import Fused
from deltaloom.passes.kernel import Backend, kernels_for
from deltaloom.testing import checks
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.evaluate import concrete, draw_case, in_float64, reference
from deltaloom.testing.kernel_checks import kernel_checks
from deltaloom.testing.laws import check_law
from deltaloom.testing.onnx_rule import runs_onnx
from deltaloom.testing.sharding import check_sharding, read_factors
from deltaloom.testing.suite import Check, Suite

OpCheck = Callable[[type[Op], Draw], bool | None]
SEEDS = 40
"""Cases in which each law must have said something, and each factor must have been cut."""
EVEN = (2, 4, 8, 16)
"""Sizes that two ranks can divide."""


class OpSuite(Suite):
    """The checks of one op.

    ``op``: the class, or its registered name. ``backends``: those whose kernels for it are run; None: the built-in ones that are
    installed and run kernels one by one, and those of plugins."""

    op: type[Op] | str
    backends: Sequence[Backend] | None = None

    def subject(self) -> str:
        return f"op {self.op if isinstance(self.op, str) else self.op.name}"

    def checks(self) -> Iterator[Check]:
        op, subject = ops.get(self.op) if isinstance(self.op, str) else self.op, self.subject()
        yield Check(subject, "complete", partial(_complete, op), drawn=False)
        for function, feature, present in (
            (checks.check_types, "", True),
            (checks.check_round_trip, "", True),
            (checks.check_bad_types, "", op.arity()[1] > 0),
            (checks.check_decompose, "decompose", op.decompose is not None and not issubclass(op, Fused)),
            (checks.check_torch, "torch", op.torch is not None and find_spec("torch") is not None),
            (checks.check_onnx, "onnx", op.onnx is not None and runs_onnx()),
            (checks.check_laws, "laws", bool(op.laws)),
            (checks.check_commutative, "commutative", op.commutative),
            (checks.check_sharding_string, "sharding", _divides(op)),
        ):
            yield Check(subject, function.__name__.removeprefix("check_"), partial(_on, function, op), feature, present)
        yield Check(subject, "laws apply", partial(_laws_apply, op), "laws", bool(op.laws), drawn=False)
        yield Check(subject, "factors are cut", partial(_factors_are_cut, op), "sharding", _divides(op), drawn=False)
        for backend in installed_backends() if self.backends is None else self.backends:
            for kernel in kernels_for(backend, op.name):
                yield from kernel_checks(backend, kernel, op)


def installed_backends() -> list[Backend]:
    """The built-in backends whose kernels run one by one on the CPU."""
    names = ["numpy", *(["torch"] if find_spec("torch") is not None else []), *(["onnx"] if runs_onnx() else [])]
    return [named_backend(name, device="cpu") for name in names]


def _on(function: OpCheck, op: type[Op], draw: Draw) -> bool | None:
    return function(op, draw)


def _divides(op: type[Op]) -> bool:
    return op.sharding is not None or op.factors is not Op.factors


def _complete(op: type[Op], draw: Draw) -> None:
    """The op has what an op needs, and what it says of its states and outputs is so."""
    assert op.reference is not None, f"op {op.name} has no reference, so nothing says what it computes"
    assert op.cases is not None, f"op {op.name} has no cases, so nothing of it can be tested"
    first = (op.__doc__ or "").strip().partition("\n")[0]
    said = f"the docstring of op {op.name} begins with {first!r}"
    assert first.endswith((".", ";", "``")), f"{said}, expected its formula, with a stop"
    case = draw_case(op, SeededDraw(0))
    count = len(case.op.output_types(*map(type_of, concrete(case, f64))))
    names = op.outputs
    assert len(names) in (1, count) and len(set(names)) == len(names), f"op {op.name} names outputs {names} and has {count}"
    strange = sorted(set(op.updates) - set(op.input_names()))
    assert not strange, f"op {op.name} updates {', '.join(strange)}, which {'is' if len(strange) == 1 else 'are'} no input of it"
    for name, output in op.updates.items():
        assert 0 < output < count, f"op {op.name} gives the new {name} as output {output}, expected 1 to {count - 1}"
    growing = sorted(set(op.appends) - set(op.updates))
    assert not growing, f"op {op.name} appends to {', '.join(growing)}, of which it gives no new value in updates"


def _laws_apply(op: type[Op], draw: Draw) -> None:
    """Each law has something to say about some case; if not, nothing tests it."""
    for law in op.laws:
        said = 0
        for seed in range(SEEDS // 2):
            drawn = SeededDraw(seed)
            case = draw_case(op, drawn)
            said += check_law(law, case.op, in_float64(concrete(case, f64)), drawn)
        assert said, f"no case of op {op.name} has anything to do with its law {law}; widen its cases"


def _factors_are_cut(op: type[Op], draw: Draw) -> None:
    """Each factor that the sharding string lets be divided is divided in some case."""
    cut: set[str] = set()
    known: set[str] = set()
    for seed in range(SEEDS):
        case = draw_case(op, SeededDraw(seed, sizes=EVEN))
        arrays = in_float64(concrete(case, f64))
        factors = read_factors(case.op, arrays, reference(case.op, arrays))
        assert factors is not None, f"op {op.name} has no sharding string for {case.op}"
        known |= set(factors.cuttable)
        cut |= set(check_sharding(case.op, arrays, 2))
    assert cut == known, f"no case of op {op.name} cuts the factors {', '.join(sorted(known - cut))}; widen its cases"
