"""Verification of exported models: right ones pass, and what was changed afterwards is found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import deltaloom  # noqa: E402
from deltaloom.backends.onnx.cut import cut  # noqa: E402
from deltaloom.backends.onnx.flat import flatten  # noqa: E402
from deltaloom.cli.app import run  # noqa: E402
from deltaloom.runtime.onnx_cases import subject_of  # noqa: E402
from deltaloom.runtime.onnx_export import export_onnx, prepared  # noqa: E402
from deltaloom.runtime.onnx_source import read_source  # noqa: E402
from deltaloom.runtime.onnx_verify import VerifyReport, verify_export  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "next_leftpad"


def report_of(**options: Any) -> VerifyReport:
    report = options["result"].report
    assert isinstance(report, VerifyReport)
    return report


@pytest.mark.parametrize("profile", ["portable", "modern", "ort"])
def test_a_whole_model_is_right(profile: str, tmp_path: Path) -> None:
    report = report_of(result=export_onnx(GOLDEN, tmp_path / "model.onnx", profile=profile, verify=True))
    assert report.ok and len(report.rows) == 61 and not report.failures
    errors = [row.error for row in report.rows if "tokens" in row.case]
    assert 0 < max(errors) < 1e-4


@pytest.mark.parametrize("part", [{"op": "gated_delta_rule"}, {"op": "router_topk"}, {"nodes": "layers.1"}], ids=str)
def test_a_part_agrees_with_its_graph(part: dict[str, str], tmp_path: Path) -> None:
    report = report_of(result=export_onnx("tiny-next", tmp_path / "part.onnx", verify=True, **part))  # type: ignore[arg-type]
    assert report.ok, report.failures
    levels = {row.case.rpartition(", ")[2] for row in report.rows[1:]}
    assert levels == {"all rewrites", "none rewrites", *(["reference evaluator"] if "op" in part else [])}
    assert max(row.error for row in report.rows) > 0 and len(report.rows) >= 1 + len(levels) * 28


def test_a_part_that_computes_something_else_is_found(tmp_path: Path) -> None:
    result = export_onnx("tiny-next", tmp_path / "part.onnx", nodes="layers.1")
    source = read_source("tiny-next", "float32")
    whole = flatten(prepared(source.graphs.main, ("logits", "final_norm")))
    subject = subject_of(cut(whole, "layers.1"), whole, source)
    source.close()
    assert verify_export(result, None, subject=subject).ok
    tampered(result.path, other_epsilon)
    failures = verify_export(result, None, subject=subject).failures
    assert failures and all("of the largest element, allowed 5e-05" in failure for failure in failures)


def test_float16_is_counted_by_tokens(tmp_path: Path) -> None:
    report = report_of(result=export_onnx("tiny-next", tmp_path / "model.onnx", dtype="float16", verify=True))
    assert report.ok and sum("share of 859 tokens" in row.case for row in report.rows) == 2


def tampered(path: Path, change: Any) -> None:
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    onnx.save(model, str(path))


def other_epsilon(model: Any) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "eps":
                attribute.f = 0.3


def dropped_mask(model: Any) -> None:
    """Padding is taken for tokens."""
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[place] = "all_valid"
    model.graph.node.insert(0, onnx.helper.make_node("Sign", ["positive"], ["all_valid"]))
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["attention_mask", "one"], ["positive"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "one"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_epsilon, "likeliest tokens are others"),
        (dropped_mask, "padded on the left"),
        (lambda model: model.graph.node.pop(), "onnx.checker refuses model.onnx"),
        (lambda model: setattr(model, "ir_version", 99), "refuses"),
    ],
)
def test_what_was_changed_is_found(change: Any, says: str, tmp_path: Path) -> None:
    result = export_onnx(GOLDEN, tmp_path / "model.onnx")
    tampered(result.path, change)
    report = verify_export(result, deltaloom.load(GOLDEN))
    assert not report.ok and any(says in failure for failure in report.failures), report.failures


def test_the_command_says_so_and_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(GOLDEN), "-o", str(tmp_path / "a"), "--verify"]) == 0
    assert "61 of 61 checks hold" in capsys.readouterr().out
    assert run(["export", str(GOLDEN), "-o", str(tmp_path / "b"), "--verify", "--json", "--op", "rms_norm"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert len(model["verified"]) > 80 and all(row["ok"] for row in model["verified"])
    monkeypatch.setattr("deltaloom.runtime.onnx_verify.LIMITS", {"float32": 1e-12})
    assert run(["export", str(GOLDEN), "-o", str(tmp_path / "c"), "--verify"]) == 2
    assert "off by" in capsys.readouterr().err
