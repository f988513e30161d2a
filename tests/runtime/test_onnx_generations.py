"""An exported model by itself, in a plain loop over ONNX Runtime: the 40 reference generations, and onnxruntime-genai's tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from deltaloom.runtime.onnx_export import export_onnx  # noqa: E402

FILE = Path(__file__).resolve().parents[1] / "golden" / "tiny_next" / "reference_generations.json"
ITEMS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["items"]
MOST = 64
"""Tokens of a reference at most."""
LAYERS = 8
"""Layers of the model: onnxruntime-genai finds states by their number."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("exported")
    export_onnx("tiny-next", path / "model.onnx")
    return path


class Loop:
    """A session and the states of one sequence; nothing of deltaloom is in it."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def start(self) -> None:
        sizes = {"batch_size": 1, "past_sequence_length": 0}
        past = [given for given in self.session.get_inputs() if given.name.startswith("past")]
        self.states = {given.name: np.zeros([sizes.get(size, size) for size in given.shape], np.float32) for given in past}
        self.length = 0

    def next(self, tokens: list[int]) -> int:
        """The likeliest token after some more tokens."""
        seen = self.length + len(tokens)
        feed = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(self.length, seen, dtype=np.int64)[None],
            **self.states,
        }
        found = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        logits = found.pop("logits")
        self.states = {name.replace("present", "past_key_values"): state for name, state in found.items()}
        self.length = seen
        return int(logits[0, -1].argmax())


def generated(loop: Loop, prompt: list[int], count: int, *, chunk: int) -> list[int]:
    """Greedy tokens, the prompt in pieces of ``chunk`` tokens."""
    loop.start()
    for begin in range(0, len(prompt), chunk):
        token = loop.next(prompt[begin : begin + chunk])
    tokens = [token]
    while len(tokens) < count:
        tokens.append(loop.next(tokens[-1:]))
    return tokens


def test_the_exported_model_reproduces_the_references(folder: Path) -> None:
    """Prompts at once, and every fourth in chunks too."""
    loop = Loop(folder / "model.onnx")
    for number, item in enumerate(ITEMS):
        wanted = item["output_ids"]
        assert 0 < len(wanted) <= MOST
        for chunk in (1000, 7) if number % 4 == 0 else (1000,):
            assert generated(loop, item["prompt_ids"], len(wanted), chunk=chunk) == wanted, item["skill"]


def genai_config(loop: Loop) -> dict[str, Any]:
    """What onnxruntime-genai has to know of the model: a decoder with states by their names."""
    names = [given.name for given in loop.session.get_inputs()]
    kinds = {"key": "past_key_names", "value": "past_value_names", "conv_state": "past_conv_names"}
    kinds["recurrent_state"] = "past_recurrent_names"
    there = {kind for kind in kinds if any(name.endswith(f".{kind}") for name in names)}
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    inputs |= {kinds[kind]: f"past_key_values.%d.{kind}" for kind in sorted(there)}
    outputs = {"logits": "logits"}
    outputs |= {kinds[kind].replace("past", "present"): f"present.%d.{kind}" for kind in sorted(there)}
    (key,) = {tuple(given.shape[1::2]) for given in loop.session.get_inputs() if given.name.endswith(".key")}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": key[1],
        "hidden_size": key[0] * key[1],
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": key[0],
        "num_key_value_heads": key[0],
        "num_hidden_layers": LAYERS,
    }
    model = {"type": "decoder", "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "context_length": 512, "vocab_size": 4096}
    return {"model": {**model, "decoder": decoder}, "search": {"max_length": 512, "past_present_share_buffer": False}}


@pytest.mark.slow
def test_onnxruntime_genai_generates_the_same_tokens(folder: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    loop = Loop(folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(genai_config(loop)), encoding="utf-8")
    model = genai.Model(str(folder))
    for item in ITEMS[::4]:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=512, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array([item["prompt_ids"]], np.int32))
        tokens: list[int] = []
        while len(tokens) < len(item["output_ids"]):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        assert tokens == item["output_ids"]
