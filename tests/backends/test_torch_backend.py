"""The torch backend as an object: devices, dtypes, memory shared with NumPy, portable kernels."""

import warnings
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deltaloom.backends.torch.backend import TorchBackend  # noqa: E402
from deltaloom.backends.torch.portable import portable_kernels  # noqa: E402
from deltaloom.graph.errors import CompileError, ConfigError  # noqa: E402
from deltaloom.graph.op import Op  # noqa: E402
from deltaloom.graph.quantized import QuantizedArray  # noqa: E402
from deltaloom.graph.registry import ops  # noqa: E402
from deltaloom.graph.types import DTYPES, QuantType, bf16, f8_e4m3, f32  # noqa: E402
from deltaloom.passes.kernel import Appended  # noqa: E402

BACKEND = TorchBackend("cpu")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (2, 3, 4)])
def test_every_dtype_goes_there_and_back(dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype.numpy)
    tensor = BACKEND.from_host(array)
    assert tensor.shape == shape
    back = BACKEND.to_host(tensor)
    assert back.dtype == dtype.numpy
    np.testing.assert_array_equal(back.astype(np.float64), array.astype(np.float64))
    assert BACKEND.zeros(shape, dtype).dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("writable", [True, False])
def test_memory_is_shared_and_read_only_arrays_do_not_warn(dtype, writable):
    array = np.ones((3, 4), dtype)
    array.setflags(write=writable)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = BACKEND.from_host(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert BACKEND.to_host(tensor).ctypes.data == array.ctypes.data


def test_a_mapped_file_is_not_copied_and_outlives_its_array(tmp_path):
    path = tmp_path / "weights"
    np.arange(1000, dtype=np.float32).tofile(path)
    tensor = BACKEND.from_host(np.memmap(path, np.float32, mode="r")[10:])
    assert tensor[0] == 10 and tensor[-1] == 999


@pytest.mark.parametrize("array", [np.arange(6)[::-1], np.arange(6, dtype=">i4"), np.broadcast_to(np.arange(3), (2, 3))])
def test_odd_arrays(array):
    np.testing.assert_array_equal(BACKEND.to_host(BACKEND.from_host(array)), array)


def test_quantised_arrays_become_tensors():
    form = QuantType(f8_e4m3, (16, 16), f32)
    weight = QuantizedArray(np.ones((2, 3), ml_dtypes.float8_e4m3fn), np.ones((1, 1), np.float32), form, (2, 3))
    tensor = BACKEND.from_host(weight)
    assert (tensor.data.dtype, tensor.scale.dtype, tensor.type) == (torch.float8_e4m3fn, torch.float32, form[2, 3])


def test_compute_dtypes():
    assert BACKEND.compute_dtype("bfloat16") == bf16
    with pytest.raises(CompileError, match="cannot compute in 'int8'; it can in float32"):
        BACKEND.compute_dtype("int8")


def test_refusals_of_devices_and_threads():
    with pytest.raises(CompileError, match="'tpu9' is not a device"):
        TorchBackend("tpu9")
    with pytest.raises(CompileError, match="'cpu' or 'cuda', not on 'meta'"):
        TorchBackend("meta")
    with pytest.raises(CompileError, match="sees .* CUDA devices"):
        TorchBackend(f"cuda:{torch.cuda.device_count() + 1}")
    with pytest.raises(ConfigError, match="threads is 0"):
        TorchBackend("cpu", 0)


def test_threads():
    before = torch.get_num_threads()
    try:
        TorchBackend("cpu", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_kernels_record_no_gradients():
    kernel = next(k for k in BACKEND.kernels() if k.op == "linear")
    assert not kernel.run(ops.get("linear")(), torch.ones(1, 2), torch.ones(2, 3)).requires_grad


class RunningSum(Op):
    """An op with both kinds of state and a torch rule only, as a plugin might bring it."""

    name: ClassVar[str] = "test.running_sum"
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_total", "new_history")
    updates: ClassVar[dict[str, int]] = {"total": 1, "history": 2}
    appends: ClassVar[dict[str, int]] = {"history": 1}

    def infer(self, x, total, history):
        return x, total, history.with_shape(history.shape[0], history.shape[1] + x.shape[1])

    def torch(self, torch, x, total, history):
        joined = torch.cat([history, x], dim=1)
        sums = total + x.cumsum(1)
        return sums, sums[:, -1:], joined


def test_portable_kernels_keep_states_in_place():
    ops.add(RunningSum)
    try:
        kernel = next(k for k in TorchBackend("cpu").kernels() if k.op == RunningSum.name)
        assert RunningSum.name not in {k.op for k in portable_kernels("x", appending=False)}
    finally:
        ops.remove(RunningSum.name)
    total, history = torch.full((2, 1), 10.0), torch.full((2, 6), -1.0)
    history[:, :2] = 7.0
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    out, new_total = kernel.run(RunningSum(), x, total, Appended(history, 2))
    assert out.tolist() == [[11, 13], [13, 17]]
    assert new_total is total and total.tolist() == [[13], [17]]
    assert history.tolist() == [[7, 7, 1, 2, -1, -1], [7, 7, 3, 4, -1, -1]]


def test_zeros_are_ordinary_tensors():
    state = BACKEND.zeros((2, 3), f32)
    state[:, 1] = 1
    assert state.sum() == 2


def test_one_cuda_device_is_number_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("cuda", "cuda:0"):
        assert TorchBackend(name).device == name
    with pytest.raises(CompileError, match="'cuda:1' was asked for, but this torch .* sees 1 CUDA devices"):
        TorchBackend("cuda:1")


def test_a_tensor_that_records_gradients_becomes_an_array():
    np.testing.assert_array_equal(BACKEND.to_host(torch.ones(2, requires_grad=True)), [1, 1])
