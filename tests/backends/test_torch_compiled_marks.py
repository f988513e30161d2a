"""What a compiled function leaves on the tensors of its caller: nothing, and nothing of theirs is lost."""

import pytest

torch = pytest.importorskip("torch")

from deltaloom.backends.torch.inductor import InductorBackend  # noqa: E402
from deltaloom.passes.kernel import Appended  # noqa: E402


def test_what_others_wrote_on_a_tensor_stays():
    """The compiler's marks are set on aliases, and cleared there: not on the caller's tensors."""
    backend = InductorBackend("cpu")

    def segment(x, w_mix, cache):
        return (x @ w_mix, cache.data[:, :, :1] + 1)

    x, weight, data = torch.ones(3, 2), torch.ones(2, 2), torch.zeros(2, 2, 4, 2)
    for tensor in (x, weight, data):
        tensor.note = "ours"
    y, z = backend.finish(segment, "segment")(x, weight, Appended(data, backend.length(1)))
    assert y.tolist() == [[2.0, 2.0]] * 3 and z.shape == (2, 2, 1, 2)
    assert [tensor.__dict__ for tensor in (x, weight, data)] == [{"note": "ours"}] * 3
