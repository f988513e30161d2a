"""Arrays as torch tensors for callers that speak torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deltaloom.backends.torch.tensors import cuda_available, from_array  # noqa: E402


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_tensor_has_its_own_copy(dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    tensor = from_array(array)
    assert tensor.device.type == "cpu" and tensor.shape == (2, 3) and tensor.numpy().dtype == dtype
    array[:] = 7
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("available", [True, False])
def test_cuda_is_there_if_torch_says_so(available, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert cuda_available() is available
