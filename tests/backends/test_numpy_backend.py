"""The table of backends and the NumPy backend's side of the protocol."""

import subprocess
import sys

import numpy as np
import pytest

import deltaloom.backends
from deltaloom.backends import backend
from deltaloom.backends.numpy.backend import NumpyBackend
from deltaloom.graph.errors import CompileError, ConfigError
from deltaloom.graph.registry import ops
from deltaloom.graph.types import bf16, f32, f64
from deltaloom.ops.fused import Fused
from deltaloom.passes.kernel import Appended


def test_every_op_with_a_reference_has_a_kernel_and_the_portable_one_is_last():
    kernels = list(backend("numpy").kernels())
    titles = [kernel.title == "reference" for kernel in kernels]
    assert titles == sorted(titles)
    own = {op.name for op in ops.built_in() if op.reference and not issubclass(op, Fused)}
    assert {kernel.op for kernel in kernels if kernel.title == "reference"} == own
    names = [(kernel.op, kernel.name) for kernel in kernels]
    assert len(names) == len(set(names))
    assert {kernel.op for kernel in kernels} <= {op.name for op in ops}


def test_every_wanted_layout_names_inputs_of_its_op():
    for kernel in backend("numpy").kernels():
        assert set(kernel.wants) <= set(ops.get(kernel.op).input_names())


@pytest.mark.parametrize("name, dtype", [("float32", f32), ("float64", f64), ("f32", f32)])
def test_compute_dtypes(name, dtype):
    assert backend("numpy").compute_dtype(name) == dtype


@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8", "nonsense"])
def test_other_dtypes_are_refused(name):
    with pytest.raises(CompileError, match=f"float32 or float64, not in '{name}'"):
        backend("numpy").compute_dtype(name)


def test_host_arrays_are_its_tensors():
    numpy_backend = backend("numpy")
    array = np.arange(4.0)
    assert numpy_backend.from_host(array) is array and numpy_backend.to_host(array) is array
    zeros = numpy_backend.zeros((2, 0, 3), bf16)
    assert zeros.shape == (2, 0, 3) and zeros.dtype == bf16.numpy
    assert numpy_backend.length(7) == 7
    assert numpy_backend.finish(len, "f") is len
    assert (numpy_backend.name, numpy_backend.device) == ("numpy", "cpu")


def test_an_unknown_backend_names_those_there_are():
    with pytest.raises(CompileError, match="no backend 'cudda'; known are numpy, torch, inductor, cuda, onnx"):
        backend("cudda")


@pytest.mark.parametrize("name", ["torch", "inductor"])
def test_without_torch_the_error_says_how_to_install_it(monkeypatch, name):
    monkeypatch.setattr(deltaloom.backends, "find_spec", lambda package: None)
    with pytest.raises(CompileError, match=rf"'{name}' needs the package torch.*pip install 'deltaloom\[torch\]'"):
        backend(name)


def test_other_devices_are_refused():
    with pytest.raises(CompileError, match="not on 'cuda'"):
        backend("numpy", device="cuda")
    assert NumpyBackend(device="cpu").device == NumpyBackend(device=None).device == "cpu"


def test_threads():
    assert NumpyBackend(threads=1).threads == 1
    with pytest.raises(ConfigError, match="threads is -1"):
        NumpyBackend(threads=-1)
    NumpyBackend()


def test_the_portable_attention_writes_only_the_tail():
    rng = np.random.default_rng(0)
    kernel = [k for k in backend("numpy").kernels() if k.op == "attention"][-1]
    q, k, v = (rng.standard_normal((1, 2, heads, 4)) for heads in (4, 2, 2))
    past = rng.standard_normal((2, 1, 2, 3, 4))
    caches = []
    for cache in past:
        data = np.full((1, 2, 8, 4), 5.0)
        data[:, :, :3] = cache
        caches.append(Appended(data, 3))
    op = ops.get("attention")(scale=0.5)
    out = kernel.run(op, q, k, v, *caches)
    want = op.reference(q, k, v, *past)
    assert isinstance(out, np.ndarray) and np.array_equal(out, want[0])
    for cache, expected in zip(caches, want[1:]):
        assert np.array_equal(cache.data[:, :, :5], expected)
        assert np.all(cache.data[:, :, 5:] == 5.0)


def test_torch_is_never_imported():
    script = (
        "import sys, deltaloom.backends as b; b.backend('numpy').kernels(); "
        "assert not [m for m in sys.modules if m.split('.')[0] == 'torch']"
    )
    path = [entry for entry in sys.path if entry]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {script}"], check=True)
