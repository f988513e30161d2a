"""States by the names that consumers know, the MTP head as a file of its own, and what onnxruntime-genai reads beside them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import deltaloom  # noqa: E402
from deltaloom.graph.errors import ExportError  # noqa: E402
from deltaloom.models.bundled import model_folder  # noqa: E402
from deltaloom.runtime.onnx_export import export_onnx  # noqa: E402

CLOSE = 3e-4
"""Of the largest logit."""
TOKENS = 12
TINY = "tiny-next"


def ids():
    return np.random.default_rng(3).integers(0, 4000, (1, TOKENS))


class Session:
    """A model run step by step; what it gives as ``present…`` is what it gets as ``past…``."""

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        sizes = {"batch_size": 1, "past_sequence_length": 0}
        past = [one for one in self.session.get_inputs() if one.name.startswith("past")]
        self.states = {one.name: np.zeros([sizes.get(size, size) for size in one.shape], np.float32) for one in past}
        self.seen = 0

    def step(self, tokens, **more):
        count = tokens.shape[1]
        feed = {
            "input_ids": tokens, "attention_mask": np.ones((1, self.seen + count), np.int64),
            "position_ids": np.arange(self.seen, self.seen + count)[None], **more, **self.states,
        }  # fmt: skip
        names = [one.name for one in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, feed), strict=True))
        present = {name: found.pop(name) for name in names if name.startswith("present")}
        past = {name.replace("present", "past", 1): array for name, array in present.items()}
        self.states = {name if name in self.states else name.replace("past.", "past_key_values."): a for name, a in past.items()}
        self.seen += count
        return found


NAMES = {
    "portable": ("past_key_values.0.conv_state", "past_key_values.0.recurrent_state", 3),
    "genai": ("past.0.conv", "past.0.recurrent", 3),
    "transformersjs": ("past_conv.0", "past_recurrent.0", 4),
}


@pytest.mark.parametrize("style", NAMES)
def test_states_carry_the_sequence_under_any_names(tmp_path, style):
    conv, recurrent, width = NAMES[style]
    session = Session(export_onnx(TINY, tmp_path / "model.onnx", state_names=style).path)
    assert {conv, recurrent, "past_key_values.3.key"} <= set(session.states) and session.states[conv].shape[-1] == width
    names = set(session.states)
    parts = [session.step(part)["logits"] for part in np.split(ids(), [5, 6, 7], axis=1)]
    assert set(session.states) == names
    want = deltaloom.load(TINY, backend="numpy").forward(ids()).logits
    assert np.abs(np.concatenate(parts, axis=1) - want).max() <= CLOSE * np.abs(want).max()


def test_the_mtp_head_drafts_from_the_hidden_states_of_the_model(tmp_path):
    result = export_onnx(TINY, tmp_path / "model.onnx", mtp=True)
    assert result.mtp is not None and result.mtp.path == tmp_path / "mtp.onnx"
    assert result.mtp.inputs == (
        "input_ids", "position_ids", "attention_mask", "hidden_states", "past_key_values.0.key", "past_key_values.0.value",
    )  # fmt: skip
    assert result.mtp.outputs == ("logits", "hidden_states_out", "present.0.key", "present.0.value")
    assert {file.name for file in (*result.files, *result.mtp.files)} == {file.name for file in tmp_path.iterdir()}
    for one in (result, result.mtp):
        onnx.checker.check_model(one.path, full_check=True)
    hidden = Session(result.path).step(ids())["hidden_states"]
    following = np.roll(ids(), -1, axis=1)
    head = Session(result.mtp.path)
    steps = [slice(0, 7), slice(7, 8), slice(8, TOKENS)]
    found = [head.step(following[:, at], hidden_states=hidden[:, at])["logits"] for at in steps]
    model = deltaloom.load(TINY, backend="numpy")
    assert model.mtp is not None
    executor = model.mtp.executor
    want = executor.run({"next_ids": following, "hidden": hidden}, executor.new_state(1), None, ("logits",))["logits"]
    assert np.abs(np.concatenate(found, axis=1) - want).max() <= CLOSE * np.abs(want).max()


def test_genai_config_says_what_the_files_are(tmp_path):
    result = export_onnx(TINY, tmp_path / "tiny.onnx", genai_config=True, mtp=True, state_names="genai")
    assert tmp_path / "genai_config.json" in result.files
    model = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert (model["type"], model["eos_token_id"], model["context_length"]) == ("decoder", [4089, 4087], 2048)
    decoder, mtp = model["decoder"], model["mtp"]
    assert (decoder["filename"], mtp["filename"], mtp["main_hidden_states"]) == ("tiny.onnx", "mtp.onnx", "hidden_states")
    assert decoder["inputs"]["past_conv_names"] % 0 in result.inputs
    assert decoder["outputs"]["present_recurrent_names"] % 0 in result.outputs
    assert set(mtp["inputs"].values()) - {name for name in mtp["inputs"].values() if "%" in name} <= set(result.mtp.inputs)
    assert decoder["outputs"]["hidden_states"] in result.outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_names": "transformersjs"}, "state_names is 'transformersjs', and onnxruntime-genai knows 'portable' and 'genai'"),
        ({"nodes": "layers.1"}, "genai_config describes a whole model; leave nodes and op out"),
        ({"model": deltaloom.build_graph(TINY)}, "genai_config describes a checkpoint's model"),
    ],
    ids=str,
)
def test_a_config_that_says_nothing_true_is_not_written(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(options.pop("model", TINY), tmp_path / "model.onnx", genai_config=True, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("style", ["portable", "genai"])
def test_onnxruntime_genai_generates_the_same_tokens(tmp_path, style):
    genai = pytest.importorskip("onnxruntime_genai")
    export_onnx(TINY, tmp_path / "model.onnx", genai_config=True, state_names=style)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model_folder(TINY)) / file, tmp_path)
    model = genai.Model(str(tmp_path))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=40, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    llm = deltaloom.LLM(TINY, backend="numpy")
    want = (
        llm.generate([ids()[0].tolist()], deltaloom.SamplingParams(temperature=0, max_tokens=40 - TOKENS))[0].outputs[0].token_ids
    )
    assert list(generator.get_sequence(0))[TOKENS:] == list(want)
