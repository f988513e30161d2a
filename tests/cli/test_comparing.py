"""``compare``, ``bisect`` and ``repro`` as a user runs them: what they say, as text and as JSON, and how they end."""

import json
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

import deltaloom.backends.numpy.backend  # noqa: F401  (its kernels are put into the table)
from deltaloom.backends.numpy.table import table
from deltaloom.cli.app import run
from deltaloom.passes.fuse.norm import FuseAddRMSNorm

TOKENS = ("--tokens", "5,17,99,3,44,7", "--steps", "1")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """NumPy's attention with its output halved."""

    def replaced(kernel: Any) -> Any:
        @wraps(kernel.run)
        def wrong(*given: Any, **buffers: Any) -> Any:
            made = kernel.run(*given, **buffers)
            made[0][...] *= 0.5
            return made

        return replace(kernel, run=wrong) if kernel.op == "gated_attention" else kernel

    monkeypatch.setattr(table, "kernels", [replaced(kernel) for kernel in table.kernels])
    return monkeypatch


def test_compare_says_that_nothing_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", *TOKENS]) == 0
    said = capsys.readouterr().out
    assert said.startswith("numpy against reference: ") and "nothing parts" in said and said.count("  step ") == 2


def test_compare_names_what_parts_and_writes_it(
    broken: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "fault"
    assert run(["compare", *TOKENS, "--repro", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "the first value that parts is layers.3.self_attn.gated in step 0 (the prompt)" in said
    assert "cause (numpy): the kernel numpy.gated_attention_blocks does not compute what gated_attention means" in said
    assert f"`deltaloom repro {folder}` tries it again" in said
    assert run(["repro", str(folder)]) == 1
    assert "now: wrong" in capsys.readouterr().out
    broken.undo()
    assert run(["repro", str(folder)]) == 0


def test_compare_as_json(broken: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "--backends", "unfused,numpy", *TOKENS, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["version"], told["a"], told["b"]) == ("deltaloom.compare", 1, "unfused", "numpy")
    finding = told["finding"]
    assert (finding["name"], finding["cause"]["kind"], finding["cause"]["side"]) == ("layers.3.self_attn.gated", "kernel", "numpy")
    assert finding["nodes"]["numpy"]["kernel"] == "numpy.gated_attention_blocks"
    assert finding["nodes"]["numpy"]["rules"] == ["fuse: gated_attention"] and not finding["nodes"]["unfused"]["rules"]
    assert finding["difference"]["error"] > finding["difference"]["allowed"]


def test_bisect_names_the_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bisect", *TOKENS[:2]]) == 0
    assert "no pass changes what is computed" in capsys.readouterr().out
    wrong = lambda self, g, m: g.add_rms_norm(m.delta, m.delta, m.weight, eps=m["eps"], zero_centred=m["zero_centred"])  # noqa: E731
    monkeypatch.setattr(FuseAddRMSNorm, "rewrite", wrong)
    assert run(["bisect", *TOKENS[:2], "--repro", str(tmp_path / "fault")]) == 1
    assert "rule add_rms_norm at %" in capsys.readouterr().out and (tmp_path / "fault" / "graph.json").exists()
    assert run(["bisect", *TOKENS[:2], "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["culprit"]["rule"] == "add_rms_norm" and not all(trial["good"] for trial in told["trials"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backends", "numpy"), "expected two ways with a comma between them"),
        (("--backends", "numpy,numpy"), "there is nothing to compare"),
        (("--backends", "numpy,tp=0"), "mesh axis tp has 0 ranks"),
        (("--backends", "numpy,cudda"), "no backend 'cudda'"),
        (("--tokens", "1,x"), "--tokens has 'x', expected token ids"),
        (("--tokens", "1,99999999"), "token ids are"),
        (("nowhere",), "neither a folder nor a bundled name"),
    ],
)
def test_what_cannot_be_compared_gets_a_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
