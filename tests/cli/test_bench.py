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
    assert found["format"] == "deltaloom.bench.latency" and set(found["phases"]) == {"compile", "plan", "weights"}
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
        (("--backend", "torch,numpy"), "decode steps run on one backend, not on torch, numpy; name one"),
        (("--against", "hf"), "the backend numpy records none; use --backend cuda"),
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


TORCH = ("--backend", "torch", "--layers", "4", "--context", "3")


def printed(capsys, *arguments):
    code = app.run(["bench", *arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_backend_that_records_nothing_is_timed_by_the_host(capsys, backend):
    pytest.importorskip("torch")
    found = json.loads(printed(capsys, "latency", CONFIG, *TORCH, "--backend", backend, "--batch", "2", "--steps", "2", "--json"))
    (row,) = found["rows"]
    assert row["finite"] and row["checked"] == 7 and 0 < row["fastest"] <= row["seconds"]
    assert row["peak"] >= row["allocated"] > 0
    # A token takes k and v of 2 heads of 16 in float32 in one attention layer of the four; a state is 3 delta layers'.
    fields = json.loads(Path(CONFIG).read_text())
    kv = 2 * fields["num_key_value_heads"] * fields["head_dim"] * 4
    keys = fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
    values = fields["linear_num_value_heads"] * fields["linear_value_head_dim"]
    delta = values * fields["linear_key_head_dim"] + (2 * keys + values) * (fields["linear_conv_kernel_dim"] - 1)
    assert found["planned"]["token"] == kv and found["planned"]["sequence"] == 3 * 4 * delta


def test_throughput_has_the_names_of_other_engines(capsys):
    pytest.importorskip("torch")
    found = json.loads(printed(capsys, "throughput", CONFIG, *TORCH, "--batch", "1,2", "--steps", "4", "--json"))
    for row, batch in zip(found["rows"], (1, 2), strict=True):
        assert len(row["gaps"]) == 4 and row["finite"] and row["checked"] == 11
        assert row["output_throughput"] == pytest.approx(batch * 4 / sum(row["gaps"]))
        assert row["mean_tpot_ms"] == pytest.approx(250 * sum(row["gaps"]))
        assert min(row["gaps"]) * 1000 <= row["median_itl_ms"] <= row["p99_itl_ms"] <= max(row["gaps"]) * 1000 + 1e-9
    shown = printed(capsys, "throughput", CONFIG, *TORCH, "--batch", "1", "--steps", "1")
    assert "logits: every one of 8 steps finite" in shown and "memory planned: weights" in shown


def test_logits_that_are_not_finite_are_told_of(capsys, monkeypatch):
    host_steps = pytest.importorskip("deltaloom.runtime.host_steps")
    monkeypatch.setattr(host_steps.HostStep, "broken", lambda self: 1)
    assert "logits NOT FINITE: batch 1 at 3 tokens" in printed(capsys, "latency", CONFIG, *TORCH, "--steps", "1")


def test_every_kernel_is_timed_beside_its_bytes(capsys):
    pytest.importorskip("torch")
    found = json.loads(printed(capsys, "kernels", CONFIG, *TORCH, "--profile", "h200", "--json"))
    (step,) = found["steps"]
    calls = {(row["body"], row["op"]): row["calls"] for row in step["rows"]}
    assert calls["linear_layer", "packed_gated_delta_net"] == 3 and calls["attention_layer", "shared_moe"] == 1
    totals = [row["total"] for row in step["rows"]]
    assert totals == sorted(totals, reverse=True) and min(totals) > 0
    heavy = next(row for row in step["rows"] if row["op"] == "shared_moe")
    assert heavy["work"]["bytes"] > 0 and heavy["floor"] >= heavy["work"]["bytes"] / 4.58e12 and heavy["timed"] == "host"
    assert "together" in printed(capsys, "kernels", CONFIG, *TORCH)


def test_the_phases_of_a_start_are_told_in_this_process(capsys):
    pytest.importorskip("torch")
    found = json.loads(printed(capsys, "startup", CONFIG, *TORCH, "--once", "--json"))
    (only,) = found["runs"]
    phases = only["phases"]
    assert set(phases) == {"import", "config", "compile", "plan", "weights", "record", "first_token", "together"}
    assert phases["together"] == pytest.approx(sum(phases.values()) - phases["together"])


def test_fresh_processes_get_the_flags_and_one_cache(capsys, monkeypatch):
    from deltaloom.cli import bench_startup

    seen = []

    class Made:
        returncode, stderr, stdout = 0, "", json.dumps({"runs": [{"phases": {"import": 1.0}}]})

    def fresh(command, env, **_):
        seen.append((command, env["TRITON_CACHE_DIR"]))
        return Made

    monkeypatch.setattr(bench_startup.subprocess, "run", fresh)
    found = json.loads(printed(capsys, "startup", CONFIG, *TORCH, "--batch", "2", "--json"))
    assert [run["cache"] for run in found["runs"]] == ["cold", "warm"] and seen[0] == seen[1]
    command = seen[0][0]
    assert command[1:6] == ["-m", "deltaloom", "bench", "startup", CONFIG] and command[-2:] == ["--once", "--json"]
    for flag, value in (("--backend", "torch"), ("--layers", "4"), ("--context", "3"), ("--batch", "2")):
        assert command[command.index(flag) + 1] == value


def test_a_fresh_process_that_fails_says_why(capsys):
    code = app.run(["bench", "startup", CONFIG, "--backend", "torch", "--context", "3", "--batch", "0"])
    assert code == 2 and "the fresh process failed: deltaloom: batch is 0" in capsys.readouterr().err


def test_the_backend_cuda_alone_means_a_gpu(capsys):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = run(capsys, CONFIG, "--backend", "cuda")
    assert (code, out) == (2, "") and "backend cuda needs an NVIDIA GPU" in err and err.count("\n") == 1
