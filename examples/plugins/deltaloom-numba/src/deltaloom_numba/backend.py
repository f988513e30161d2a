"""The backend: a few compiled kernels, and for everything else those of the NumPy backend, whose arrays are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import deltaloom_numba.delta_net
import deltaloom_numba.experts
import deltaloom_numba.linear  # noqa: F401  these three fill the table
from deltaloom.backends.numpy.backend import NumpyBackend
from deltaloom.passes.kernel import Kernel
from deltaloom_numba.table import table


class NumbaBackend(NumpyBackend):
    """Programs on the CPU with numba and NumPy, in float32 (or float64, by NumPy alone).

    Weights are read in bfloat16 where the configuration stores them so (``quantise="bf16"``)."""

    name = "numba"

    def kernels(self) -> Sequence[Kernel]:
        """Our own, then NumPy's, whose titles say so: ``numba.numpy.rope``."""
        return [*table.kernels, *(replace(kernel, backend=self.name, title=_title(kernel)) for kernel in super().kernels())]


def _title(kernel: Kernel) -> str:
    return f"numpy.{kernel.title or kernel.run.__name__}"
