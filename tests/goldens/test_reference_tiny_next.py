"""The bundled model's graph, run by the reference interpreter, against the library's logits and greedy continuations."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from goldens.golden_data import FOLDER, Array
from goldens.reference_model import ReferenceModel
from safetensors.numpy import load_file

from deltaloom.models.bundled import model_folder

ITEMS: list[dict[str, Any]] = json.loads((FOLDER / "tiny_next" / "reference_generations.json").read_text())["items"]
LOGITS = load_file(FOLDER / "tiny_next" / "reference_logits.safetensors")


@cache
def model() -> ReferenceModel:
    return ReferenceModel(model_folder("tiny-next"))


def logits_of(token_ids: list[int]) -> Array:
    """Logits [n, V] of one sequence, in float64."""
    main = model().graphs.main
    inputs = {
        "token_ids": np.array([token_ids]),
        "positions": np.arange(len(token_ids))[None],
        "valid": np.ones((1, len(token_ids)), bool),
    }
    logits: Array = model().run(main, inputs, model().start(main, 1)).outputs["logits"]
    first: Array = logits[0]
    return first


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_logits_agree(name: str) -> None:
    item = ITEMS[int(name.removeprefix("prompt_").removesuffix(".last_logits"))]
    np.testing.assert_allclose(logits_of(item["prompt_ids"])[-8:], LOGITS[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("number", [pytest.param(i, marks=() if i < 8 else pytest.mark.slow) for i in range(len(ITEMS))])
def test_every_token_of_a_greedy_continuation_is_the_best(number: int) -> None:
    prompt, output = ITEMS[number]["prompt_ids"], ITEMS[number]["output_ids"]
    logits = logits_of([*prompt, *output[:-1]])[len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == output
