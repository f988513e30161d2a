"""Weights made by torch on the device are those that are made on the host. Random ones have a scale at which a model works."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deltaloom.backends.torch.host import to_tensor  # noqa: E402
from deltaloom.backends.torch.random_weights import RandomTensors  # noqa: E402
from deltaloom.backends.torch.weights import weights_of  # noqa: E402
from deltaloom.graph.quantized import QuantizedArray  # noqa: E402
from deltaloom.models.bundled import model_folder  # noqa: E402
from deltaloom.models.checkpoint import Checkpoint  # noqa: E402
from deltaloom.passes.config import CompileConfig  # noqa: E402
from deltaloom.passes.driver import Driver  # noqa: E402
from deltaloom.passes.serving_layout import ServingVariant  # noqa: E402
from deltaloom.runtime.executor import Executor  # noqa: E402
from deltaloom.runtime.subject import OUTPUTS, read_subject  # noqa: E402
from deltaloom.runtime.weights import WeightStore  # noqa: E402

VARIANT = ServingVariant("decode", OUTPUTS)


@pytest.mark.parametrize("quantise", ["", "fp8", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_give_the_same_weights(dtype, quantise):
    config = CompileConfig(backends=("torch",), dtype=dtype, quantise=quantise or {})
    subject = read_subject("tiny-next", None, config)
    driver = Driver(subject.graphs.main, subject.context, planned=(VARIANT,))
    with Checkpoint.open(model_folder("tiny-next")) as checkpoint:
        store = WeightStore(checkpoint, {"torch": subject.context.backends[0]})
        program, wanted = Executor(driver, store, planned=OUTPUTS).bound(VARIANT)
        found = weights_of(program, lambda name: to_tensor(np.array(checkpoint.read(name))))
        assert found.keys() == wanted.keys()
        for prefix, group in wanted.items():
            assert len(found[prefix]) == len(group)
            for made, known in zip(found[prefix], group):
                pairs = (
                    [(made.data, known.data), (made.scale, known.scale)] if isinstance(known, QuantizedArray) else [(made, known)]
                )
                for ours, theirs in pairs:
                    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                    assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8)), prefix


def test_random_tensors_follow_from_seed_and_name():
    shapes = {"model.layers.0.a.weight": (40, 300), "model.layers.1.a.weight": (40, 300)}
    draws = [RandomTensors(shapes, seed=seed, device="cpu", dtype=torch.float32) for seed in (1, 1, 2)]
    first, again, other = (draw.read("model.layers.0.a.weight") for draw in draws)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, draws[0].read("model.layers.1.a.weight"))
    assert 0.9 < float(first.std()) * 300**0.5 < 1.1


def test_decays_norms_and_embeddings_have_scales_of_their_own():
    names = {
        "x.A_log": (64,),
        "x.dt_bias": (64,),
        "linear_attn.norm.weight": (64,),
        "q_norm.weight": (64,),
        "embed_tokens.weight": (64, 64),
    }
    read = RandomTensors(names, seed=0, device="cpu", dtype=torch.float32).read
    assert 0 <= float(read("x.A_log").min()) and float(read("x.A_log").max()) <= np.log(16)
    assert 0.5 <= float(read("x.dt_bias").min()) and float(read("x.dt_bias").max()) <= 1.5
    assert abs(float(read("linear_attn.norm.weight").mean()) - 1) < 0.1 and abs(float(read("q_norm.weight").mean())) < 0.1
    assert 0.8 < float(read("embed_tokens.weight").std()) < 1.2
