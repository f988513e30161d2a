"""A small random checkpoint against what transformers computed for it (``golden/make_golden.py``), on the backends for the CPU."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import deltaloom
from deltaloom.graph.types import f64
from deltaloom.models.build import build_graph
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import read_config
from deltaloom.models.plans import shard_pass
from deltaloom.passes.canonicalise import Canonicalise
from deltaloom.passes.lift_weights import LiftWeights
from deltaloom.passes.pipeline import Context, run_pipeline
from deltaloom.runtime.lockstep import LockStep

FOLDER = Path(__file__).parent / "golden"
EXPECTED = load_file(FOLDER / "expected.safetensors")
CASES = sorted({key.split(".")[0] for key in EXPECTED} - {"greedy"})
BACKENDS = ["numpy", "torch"] if find_spec("torch") else ["numpy"]
TOLERANCE = {"float64": 4e-4, "float32": 1e-3}
"""On logits of about 4. The expected ones were computed in float32, from which float64 is up to 2e-4 away."""


def stages(case: str) -> Iterator[dict[str, np.ndarray]]:
    """What is given and expected, in the order of the runs."""
    names = {key.removeprefix(f"{case}.").rpartition(".")[0] for key in EXPECTED if key.startswith(f"{case}.")}
    for stage in sorted(names, key=lambda name: (("prefill", "chunk", "decode").index(name.split(".")[0]), name)):
        start = f"{case}.{stage}."
        yield {key.removeprefix(start): array for key, array in EXPECTED.items() if key.startswith(start)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "dtype"), [(name, "float32") for name in BACKENDS] + [("numpy", "float64")])
def test_every_stage_agrees_with_transformers(backend: str, dtype: str, case: str) -> None:
    model = deltaloom.load(FOLDER, backend=backend, dtype=dtype)
    state = None
    for stage in stages(case):
        ids, mask = stage["input_ids"], stage.get("attention_mask")
        state = state or model.new_state(len(ids))
        logits = model.forward(ids, state=state, attention_mask=mask).logits
        assert logits is not None
        real = np.ones(ids.shape, bool) if mask is None else mask[:, -ids.shape[1] :].astype(bool)
        expected = stage["logits"][real]
        np.testing.assert_allclose(logits[real], expected, rtol=0, atol=TOLERANCE[dtype])
        np.testing.assert_array_equal(logits[real].argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_likeliest_continuation_is_that_of_transformers(backend: str) -> None:
    llm = deltaloom.LLM(FOLDER, backend=backend)
    settings = deltaloom.SamplingParams(temperature=0.0, max_tokens=len(EXPECTED["greedy.continuation"]), ignore_eos=True)
    (result,) = llm.generate(["Once upon a time"], settings)
    assert list(result.prompt_token_ids) == EXPECTED["greedy.prompt"].tolist()
    assert list(result.outputs[0].token_ids) == EXPECTED["greedy.continuation"].tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_mesh_divides_it(ranks: int) -> None:
    """On that many simulated ranks, each with its part of the weights, the logits are those of transformers."""
    checkpoint, config = Checkpoint.open(FOLDER), read_config(FOLDER)
    graph = build_graph(config, dtype=f64, names=checkpoint.names()).main
    sharded = run_pipeline(graph, [Canonicalise(), shard_pass(config, {"tp": ranks}), LiftWeights()], Context()).graph
    together = LockStep(sharded, {"tp": ranks}, checkpoint)
    ids = EXPECTED["long.prefill.input_ids"]
    inputs = {"token_ids": ids, "positions": EXPECTED["long.prefill.position_ids"], "valid": np.ones(ids.shape, bool)}
    logits = together.run(inputs, together.start(1)).outputs["logits"]
    np.testing.assert_allclose(logits, EXPECTED["long.prefill.logits"], rtol=0, atol=TOLERANCE["float64"])


def test_the_padding_and_the_chunk_are_there() -> None:
    """The golden file has what the cases promise: else a case that compares nothing would pass."""
    assert CASES == ["long", "padded", "short"]
    assert [len(list(stages(case))) for case in CASES] == [6, 5, 4]
    assert (EXPECTED["padded.prefill.attention_mask"] == 0).sum() == 5 + 8
    assert EXPECTED["long.chunk.logits"].shape == (1, 3, 259)


@pytest.mark.parametrize("field", ["mrope_section", "rope_theta"])
def test_only_what_is_about_images_is_passed_over(field: str) -> None:
    """The sections of the rotation divide it among axes of an image; a text has the same position on each."""
    value = {"mrope_section": [4, 0, 0], "rope_theta": 500.0}[field]
    model = deltaloom.load(FOLDER, backend="numpy", hf_overrides={f"rope_parameters.{field}": value})
    logits = model.forward(EXPECTED["long.prefill.input_ids"]).logits
    assert logits is not None
    assert np.allclose(logits, EXPECTED["long.prefill.logits"], atol=1e-3) == (field == "mrope_section")
