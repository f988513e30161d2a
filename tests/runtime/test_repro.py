"""Folders that hold one fault: as small as it gets, whole or absent, right again once the fault is gone."""

import json
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltaloom.backends.numpy.backend  # noqa: F401  (its kernels are put into the table)
from deltaloom.backends.numpy.table import table
from deltaloom.cli.app import run
from deltaloom.graph.errors import CompileError, ConfigError
from deltaloom.graph.quantized import SCALE_SUFFIX, QuantizedArray
from deltaloom.models.bundled import model_folder
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.fuse.norm import FuseAddRMSNorm
from deltaloom.runtime.bisect import bisect
from deltaloom.runtime.compare import REFERENCE, compare
from deltaloom.runtime.locate import Cause
from deltaloom.runtime.repro import Repro, read_repro, write_repro
from deltaloom.runtime.shrink import repro_of_cause, repro_of_culprit

NUMPY = CompileConfig(backends=("numpy",), threads=1)
IDS = [5, 17, 99, 3, 44, 250, 7, 12, 300, 21]


def broken(kernels: list[Any], op: str) -> list[Any]:
    """The kernels with those of ``op`` adding 1 to what they give first."""

    def replaced(kernel: Any) -> Any:
        @wraps(kernel.run)
        def wrong(*given: Any, **buffers: Any) -> Any:
            made = kernel.run(*given, **buffers)
            first = made[0] if isinstance(made, tuple) else made
            first += 1
            return made

        return replace(kernel, run=wrong) if kernel.op == op else kernel

    return [replaced(kernel) for kernel in kernels]


def wrong_kernel(op: str) -> Repro:
    finding = compare("tiny-next", NUMPY, REFERENCE, ids=IDS, steps=1).finding
    assert finding is not None and finding.cause.call is not None and finding.cause.call.node.op.name == op
    return repro_of_cause(finding.cause, device="cpu", threads=1)


@pytest.mark.parametrize("op", ["add_rms_norm", "gated_attention", "shared_moe", "qkv_norm_rope", "gated_delta_net"])
def test_a_kernel_alone_and_small(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "kernels", broken(list(table.kernels), op))
    made = wrong_kernel(op)
    assert len(made.graph.nodes) == 1 and made.kernel.startswith("numpy.")
    assert all(10 not in value.type.shape for value in made.graph.inputs), "one token shows it as well as ten"
    write_repro(made, tmp_path / "fault")
    again = read_repro(tmp_path / "fault")
    assert again.try_again() is not None and run(["repro", str(tmp_path / "fault")]) == 1
    monkeypatch.undo()
    assert again.try_again() is None and run(["repro", str(tmp_path / "fault")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fault"]


def test_a_rewrite_alone_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = lambda self, g, m: g.add_rms_norm(m.x, m.x, m.weight, eps=m["eps"], zero_centred=m["zero_centred"])  # noqa: E731
    monkeypatch.setattr(FuseAddRMSNorm, "rewrite", wrong)
    culprit = bisect("tiny-next", ids=IDS).culprit
    assert culprit is not None
    with Checkpoint.open(model_folder("tiny-next")) as checkpoint:
        made = repro_of_culprit(culprit, checkpoint)
    assert [node.op.name for node in made.graph.nodes] == ["add", "rms_norm"]
    assert all(array.shape[:2] == (1, 1) for name, array in made.values.items() if array.ndim == 3)
    write_repro(made, tmp_path / "fault")
    assert run(["repro", str(tmp_path / "fault"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["rule"] == "add_rms_norm" and told["nodes"] == 2 and told["difference"]["error"] > 0.01
    monkeypatch.undo()
    assert run(["repro", str(tmp_path / "fault")]) == 0
    assert "now: it is right" in capsys.readouterr().out


def test_what_is_no_kernel_and_no_rewrite_is_refused() -> None:
    with pytest.raises(CompileError, match="a repro holds one kernel or one rewrite; this is neither: the strings differ"):
        repro_of_cause(Cause("ranks", "a", "x", "the strings differ"), device="cpu", threads=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table, "kernels", broken(list(table.kernels), "add_rms_norm"))
    write_repro(wrong_kernel("add_rms_norm"), tmp_path / "fault")
    return tmp_path / "fault"


def test_what_was_there_is_kept(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="exists already"):
        write_repro(read_repro(folder), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def changed(text: str, **fields: object) -> str:
    return json.dumps(json.loads(text) | fields)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("repro.json", lambda text: "", "cannot be read as a repro"),
        ("repro.json", lambda text: "[1]", "does not say deltaloom.repro version 1"),
        ("repro.json", lambda text: changed(text, version=2), "does not say deltaloom.repro version 1"),
        ("repro.json", lambda text: changed(text, kind="pass"), "kind is 'pass', expected 'kernel' or 'rewrite'"),
        ("repro.json", lambda text: changed(text, kernel=3), "kernel is 3, expected a string"),
        ("repro.json", lambda text: changed(text, threads="2"), "threads is '2', expected a number"),
        ("repro.json", lambda text: changed(text, kernel="numpy.gone"), "has no kernel 'numpy.gone' for op add_rms_norm now"),
        ("repro.json", lambda text: changed(text, backend="gone"), "gone"),
        ("graph.json", lambda text: text[:40], "cannot be read as a repro"),
        ("graph.json", lambda text: text.replace("add_rms_norm", "add_rms_nrm"), "cannot be read as a repro"),
    ],
)
def test_damaged_folders_get_a_sentence(
    folder: Path, name: str, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(change((folder / name).read_text()))
    assert run(["repro", str(folder)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("deltaloom: ") and "Traceback" not in said


@pytest.mark.parametrize("name", ["repro.json", "graph.json", "inputs.safetensors"])
def test_missing_files_are_named(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink()
    assert run(["repro", str(folder)]) == 2
    assert name in capsys.readouterr().err


def test_numbers_of_another_shape_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deltaloom.models.safetensors_file import write_safetensors

    found = read_repro(folder)
    arrays = {name: np.zeros((1, 1, 3), np.float32) for name in found.values}
    write_safetensors(folder / "inputs.safetensors", arrays)
    assert run(["repro", str(folder)]) == 2
    assert "expected" in capsys.readouterr().err


def test_codes_of_another_shape_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaloom.models.safetensors_file import write_safetensors

    monkeypatch.setattr(table, "kernels", broken(list(table.kernels), "linear"))
    finding = compare("tiny-next", replace(NUMPY, quantise="int8"), REFERENCE, ids=IDS, steps=0).finding
    assert finding is not None
    write_repro(repro_of_cause(finding.cause, device="cpu", threads=1), tmp_path / "fault")
    again = read_repro(tmp_path / "fault")
    assert again.kernel == "numpy.quantised_linear" and again.try_again() is not None
    arrays: dict[str, Any] = {}
    for name, value in again.values.items():
        if isinstance(value, QuantizedArray):
            arrays |= {name: value.data[:1], name + SCALE_SUFFIX: value.scale}
        else:
            arrays[name] = value
    write_safetensors(tmp_path / "fault" / "inputs.safetensors", arrays)
    with pytest.raises(ConfigError, match=r"has codes int8 \[1, 192\], .* which do not fit int8"):
        read_repro(tmp_path / "fault")


def test_numbers_that_the_kernel_cannot_take_are_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "kernels", broken(list(table.kernels), "embedding"))
    made = wrong_kernel("embedding")
    far = {name: np.full_like(value, 10**6) if name == "token_ids" else value for name, value in made.values.items()}
    write_repro(replace(made, values=far), tmp_path / "fault")
    assert run(["repro", str(tmp_path / "fault")]) == 2
    assert "the kernel numpy.embedding cannot be run on these numbers: IndexError" in capsys.readouterr().err
