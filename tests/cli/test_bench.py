"""``deltaloom bench``: on a small config under Triton's interpreter, and what it refuses."""

import json
import os
import sys
from pathlib import Path

import pytest

from deltaloom.cli import app
from deltaloom.graph.errors import CompileError

CONFIG = str(Path(__file__).resolve().parents[1] / "golden" / "next_base" / "config.json")
SMALL = ("--backend", "cuda", "--device", "cpu", "--dtype", "float32", "--layers", "4", "--steps", "1", "--context", "3")


def run(capsys, *arguments):
    code = app.run(["bench", "latency", *arguments])
    return code, *capsys.readouterr()


def test_decode_steps_are_timed(capsys):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)")
    code, out, err = run(capsys, CONFIG, *SMALL, "--batch", "1,2", "--profile", "h200", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["format"] == "deltaloom.bench.latency" and set(found["phases"]) == {"compile", "weights"}
    assert [(row["batch"], row["context"], row["layers"], row["finite"]) for row in found["rows"]] == [
        (1, 3, 4, True),
        (2, 3, 4, True),
    ]
    for row in found["rows"]:
        assert row["output_throughput"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["median_tpot_ms"] == pytest.approx(row["layer"] * 4000) and 0 < row["floor"] < row["seconds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,,2"), "--batch is '1,,2', expected whole numbers with commas between them"),
        (("--context", "-1"), "--context is '-1', expected whole numbers"),
        (("--batch", "٣"), "--batch is '٣', expected whole numbers"),
        ((), "the backend numpy records no decode steps; use --backend cuda on a machine with a GPU"),
        (("--profile", "h2000"), "h2000"),
    ],
)
def test_what_cannot_be_is_a_sentence(capsys, arguments, message):
    code, out, err = run(capsys, CONFIG, *arguments)
    assert (code, out) == (2, "") and message in err


def test_a_batch_of_nobody_is_refused(capsys):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)")
    code, _, err = run(capsys, CONFIG, *SMALL, "--batch", "0")
    assert code == 2 and "batch is 0, expected at least 1" in err


def test_another_engine_is_refused(capsys):
    code, _, err = run(capsys, CONFIG, "--against", "vllm")
    assert code == 2 and "--against is 'vllm', expected hf" in err


def test_without_transformers_it_says_so(monkeypatch):
    peer = pytest.importorskip("deltaloom.backends.torch.transformers_peer", exc_type=ImportError)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CompileError, match="--against hf needs the package transformers, which cannot be imported"):
        peer.TransformersPeer({}, {}.__getitem__, device="cpu", dtype=None)
