"""``plugins check``: what it prints and writes, how it ends, and that a fault that is planted in a plugin is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import deltaloom.cli.plugins_check as plugins_check
from deltaloom.cli.app import run
from deltaloom.cli.plugins_check import report, summary
from deltaloom.graph.errors import CompileError
from deltaloom.graph.op import Array, Case, Draw, Op
from deltaloom.graph.plugin import Plugin
from deltaloom.graph.plugins import registered
from deltaloom.graph.types import TensorType, f32, f64
from deltaloom.ops.signature import floating
from deltaloom.passes.kernel import KernelTable, dtype_in
from deltaloom.testing import Outcome

FOUND = [
    Outcome("op lab.twice", "types", "passed", "", 0.25),
    Outcome("op lab.twice", "torch", "failed", "output 0 is off\ndrawn: 0, 1", 0.5),
    Outcome("op lab.twice", "laws", "unclaimed", "'laws' is not claimed"),
    Outcome("backend lab", "mixed with numpy", "skipped", "no second device"),
]


def test_the_summary_counts_names_and_quotes() -> None:
    text = summary("lab", FOUND)
    lines = [line.split() for line in text.splitlines()]
    assert ["passed", "failed", "skipped", "unclaimed"] in lines
    assert ["op", "lab.twice", "1", "1", "-", "1"] in lines and ["backend", "lab", "-", "-", "1", "-"] in lines
    assert ["all", "1", "1", "1", "1"] in lines
    assert "FAILED op lab.twice: torch\n  output 0 is off\n  drawn: 0, 1" in text
    assert "1  no second device" in text and "1  'laws' is not claimed" in text
    assert text.endswith("1 of 4 checks failed")
    assert summary("lab", FOUND[:1]).endswith("lab passes: 1 checks")


def test_many_kernels_of_a_backend_are_one_row() -> None:
    few = [Outcome(f"kernel lab.k{number} for op{number}", "guards", "passed") for number in range(12)]
    assert "kernel lab.k11 for op11" in summary("lab", few)
    many = [
        *few,
        Outcome("kernel lab.k12 for op12", "guards", "failed", "wrong"),
        Outcome("kernel other.k for op", "guards", "passed"),
    ]
    lines = [line.split() for line in summary("lab", many).splitlines()]
    assert ["13", "kernels", "of", "lab", "12", "1", "-", "-"] in lines
    assert ["kernel", "other.k", "for", "op", "1", "-", "-", "-"] in lines
    assert ["FAILED", "kernel", "lab.k12", "for", "op12:", "guards"] in lines


def test_the_report_has_every_check() -> None:
    made = report({"plugin": {"name": "lab"}, "examples": 5}, FOUND)
    assert json.loads(json.dumps(made)) == made
    assert (made["format"], made["version"], made["conforms"]) == ("deltaloom.plugins.check", 1, False)
    assert made["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "unclaimed": 1}
    torch = {"subject": "op lab.twice", "check": "torch", "status": "failed", "text": FOUND[1].text, "seconds": 0.5}
    assert made["checks"][1] == torch
    assert report({}, FOUND[:1])["conforms"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--examples", "0"], "--examples is 0, expected 1 to 100000"),
        (["--backends", ","], "--backends is ',', which names none"),
        (["--json", "/no/such/folder/report.json"], "the report cannot be written to /no/such/folder/report.json: No such file"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_the_work(flags: list[str], message: str, capsys: Any) -> None:
    assert run(["plugins", "check", "no_such_plugin", *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins_check, "find_spec", lambda name: None if name == "hypothesis" else object())
    with pytest.raises(CompileError, match=r"needs hypothesis; install them with `pip install 'deltaloom\[testing\]'`"):
        plugins_check.require_packages()


def test_an_unknown_plugin_is_a_sentence(capsys: Any, tmp_path: Path) -> None:
    assert run(["plugins", "check", "no_such_plugin", "--examples", "1"]) == 2
    assert "no_such_plugin" in capsys.readouterr().err


class Twice(Op):
    """2 x, in the dtype of x."""

    name: ClassVar[str] = "lab.twice"

    def infer(self, x: TensorType) -> TensorType:
        floating("x", x)
        return x

    def reference(self, x: Array) -> Array:
        return x + x

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(), (draw.normal(draw.size()),))


def kernels(factor: float) -> KernelTable:
    """A table with one kernel, which multiplies by ``factor``."""
    table = KernelTable("numpy")

    @table.kernel("lab.twice", when=(dtype_in("x", f32, f64),))
    def times(op: Any, x: Array) -> Array:
        return x * np.asarray(factor, x.dtype)

    return table


def test_a_plugin_that_is_right_passes(capsys: Any, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with registered(Plugin("lab", ops={"lab.twice": Twice}, kernels={"numpy": kernels(2.0)})):
        assert run(["plugins", "check", "lab", "--examples", "5", "--backends", "numpy", "--json", str(target)]) == 0
    said = capsys.readouterr()
    assert "lab passes: " in said.out and said.err == ""
    made = json.loads(target.read_text())
    assert (made["conforms"], made["backends"], made["examples"]) == (True, ["numpy"], 5)
    assert made["plugin"] == {"name": "lab", "distribution": None, "version": None, "api": [1, 0], "claims": None}
    subjects = {check["subject"] for check in made["checks"]}
    assert subjects == {"op lab.twice", "kernel numpy.lab.times for lab.twice", "kernel numpy.reference for lab.twice"}


def test_a_kernel_that_is_off_is_named_with_its_op_and_a_case(capsys: Any) -> None:
    with registered(Plugin("lab", ops={"lab.twice": Twice}, kernels={"numpy": kernels(2.001)})):
        assert run(["plugins", "check", "lab", "--examples", "10", "--backends", "numpy", "--json", "-"]) == 1
    said = capsys.readouterr()
    failed = [check for check in json.loads(said.out)["checks"] if check["status"] == "failed"]
    assert [(one["subject"], one["check"]) for one in failed] == [
        ("kernel numpy.lab.times for lab.twice", "agrees with the reference")
    ]
    assert "output 0 of the numpy.lab.times for lab.twice() is" in failed[0]["text"] and "drawn: " in failed[0]["text"]
    assert "FAILED kernel numpy.lab.times for lab.twice: agrees with the reference" in said.err


def test_what_a_plugin_claims_it_must_have(capsys: Any) -> None:
    with registered(Plugin("lab", ops={"lab.twice": Twice}, claims=("torch", "sharding"))):
        assert run(["plugins", "check", "lab", "--examples", "2", "--backends", "numpy"]) == 1
    said = capsys.readouterr().out
    assert "op lab.twice claims 'torch' and does not have it" in said
    assert "op lab.twice claims 'sharding' and does not have it" in said


def test_what_cannot_be_imported_is_a_failure_not_a_traceback(capsys: Any) -> None:
    broken = Plugin("lab", ops={"lab.twice": "no_such_module:Twice"}, passes={"lab.step": "json:no_such_name"})
    with registered(broken):
        assert run(["plugins", "check", "lab", "--examples", "2", "--backends", "numpy"]) in (1, 2)
    said = capsys.readouterr()
    assert "no_such_module" in said.out + said.err and "Traceback" not in said.out + said.err


def test_a_plugin_that_offers_nothing_is_a_sentence(capsys: Any) -> None:
    with registered(Plugin("lab")):
        assert run(["plugins", "check", "lab"]) == 2
    assert "offers nothing" in capsys.readouterr().err
