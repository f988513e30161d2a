"""The tiny model's reference generations, made by transformers: token for token on every backend, alone and in batches."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Variant
from deltaloom.runtime.llm import LLM
from deltaloom.runtime.params import SamplingParams

FILE = Path(__file__).resolve().parents[1] / "golden" / "tiny_next" / "reference_generations.json"
ITEMS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["items"]
GREEDY = SamplingParams(max_tokens=64, temperature=0)
STORIES = ["Once upon a time", "<|im_start|>user\nTell me about a cat.<|im_end|>\n<|im_start|>assistant\n", "The"]


@pytest.fixture(scope="module", params=["numpy", "torch", "onnx"])
def llm(request: pytest.FixtureRequest) -> LLM:
    # one thread: the model is so small that torch's threads only wait for one another
    return made(request.param)


def made(backend: str) -> LLM:
    for package in {"numpy": (), "onnx": ("onnx", "onnxruntime")}.get(backend, ("torch",)):
        pytest.importorskip(package)
    return LLM("tiny-next", backend=backend, dtype="float32", config=CompileConfig(threads=1))


def test_a_model_on_onnx_runtime_and_numpy_by_turns_reproduces_the_references() -> None:
    pytest.importorskip("onnxruntime")
    config = CompileConfig(["onnx", "numpy"], threads=1, kernels={"linear": ["numpy"], "shared_moe": ["numpy"]})
    llm = LLM("tiny-next", dtype="float32", config=config)
    source = llm.model.main.program(Variant(True, False, ("logits",))).source
    assert "numpy_linear" in source and "onnx_gated_attention_portable" in source
    one_by_one(llm, ITEMS[::4])
    in_mixed_batches(llm, 8)


def test_there_are_forty_references_of_many_lengths() -> None:
    assert len(ITEMS) == 40
    assert len({len(item["prompt_ids"]) for item in ITEMS}) > 20


def one_by_one(llm: LLM, items: list[dict[str, Any]]) -> None:
    for item in items:
        (output,) = llm.generate(item["prompt_ids"], GREEDY).outputs
        assert output.token_ids == item["output_ids"], item["skill"]
        assert llm.tokenizer.decode(output.token_ids, skip_special_tokens=False) == item["output_text"]


def test_the_references_are_reproduced_one_by_one(llm: LLM) -> None:
    one_by_one(llm, ITEMS)


def test_the_references_are_reproduced_in_mixed_batches_of_eight(llm: LLM) -> None:
    in_mixed_batches(llm)


def in_mixed_batches(llm: LLM, count: int = len(ITEMS)) -> None:
    shuffled = random.Random(8).sample(ITEMS, count)
    for start in range(0, len(shuffled), 8):
        batch = shuffled[start : start + 8]
        results = llm.generate([item["prompt_ids"] for item in batch], GREEDY)
        assert [result.outputs[0].token_ids for result in results] == [item["output_ids"] for item in batch]


def test_all_references_in_one_call_come_back_in_the_order_asked(llm: LLM) -> None:
    results = llm.generate([item["prompt_ids"] for item in ITEMS[:20]], GREEDY)
    assert [result.outputs[0].token_ids for result in results] == [item["output_ids"] for item in ITEMS[:20]]


@pytest.mark.parametrize("other_backend", ["torch", "onnx"])
def test_the_same_seed_gives_the_same_text_on_both_backends_and_in_any_company(other_backend: str) -> None:
    one, other = made("numpy"), made(other_backend)
    texts = set()
    for seed in range(3):
        params = SamplingParams(max_tokens=32, temperature=0.7, seed=seed, n=2)
        batch = [[output.text for output in result.outputs] for result in one.generate(STORIES, params)]
        assert batch == [[output.text for output in result.outputs] for result in other.generate(STORIES, params)]
        assert batch == [[output.text for output in one.generate(story, params).outputs] for story in STORIES]
        texts.update(batch[0])
    assert len(texts) == 6  # three seeds, two samples each: all different


def test_inductor_reproduces_eight_references() -> None:
    one_by_one(made("inductor"), sorted(ITEMS, key=lambda item: len(item["prompt_ids"]))[::5])


@pytest.mark.slow
def test_inductor_reproduces_all_references() -> None:
    llm = made("inductor")
    one_by_one(llm, ITEMS)
    in_mixed_batches(llm)
