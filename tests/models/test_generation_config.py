"""generation_config.json: published values, what stands in for a missing file, refusals."""

import json
from pathlib import Path

import pytest

from deltaloom.graph.errors import ConfigError
from deltaloom.models.bundled import model_folder
from deltaloom.models.config import read_config
from deltaloom.models.generation_config import GenerationConfig, read_generation_config

MODEL = read_config({"model_type": "qwen3_next", "bos_token_id": 151643, "eos_token_id": 151645})


def test_generation_defaults_of_the_bundled_model() -> None:
    folder = model_folder("tiny-next")
    assert read_generation_config(folder) == GenerationConfig(eos_token_ids=(4089, 4087), pad_token_id=4087)


def test_generation_config_without_a_file_takes_the_models_ids(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationConfig()
    found = read_generation_config(tmp_path, MODEL)
    assert found == GenerationConfig(eos_token_ids=(151645,), bos_token_id=151643)


def test_published_generation_config(tmp_path: Path) -> None:
    values = {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
              "temperature": 0.7, "top_k": 20, "top_p": 0.8, "transformers_version": "4.57.0", "min_p": None
              }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    found = read_generation_config(tmp_path, MODEL)
    assert found == GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, eos_token_ids=(151645, 151643), bos_token_id=151643,
        pad_token_id=151643, ignored=("transformers_version",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1}, "temperature is the number -1; expected a finite number of at least 0."),
        ({"top_p": 0}, "top_p is the number 0; expected a finite number above 0 and of at most 1."),
        ({"top_k": 1.5}, "top_k is the number 1.5; expected an integer of at least 0."),
        ({"min_p": 2}, "min_p is the number 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is the number 0"),
        ({"eos_token_id": "x"}, "eos_token_id is the string 'x'; expected an integer of at least 0 or a list of them."),
        ({"eos_token_id": 151936}, "eos_token_id 151936 is outside"),
        ({"do_sample": "yes"}, "do_sample is the string 'yes'"),
        ({"max_new_tokens": 0}, "max_new_tokens is the number 0"),
    ],
)
def test_bad_generation_values_are_refused(tmp_path: Path, values: dict[str, object], words: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        read_generation_config(tmp_path, MODEL)
    assert words in str(caught.value) and "generation_config.json: " in str(caught.value)
