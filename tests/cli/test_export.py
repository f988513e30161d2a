"""``deltaloom export``: what it prints, where it writes, and how it ends."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("onnx")

from deltaloom.cli.app import run
from deltaloom.graph.registry import ops


def test_a_model_is_written_and_described(tmp_path, capsys):
    assert run(["export", "tiny-next", "-o", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    files = ("model.onnx", "model.derived.safetensors", "model.safetensors")
    assert f"wrote      {', '.join(str(tmp_path / 'out' / name) for name in files)}\n" in text
    assert "profile    portable, opset 21, IR 10\n" in text and "outputs    17: logits, present.0.conv_state," in text
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(files)


def test_json_tells_all_of_it(tmp_path, capsys):
    arguments = ["export", "--output", str(tmp_path / "x.onnx"), "--mtp", "--genai-config", "--state_names", "genai", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["version"]) == ("deltaloom.export", 1)
    main, mtp = found["models"]
    assert (
        main["path"] == str(tmp_path / "x.onnx") and "past.0.conv" in main["inputs"] and mtp["path"] == str(tmp_path / "mtp.onnx")
    )
    written = {file for one in (main, mtp) for file in one["files"]}
    assert written == {str(file) for file in tmp_path.iterdir()} and str(tmp_path / "genai_config.json") in written


@pytest.mark.parametrize(
    ("flags", "file", "functions"),
    [
        (["--op", "gated_delta_rule"], "gated_delta_rule.onnx", ["GatedDeltaRule"]),
        (["--nodes", "layers.3.mlp.shared_expert.gate_proj"], "model.onnx", ["Linear"]),
        (["--op", "rms_norm", "--no-functions", "--weights", "inline"], "rms_norm.onnx", []),
        (["--op", "linear", "--profile", "modern", "--opset", "27", "--dtype", "bfloat16-storage"], "linear.onnx", ["Linear"]),
        (["--op", "linear", "--quantise", "int4", "--weights", "none"], "linear.onnx", ["Linear", "Dequantize"]),
    ],
    ids=str,
)
def test_flags_say_what_is_written(tmp_path, capsys, flags, file, functions):
    assert run(["export", "-o", str(tmp_path), *flags, "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["path"] == str(tmp_path / file) and sorted(model["functions"]) == sorted(functions)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing says where to write to; give a folder with -o"),
        (["-o", "OUT", "--profile", "new"], "profile is 'new', expected portable, modern, ort"),
        (["-o", "OUT", "--nodes", "layers.77"], "has no node, scope or region 'layers.77'"),
        (["no/such/model", "-o", "OUT"], "the model 'no/such/model' is neither a folder nor a bundled name"),
        (["-o", "OUT", "--weights", "reference"], "cannot be external data of"),
        (["-o", "OUT", "--hf-overrides", "{"], "--hf-overrides"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_ends_with_1_and_one_sentence(tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert run(["export", *(str(out) if flag == "OUT" else flag for flag in flags)]) == 1
    streams = capsys.readouterr()
    assert streams.out == "" and message in streams.err and streams.err.startswith("deltaloom: ") and not out.exists()


def test_a_wrong_flag_ends_with_2(capsys):
    assert run(["export", "--opset", "many"]) == 2 and "Invalid value for '--opset'" in capsys.readouterr().err


def test_the_table_of_ops_is_that_of_the_registry(capsys):
    assert run(["export", "--list-ops"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["op", "portable"] and [line.split()[0] for line in lines] == [op.name for op in ops]
    rows = {line.split()[0]: line for line in lines}
    assert "rule" in rows["gated_delta_rule"] and "parts" in rows["shared_moe"]
    assert "no" in rows["paged_attention"] and rows["paged_attention"].endswith("has neither an onnx rule nor a decomposition")


def test_the_table_of_ops_as_json(capsys):
    assert run(["export", "--list-ops", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    status = {row["op"]: row["status"] for row in found["ops"]}
    assert found["format"] == "deltaloom.onnx_ops" and set(status["linear"].values()) == {"rule"}


def test_without_the_package_onnx_a_sentence_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'onnx' else found(name, package)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "deltaloom", "export", "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and "install it with `pip install 'deltaloom[onnx]'`" in done.stderr
