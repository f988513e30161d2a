"""Arrays that are copied to a device in chunks, and weights made there of a checkpoint."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import deltaloom  # noqa: E402
from deltaloom.backends.torch.backend import TorchBackend  # noqa: E402
from deltaloom.backends.torch.host import to_array  # noqa: E402
from deltaloom.backends.torch.upload import BUFFERS, Upload  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 13), (3 * BUFFERS, 64)])
def test_arrays_arrive_whole(dtype, shape):
    upload = Upload(torch.device("cpu"), chunk=512)
    arrays = {str(seed): np.random.default_rng(seed).standard_normal(shape).astype(dtype) for seed in range(5)}
    made = upload.tensors(arrays)
    assert set(made) == set(arrays)
    for name, array in arrays.items():
        tensor = made[name]
        assert tuple(tensor.shape) == array.shape
        assert to_array(tensor).dtype == array.dtype and to_array(tensor).tobytes() == array.tobytes()


def test_arrays_that_lie_otherwise_arrive():
    upload = Upload(torch.device("cpu"), chunk=256)
    wide = np.arange(60, dtype=np.float32).reshape(6, 10)
    unaligned = np.frombuffer(b"x" + wide.tobytes(), np.uint8)[1:].view(np.float32)
    made = upload.tensors({"turned": wide.T, "skipping": wide[::2], "unaligned": unaligned, "swapped": wide.astype(">f4")})
    expected = {"turned": wide.T, "skipping": wide[::2], "unaligned": wide.reshape(-1), "swapped": wide}
    assert all(np.array_equal(to_array(made[name]), array) for name, array in expected.items())
    assert upload.tensors({}) == {}


def test_what_goes_wrong_on_the_way_is_raised(monkeypatch):
    upload = Upload(torch.device("cpu"))

    def broken(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(np, "copyto", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        upload.tensors({"ones": np.ones(3, np.float32)})


@pytest.mark.parametrize("folder", ["next_base", "next_fp8"])
def test_weights_made_on_the_device_are_those_of_the_host(monkeypatch, folder):
    ids = np.arange(1, 9)[None]
    config = deltaloom.CompileConfig(backends=("torch",), dtype="float32", keep_quantized=folder == "next_fp8")
    expected = deltaloom.load(GOLDEN / folder, config=config).forward(ids).logits
    seen = []
    made = TorchBackend.evaluated
    monkeypatch.setattr("deltaloom.runtime.weights.streams", lambda backend: True)
    monkeypatch.setattr(TorchBackend, "evaluated", lambda self, *args: seen.append(args[1].name) or made(self, *args))
    found = deltaloom.load(GOLDEN / folder, config=config).forward(ids).logits
    assert seen and np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
