"""Torch kernels on quantised weights: tile by tile as at once, and the custom op that compiled segments call."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deltaloom.backends.torch import quantized, quantized_compiled  # noqa: E402
from deltaloom.backends.torch.backend import TorchBackend  # noqa: E402
from deltaloom.graph.types import QuantType, bf16, f8_e4m3, f32, i4, i8  # noqa: E402
from deltaloom.ops.linear import Linear  # noqa: E402
from deltaloom.ops.moe import MoEExperts  # noqa: E402
from deltaloom.ops.quantized import Quantize  # noqa: E402

BACKEND = TorchBackend("cpu", 1)
FORMS = [
    QuantType(i8, (1, None), f32),
    QuantType(i8, (1, 24), bf16),
    QuantType(i4, (1, 32), bf16),
    QuantType(f8_e4m3, (48, 40), f32),
    bf16,
]
RNG = np.random.default_rng(0)


def quantised(form, *shape):
    weight = RNG.standard_normal(shape).astype(np.float32)
    return weight.astype(bf16.numpy) if form == bf16 else Quantize(str(form)).reference(weight)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_product_in_tiles_is_the_reference(form, monkeypatch):
    monkeypatch.setattr(quantized, "TILE", 80 * 48 + 1)
    weight, x = quantised(form, 137, 80), RNG.standard_normal((2, 3, 80)).astype(np.float32)
    poisoned = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: poisoned(self, *shape).fill_(float("nan")))
    found = quantized.quantised_linear(Linear(), torch.from_numpy(x), BACKEND.from_host(weight))
    np.testing.assert_allclose(found, Linear().reference(x.astype(np.float64), weight), atol=1e-4)


@pytest.mark.parametrize("plain", ["", "gate_up", "down"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_experts_in_a_compiled_segment_are_one_call(form, plain):
    gate_up, down = quantised(form, 5, 96, 80), quantised(form, 5, 80, 48)
    x, ids = RNG.standard_normal((2, 3, 80)).astype(np.float32), RNG.integers(0, 5, (2, 3, 1)).astype(np.int32)
    weights = RNG.random((2, 3, 1)).astype(np.float32)
    stored = [
        RNG.standard_normal(w.shape).astype(np.float32) if n == plain else w for n, w in (("gate_up", gate_up), ("down", down))
    ]
    inputs = [BACKEND.from_host(array) for array in (x, weights, ids, *stored)]

    torch.compiler.reset()

    def segment(*tensors):
        return quantized_compiled.quantised_moe_experts(MoEExperts(), *tensors) * 2

    found = torch.compile(segment, fullgraph=True, backend="aot_eager")(*inputs)
    want = MoEExperts().reference(x.astype(np.float64), weights.astype(np.float64), ids, *stored)
    np.testing.assert_allclose(found, 2 * want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_beside_weights_in_bfloat16_are_not_rounded(tokens):
    """Compiled as loops for one row, widened for more: either way far nearer the truth than a row in bfloat16 would be."""
    gate_up, down = quantised(bf16, 5, 96, 80), quantised(bf16, 5, 80, 48)
    x, ids = RNG.standard_normal((1, tokens, 80)).astype(np.float32), RNG.integers(0, 5, (1, tokens, 2)).astype(np.int32)
    weights = RNG.random((1, tokens, 2)).astype(np.float32)

    def segment(x, weights, ids, gate_up, down):
        mixed = quantized_compiled.bfloat16_moe_experts(MoEExperts(), x, weights, ids, gate_up, down)
        return quantized_compiled.bfloat16_linear(Linear(), mixed, gate_up[0], x[..., :1])

    torch.compiler.reset()
    inputs = [BACKEND.from_host(array) for array in (x, weights, ids, gate_up, down)]
    found = torch.compile(segment, fullgraph=True, backend="aot_eager")(*inputs)
    mixed = MoEExperts().reference(x.astype(np.float64), weights.astype(np.float64), ids, gate_up, down)
    want = mixed @ gate_up[0].astype(np.float64).T + x[..., :1]
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
