"""Scripts written for transformers: the model card's Quickstart and the calls that its readers vary."""

import sys
from typing import Any

import numpy as np
import pytest

from deltaloom.graph.errors import CheckpointError, ConfigError, RequestError
from deltaloom.runtime import auto, encoding
from deltaloom.runtime.auto import AutoModelForCausalLM, AutoTokenizer

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
CHAT_TEXT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained("tiny-next")


@pytest.fixture(scope="module")
def model() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained("tiny-next", device_map="cpu")


def test_the_quickstart_runs_with_its_imports_changed() -> None:
    torch = pytest.importorskip("torch")
    from deltaloom import AutoModelForCausalLM, AutoTokenizer

    model_name = "tiny-next"
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto", device_map="auto")
    prompt = "What is the capital of France?"
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model_inputs = tokenizer([text], return_tensors="pt").to(model.device)
    generated_ids = model.generate(**model_inputs, max_new_tokens=16384)
    output_ids = generated_ids[0][len(model_inputs.input_ids[0]) :].tolist()
    content = tokenizer.decode(output_ids, skip_special_tokens=True)

    assert content == "The capital of France is Paris."
    assert isinstance(generated_ids, torch.Tensor) and generated_ids.dtype == torch.int64


def test_chat_template_as_text_and_as_ids(tokenizer: AutoTokenizer) -> None:
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == CHAT_TEXT
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert ids == tokenizer.encode(CHAT_TEXT)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == CHAT_TEXT.removesuffix("<|im_start|>assistant\n")
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert '"name": "add"' in str(tokenizer.apply_chat_template(MESSAGES, [tool], tokenize=False))
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == "<|im_start|>user\na\nb<|im_end|>\n"


def test_encodings_are_lists_arrays_or_tensors_with_a_mask(tokenizer: AutoTokenizer) -> None:
    long, short = tokenizer.encode("Once upon a time"), tokenizer.encode("The")
    assert tokenizer("The") == {"input_ids": short, "attention_mask": [1] * len(short)}
    assert tokenizer(["Once upon a time", "The"]).input_ids == [long, short]
    both = tokenizer(["Once upon a time", "The"], return_tensors="np")
    padding = len(long) - len(short)
    assert both["input_ids"].tolist() == [long, [tokenizer.pad_token_id] * padding + short]
    assert both.attention_mask.tolist() == [[1] * len(long), [0] * padding + [1] * len(short)]
    assert list(both) == ["input_ids", "attention_mask"] and len(both) == 2
    assert both.to("cpu").input_ids is both.input_ids
    torch = pytest.importorskip("torch")
    tensors = tokenizer(["Once upon a time", "The"], return_tensors="pt").to("cpu")
    assert torch.equal(tensors.input_ids, torch.tensor(both.input_ids))
    assert tensors.attention_mask.dtype == torch.int64
    with pytest.raises(AttributeError, match="no 'labels'; it has input_ids, attention_mask"):
        _ = both.labels


def test_decoding(tokenizer: AutoTokenizer) -> None:
    ids = [*tokenizer.encode("Paris."), 4089]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (4089, 4087, 4096)
    assert tokenizer.decode(ids) == "Paris.<|im_end|>"
    assert tokenizer.decode(np.array(ids), skip_special_tokens=True) == "Paris."
    assert tokenizer.decode(4089) == "<|im_end|>"
    assert tokenizer.batch_decode(np.array([ids, ids]), skip_special_tokens=True) == ["Paris.", "Paris."]
    with pytest.raises(RequestError, match="batch_decode takes several"):
        tokenizer.decode([ids])


def test_generate_pads_on_both_sides_and_rows_are_as_alone(tokenizer: AutoTokenizer, model: AutoModelForCausalLM) -> None:
    texts = [CHAT_TEXT, "<|im_start|>user\nWhat is the opposite of hot?<|im_end|>\n<|im_start|>assistant\n"]
    inputs = tokenizer(texts, return_tensors="np")
    found = model.generate(**inputs, max_new_tokens=20)
    width = inputs.input_ids.shape[1]
    assert isinstance(found, np.ndarray) and (found[:, :width] == inputs.input_ids).all()
    answers = tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
    assert answers == ["The capital of France is Paris.", "The opposite of hot is cold."]
    for row, text in enumerate(texts):
        alone = tokenizer([text], return_tensors="np")
        output = model.generate(**alone, max_new_tokens=20)[0][alone.input_ids.shape[1] :]
        rest = found[row, width:]
        assert rest[: len(output)].tolist() == output.tolist() and set(rest[len(output) :]) <= {tokenizer.pad_token_id}


def test_sampling_is_asked_for(tokenizer: AutoTokenizer, model: AutoModelForCausalLM) -> None:
    inputs = tokenizer(["Once upon a time"], return_tensors="np")
    greedy = model.generate(**inputs, max_new_tokens=8).tolist()
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False, temperature=2.0).tolist() == greedy
    drawn = model.generate(**inputs, max_new_tokens=8, do_sample=True, seed=1, num_return_sequences=3)
    assert drawn.shape[0] == 3 and len({tuple(row) for row in drawn.tolist()}) == 3
    assert model.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=1, seed=1).tolist() == greedy
    assert model.eval() is model
    lists: Any = [[46, 710], [46, 710]]
    assert model.generate(lists, max_new_tokens=2).shape == (2, 4)


def test_dtypes_by_name_or_as_torch_writes_them() -> None:
    class Written:
        def __str__(self) -> str:
            return "torch.float32"

    assert auto.dtype_name(Written()) == "float32" and auto.dtype_name("auto") == "auto"
    with pytest.raises(ConfigError, match="dtype is 'int8'; expected auto, float32"):
        AutoModelForCausalLM.from_pretrained("tiny-next", dtype="int8")


@pytest.mark.parametrize("device_map", ["balanced", {"": 0}, 0, "cuda:1"])
def test_other_device_maps_get_a_sentence(device_map: Any) -> None:
    with pytest.raises(ConfigError, match="expected 'auto', 'cpu', 'cuda' or None, since a model runs on one device"):
        AutoModelForCausalLM.from_pretrained("tiny-next", device_map=device_map)


def test_auto_takes_cuda_only_where_torch_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(auto, "LLM", lambda model, **options: seen.append((options["backend"], options["config"].device)))
    monkeypatch.setattr(auto, "cuda_available", lambda: True)
    for device_map in ("auto", "cpu", "cuda", None):
        AutoModelForCausalLM.from_pretrained("tiny-next", device_map=device_map)
    monkeypatch.setattr(auto, "cuda_available", lambda: False)
    AutoModelForCausalLM.from_pretrained("tiny-next", device_map="auto", backend=["torch", "numpy"])
    assert seen == [("torch", "cuda"), ("numpy", "cpu"), ("torch", "cuda"), ("numpy", "cpu"), (["torch", "numpy"], "cpu")]


def test_tensors_of_torch_need_torch(tokenizer: AutoTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deltaloom.backends.torch.tensors", None)
    with pytest.raises(ConfigError, match="needs torch, which is not installed"):
        tokenizer(["a"], return_tensors="pt")
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    assert auto.cuda_available() is False


def test_bad_calls_are_sentences(tokenizer: AutoTokenizer, model: AutoModelForCausalLM) -> None:
    with pytest.raises(ConfigError, match="return_tensors is 'tf', expected 'pt', 'np' or None"):
        encoding.tensor(np.ones(1), "tf")
    with pytest.raises(RequestError, match="at least one text"):
        tokenizer([])
    with pytest.raises(RequestError, match="need padding=True"):
        tokenizer(["a", "a b c"], return_tensors="np", padding=False)
    with pytest.raises(RequestError, match="rows of different lengths; pad them on the left"):
        model.generate([[1], [1, 2]])
    with pytest.raises(RequestError, match=r"input_ids has shape \[2\]"):
        model.generate([1, 2])
    with pytest.raises(RequestError, match=r"attention_mask has shape \[1, 1\]"):
        model.generate([[1, 2]], [[1]])
    with pytest.raises(RequestError, match="prompt 0 is empty"):
        model.generate([[1, 2]], [[0, 0]])
    with pytest.raises(CheckpointError, match="neither a folder nor a bundled name"):
        AutoTokenizer.from_pretrained("Qwen/none")
