"""The backend and its kernels, by the suite that every backend is held to."""

from deltaloom.testing import BackendSuite, claims

OTHERS = {"kernel numba.numpy.*": "a kernel of NumPy's, which deltaloom's own tests run"}


class TestNumba(BackendSuite):
    backend = "numba"
    requirements = claims("float32", "float64", "quantised", "memory", "states", "mixed", limitations=OTHERS)
