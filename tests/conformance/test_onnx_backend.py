"""The onnx backend, by the suite that every backend is held to."""

import pytest

from deltaloom.testing import BackendSuite, claims

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class TestOnnx(BackendSuite):
    backend = "onnx"
    requirements = claims("float32", "states", "mixed")
