"""``inspect``, ``diff``, ``explain``, ``source`` and ``ops`` as a user runs them: what they say, as text and as JSON."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deltaloom.cli import output
from deltaloom.cli.app import run
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.serialize import from_json

CONFIG = Path(__file__).parents[1] / "models" / "config_80b.json"


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> str:
        assert run(arguments) == 0
        said = capsys.readouterr()
        assert "deltaloom: " not in said.err, "warnings of torch, when it is imported, are not ours"
        return said.out

    return call


def parsed(text: str, kind: str) -> dict[str, Any]:
    assert text.count("\n") == 1
    found = json.loads(text)
    assert (found["format"], found["version"]) == (f"deltaloom.{kind}", 1)
    return found


def test_inspect_fits_a_screen_and_says_what_a_model_is(shown: Any) -> None:
    lines = shown("inspect").splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "6,155,488, of which a token uses 3,599,776" in text and "8: 2 × (3 × L + A)" in text
    (row,) = [line.split() for line in lines if line.startswith("L  linear_layer")]
    assert row[2:6] == ["6", "3.44", "M", "2.12"] and row[-1] == "numpy"
    assert any(line.startswith("decode.assign") for line in lines) and "\x1b" not in text


def test_inspect_as_json_adds_up(shown: Any) -> None:
    found = parsed(shown("inspect", "tiny-next", "--json", "--batch", "4", "--context", "100"), "inspect")
    assert (found["parameters"], found["mtp_parameters"]) == (6155488, 643328)
    assert found["layer_regions"] == [*["linear_layer"] * 3, "attention_layer"] * 2
    tops = [part for part in found["parts"] if part["depth"] == 0]
    for total, name in ((found["parameters"], "parameters"), (found["active_parameters"], "active")):
        assert sum(part[name] for part in tops) == total
    assert found["step"]["batch"] == 4 and found["step"]["flops"] == sum(part["work"]["flops"] for part in tops)
    inside = list(found["parts"][2:5])
    assert [part["depth"] for part in inside] == [1, 1, 1]
    assert sum(part["parameters"] for part in inside) == found["parts"][1]["parameters"]
    states = found["state"]
    assert states["bytes_at"]["32768"] == states["fixed_bytes"] + 32768 * states["bytes_per_token"]


def test_the_80b_from_its_config_alone(shown: Any) -> None:
    found = parsed(shown("inspect", str(CONFIG), "--json"), "inspect")
    assert (found["parameters"], found["layers"]) == (79_674_391_296, "12 × (3 × L + A)")
    assert sum(part["parameters"] for part in found["parts"] if part["depth"] == 0) == 79_674_391_296


def test_inspect_reads_no_weights(shown: Any, tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "models" / "tiny_next" / "config.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    found = parsed(shown("inspect", str(tmp_path), "--json", "--hf-overrides", '{"num_hidden_layers": 4}'), "inspect")
    assert found["layers"] == "3 × L + A" and found["parameters"] < 6155488


def test_the_graph_of_any_stage(shown: Any) -> None:
    both = shown("inspect", "--graph")
    assert both.startswith("graph qwen3_next (format 1)\n") and "graph qwen3_next_mtp (format 1)" in both
    assert len(parse_graph(shown("inspect", "--after", "fuse")).regions["linear_layer"].nodes) < 60
    (as_json,) = parsed(shown("inspect", "--after", "decode.specialise", "--json"), "graph")["graphs"]
    assert str(from_json(json.dumps(as_json)).inputs[0].type) == "i64[batch, 1]"
    assert shown("inspect", "--dot").startswith('digraph "qwen3_next" {')


def test_a_node_by_any_of_its_names(shown: Any) -> None:
    text = shown("inspect", "--node", "model.layers.3.self_attn.q")
    assert "%self_attn.q of attention_layer, at decode" in text and "2 times: model.layers.3., model.layers.7." in text
    assert re.search(r"built at +\S+layers.py:\d+", text) and "numpy.qkv_norm_rope" in text
    found = parsed(shown("inspect", "--node", "self_attn.k_norm", "--json"), "node")
    assert found["node"] == "self_attn.q", "the norm of the keys was fused into it"
    given = found["made_from"][0]
    assert given["stage"] == "given" and {"self_attn.k_norm", "self_attn.q"} <= {one["node"] for one in given["nodes"]}
    assert found["cost"]["flops"] == "1824*batch"


def test_diff_of_stages_and_programs(shown: Any) -> None:
    text = shown("diff", "fold", "pack_siblings")
    assert text.startswith("region linear_layer: ") and "  +   %linear_attn.qkvz_ba: " in text
    found = parsed(shown("diff", "prefill", "decode", "tiny-next", "--json"), "diff")
    assert (found["before"], found["after"]) == ("prefill", "decode")
    (layer,) = [one for one in found["bodies"] if one["body"] == "region linear_layer"]
    assert layer["nodes"][0] > layer["nodes"][1] and layer["removed"] > 5 and layer["lines"]
    assert shown("diff", "lift_weights", "shared") == "nothing changed between lift_weights and shared\n"


def test_colours_are_for_terminals_that_want_them(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = shown("diff", "fold", "pack_siblings").splitlines()
    assert lines[1].startswith("\x1b[31m  -   ") and lines[1].endswith("…\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown("diff", "fold", "pack_siblings").splitlines()
    assert max(map(len, plain)) == 60 and plain[1].endswith("…")


def test_explain_says_who_runs_what_and_why_not(shown: Any) -> None:
    text = shown("explain")
    assert "numpy.delta_step: axis 1 of q is seq, not 1" in text
    assert "gated_delta_net  linear_layer  numpy.delta_net_step: axis 1 of projected is seq, not 1" in text
    assert "rules that did not:" in text and "near miss" in text
    found = parsed(shown("explain", "--json", "--program", "decode"), "explain")
    kernels = {(row["body"], row["op"]): row["kernel"] for row in found["programs"]["decode"]["kernels"]}
    assert kernels["linear_layer", "gated_delta_net"] == "numpy.delta_net_step"
    assert {rule["kind"] for rule in found["rules"]} == {"hit", "near miss"} and found["layout_conflicts"] == []


def test_explain_one_op_or_node(shown: Any) -> None:
    found = parsed(shown("explain", "--op", "gated_delta_net", "--json"), "explain")
    assert found["programs"]["prefill"]["kernels"] == [] and len(found["programs"]["prefill"]["taken_apart"]) == 1
    text = shown("explain", "--node", "linear_attn.heads", "--program", "decode", "--unfold")
    assert "rules that applied:\n  gated_delta_net" in text and "= gated_delta_net in decode linear_layer stands for" in text
    assert "gated_delta_rule(%q, %k, %v" in text and "  %linear_attn.heads is %heads" in text


@pytest.mark.parametrize("program", ["prefill", "decode", "mixed", "serving_decode", "verify"])
def test_source_of_every_program(program: str, shown: Any) -> None:
    text = shown("source", program)
    compile(text, program, "exec")
    assert parsed(shown("source", "tiny-next", program, "--json"), "source")["source"] + "\n" == text


def test_ops_as_json(shown: Any) -> None:
    found = parsed(shown("ops", "linear", "--json"), "ops")
    (row,) = found["ops"]
    assert row["kernels"]["numpy"][0] == "linear" and row["reach"]["numpy"] == "any"
    assert any(limit["backend"] == "numpy" and limit["op"] == "" for limit in found["limitations"])


def test_the_page_of_ops_is_up_to_date(shown: Any) -> None:
    pytest.importorskip("torch")
    page = Path(__file__).parents[2] / "docs" / "ops.md"
    message = "run `deltaloom ops --markdown > docs/ops.md` and read what changed"
    assert page.read_text(encoding="utf-8") == shown("ops", "--markdown"), message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "given", "fuze"], "there is no stage 'fuze' of graph 'qwen3_next'; did you mean fuse"),
        (["diff", "given", "assign"], "that pass belongs to a program; name one, as in prefill.assign or decode.assign"),
        (["inspect", "--after", "quantise"], "that pass has nothing to do in this configuration"),
        (["inspect", "--after", ""], "there is no stage ''"),
        (["inspect", "--node", "mlp.router.weights"], "say which: linear_layer/mlp.router.weights, attention_layer/mlp"),
        (["inspect", "--node", "self_attn.kk"], "has no node 'self_attn.kk'; did you mean self_attn.k"),
        (["inspect", "--node", ""], "has no node ''"),
        (["inspect", "--batch", "0"], "batch is 0, expected at least 1"),
        (["inspect", "--context", "-1"], "context is -1, expected at least 0"),
        (["inspect", "--json", "--dot"], "--json and --dot exclude each other"),
        (["explain", "--op", "sigmoid"], "no node of these programs runs 'sigmoid': it was fused"),
        (["explain", "--op", "lineer"], "there is no op 'lineer'; did you mean linear"),
        (["explain", "--program", "middle"], "there is no program 'middle'; there is prefill, decode, mixed"),
        (["explain", "--node", "a", "--op", "b"], "--node and --op exclude each other"),
        (["explain", "--count"], "none of the model's backends (numpy) compiles"),
        (["explain", str(CONFIG), "--count"], "is a config.json without weights"),
        (["source", "tiny-next", "middle"], "there is no program 'middle'"),
        (["source", "nowhere"], "'nowhere' is neither"),
        (["ops", "linear", "--markdown"], "--markdown prints all ops as text"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("deltaloom: ") and message in said.err


def test_a_reader_that_goes_away_is_no_error() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    line = f"{sys.executable} -m deltaloom inspect --graph | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, check=False)
    assert result.stdout == "graph qwen3_next (format 1)\n" and result.stderr == "" and result.returncode in (0, 141)


def test_a_stream_without_our_letters_gets_question_marks() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "deltaloom", "inspect"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0 and "8: 2 ? (3 ? L + A)" in result.stdout and result.stderr == ""
