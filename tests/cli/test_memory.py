"""``deltaloom memory`` as a user runs it."""

import json
from pathlib import Path

import pytest

from deltaloom.cli import app

CONFIG_80B = Path(__file__).resolve().parents[1] / "models" / "config_80b.json"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = app.run(["memory", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_it_shows_what_the_80b_takes_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, CONFIG_80B, "--json", "--context", "32768", "--batch", "2")
    found = json.loads(out)
    assert code == 0 and found["measured"] is None
    planned = found["planned"]
    assert planned["held"] == pytest.approx(4 * 79.67e9, rel=0.001)
    assert planned["token"] == 2 * 2 * 24576 and planned["filled"] == 32768 * planned["token"]
    assert planned["fixed"] == pytest.approx(2 * (75.5e6 + 2 * 1.8e6), rel=0.01)
    assert planned["total"] == planned["held"] + planned["states"] + sum(one["nbytes"] for one in planned["working"])
    assert {one["title"]: one["planned"] for one in planned["working"]} == {"prefill": False, "decode": True}


def test_a_rank_of_a_mesh_has_its_part(capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(run(capsys, CONFIG_80B, "--json")[1])["planned"]
    part = json.loads(run(capsys, CONFIG_80B, "--json", "--mesh", "tp=2")[1])["planned"]
    assert part["ranks"] == 2 and whole["ranks"] == 1
    assert 0.5 <= part["held"] / whole["held"] < 0.51
    assert part["token"] * 2 == whole["token"] and part["fixed"] * 2 == whole["fixed"]
    _, out, _ = run(capsys, CONFIG_80B, "--mesh", "tp=2")
    assert "each of 2 ranks" in out.splitlines()[0]


def test_the_tiny_model_is_measured_beside_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--measure", "--context", "100", "--json")
    found = json.loads(out)
    planned, measured = found["planned"], found["measured"]
    assert code == 0
    assert (planned["held"], planned["mapped"], planned["states"]) == tuple(measured[key] for key in ("held", "mapped", "states"))
    _, text, _ = run(capsys, "--measure", "--context", "100", "--buffers")
    lines = text.splitlines()
    assert lines[0] == "1 sequence of 100 tokens, prefill in steps of 512"
    assert lines[1].split() == ["planned", "measured"]
    buffers = [line.split() for line in lines if line.startswith("  linear_layer ")]
    assert {"out", "scratch"} <= {line[2] for line in buffers} and "linear_attn.heads" in {line[1] for line in buffers}


def test_without_a_context_it_takes_what_the_model_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "--json")[1])["planned"]["context"] == 2047
    assert json.loads(run(capsys, CONFIG_80B, "--json")[1])["planned"]["context"] == 4096


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((str(CONFIG_80B), "--measure"), "is a config.json without weights"),
        (("--measure", "--mesh", "tp=2"), "--measure and --mesh exclude each other"),
        (("--batch", "0"), "batch is 0, expected at least 1"),
        (("--context", "-3"), "context is -3, expected at least 0"),
        (("--measure", "--context", "5000"), "maximum context length of 2048"),
        (("no-such-model",), "no-such-model"),
    ],
)
def test_mistakes_are_sentences(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("deltaloom: ") and sentence in err
