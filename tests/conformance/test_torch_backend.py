"""The torch backends, by the suite that every backend is held to."""

import pytest

from deltaloom.testing import BackendSuite, claims

pytest.importorskip("torch")
DTYPES = ("float32", "float64", "bfloat16", "float16")


class TestTorch(BackendSuite):
    backend = "torch"
    requirements = claims(*DTYPES, "quantised", "states", "mixed")


@pytest.mark.slow
class TestInductor(BackendSuite):
    """Its kernels are torch's, and those of its own are run compiled in tests/backends/."""

    backend = "inductor"
    kernels = False
    requirements = claims(*DTYPES, "quantised", "states", "mixed")
