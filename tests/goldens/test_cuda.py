"""The torch and cuda backends on a GPU, where there is one: goldens in float32 and the tiny model's references, token for token."""

import json
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
from goldens.golden_data import FOLDER, Case, cases, compare, walk

import deltaloom
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.model import Model


def gpus() -> int:
    """GPUs that torch sees."""
    if find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpus() == 0, reason="needs an NVIDIA GPU")]
BACKENDS = ("torch", "cuda")


def on_gpu(backend: str) -> CompileConfig:
    return CompileConfig(backends=(backend,), device="cuda", dtype="float32")


@cache
def model_of(variant: str, backend: str) -> Model:
    return deltaloom.load(cases(variant)[0].folder, config=on_gpu(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_stage_agrees(case: Case, backend: str) -> None:
    model = model_of(case.variant, backend)
    state = None
    for stage in walk(case):
        state = state or model.new_state(len(stage.token_ids))
        mask = None if stage.valid.all() else stage.valid
        out = model.forward(stage.token_ids, state=state, attention_mask=mask, output_hidden_states=True)
        compare(case, stage, logits=out.logits, hidden=out.hidden_states, state=state.arrays().__getitem__)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_references_are_reproduced(backend: str) -> None:
    items = json.loads((FOLDER / "tiny_next" / "reference_generations.json").read_text())["items"]
    llm = deltaloom.LLM("tiny-next", config=on_gpu(backend))
    params = deltaloom.SamplingParams(max_tokens=64, temperature=0)
    results = llm.generate([item["prompt_ids"] for item in items], params)
    assert [list(r.outputs[0].token_ids) for r in results] == [item["output_ids"] for item in items]


@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_is_the_checkpoints_dtype_on_a_gpu(backend: str) -> None:
    model = deltaloom.load("tiny-next", config=CompileConfig(backends=(backend,), device="cuda"))
    assert model.ctx.config.dtype == "bfloat16"
    out = model.forward(np.arange(5, 45)[None])
    exact = deltaloom.load("tiny-next", backend="numpy").forward(np.arange(5, 45)[None])
    assert out.logits is not None and exact.logits is not None
    assert (out.logits.argmax(-1) == exact.logits.argmax(-1)).mean() > 0.8
