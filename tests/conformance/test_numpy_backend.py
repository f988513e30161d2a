"""The NumPy backend, by the suite that every backend is held to."""

from deltaloom.testing import BackendSuite, claims


class TestNumpy(BackendSuite):
    backend = "numpy"
    requirements = claims("float32", "float64", "quantised", "memory", "states")
