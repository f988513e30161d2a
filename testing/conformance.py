"""The conformance kit: tests for ops, generated from the registry. A plugin's test file is one line::

    test_mylab = conformance("mylab.")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom.backends import backend as named_backend
from deltaloom.graph.op import Draw, Op
from deltaloom.graph.registry import OpRegistry, ops
from deltaloom.passes.kernel import Backend, Kernel
from deltaloom.testing.checks import CHECKS, applies, check_kernel
from deltaloom.testing.draw import CaseDraw

Check = Callable[[type[Op], Draw], None]
Test = Callable[..., None]


def conformance(prefix: str = "", *, backends: Sequence[Backend] | None = None, registry: OpRegistry = ops) -> Test:
    """One pytest test with a case for every op whose name starts with ``prefix`` and every check that applies to it, and for
    every kernel that ``backends`` (NumPy and, if installed, torch) have for such an op. A kernel that accepts no generated
    case fails."""
    chosen = [op for op in registry if op.name.startswith(prefix)]
    with_torch = find_spec("torch") is not None
    cases = [
        pytest.param(op, check, id=f"{op.name}-{check.__name__.removeprefix('check_')}")
        for op in chosen
        for check in CHECKS
        if applies(check, op) and (with_torch or check.__name__ != "check_torch")
    ]
    for backend in installed_backends() if backends is None else backends:
        for kernel in backend.kernels():
            if kernel.op.startswith(prefix) and kernel.op in registry:
                check = _kernel_check(backend, kernel)
                cases.append(pytest.param(registry.get(kernel.op), check, id=f"{kernel.op}-{kernel.name}"))

    @settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
    @given(data=st.data())
    def test_conformance(op: type[Op], check: Check, data: st.DataObject) -> None:
        check(op, CaseDraw(data))

    test: Test = pytest.mark.parametrize(("op", "check"), cases)(test_conformance)
    return test


def installed_backends() -> list[Backend]:
    """The built-in backends whose kernels run one by one on the CPU."""
    names = ["numpy", "torch"] if find_spec("torch") is not None else ["numpy"]
    return [named_backend(name, device="cpu") for name in names]


def _kernel_check(backend: Backend, kernel: Kernel) -> Check:
    def check(op: type[Op], draw: Draw) -> None:
        assume(check_kernel(backend, kernel, op, draw))

    return check
