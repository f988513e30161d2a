"""The driver: pipelines as data, passes left out, fuel, the ledger, and what the largest model costs to compile."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens.golden_data import case_named, compare, walk

import deltaloom
from deltaloom.graph.errors import CompileError, ConfigError
from deltaloom.passes.config import CompileConfig, compile_config
from deltaloom.passes.table import PROGRAM, SHARED, TABLE, check_order, make_pass, pass_class, step_name

OPTIONAL = ("canonicalise", "fold", "pack_siblings", "fuse", "border_fusion")


def test_the_table_names_passes_by_their_own_names() -> None:
    assert {name: pass_class(name).name for name in TABLE} == {name: name for name in TABLE}
    assert {step_name(step) for step in (*SHARED, *PROGRAM)} <= set(TABLE)


def test_the_standard_order_is_one_that_can_work() -> None:
    shared = check_order([make_pass(step) for step in SHARED])
    assert "lifted" in shared
    assert {"selected", "assigned", "segmented"} <= check_order([make_pass(step) for step in PROGRAM], shared)


LOWER = ["select_outputs", "assume_unpadded", "specialise", "assign", "transfers"]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"pipeline": ["canonicalize", "lift_weights"]}, ConfigError, "no pass 'canonicalize'; did you mean 'canonicalise'"),
        ({"pipeline": ["lift_weights"]}, CompileError, "'lift_weights' requires 'canonical', .* run canonicalise before it"),
        ({"pipeline": ["canonicalise"]}, CompileError, "'assign' requires 'lifted', .* run lift_weights before it"),
        (
            {"pipeline": ["canonicalise", "lift_weights", "pack_siblings"]},
            CompileError,
            "'pack_siblings' cannot work on a graph that is 'lifted' already; put 'pack_siblings' before 'lift_weights'",
        ),
        ({"program": ["lift_weights", *LOWER]}, CompileError, "'lifted' already; it belongs into the shared part"),
        ({"pipeline": ["canonicalise", "lift_weights", "assign"]}, ConfigError, "'assign' takes 'layouts', .* program part"),
        ({"program": LOWER[:-1]}, ConfigError, "not 'segmented'; put transfers into it"),
        ({"program": LOWER[1:]}, ConfigError, "not 'selected'; put select_outputs into it"),
        ({"program": [LOWER[0], "serving_layout", *LOWER[2:]]}, ConfigError, "which only serving programs have"),
        ({"program": [LOWER[0], *LOWER[2:]]}, ConfigError, "not 'padding_decided'; put assume_unpadded into it"),
        ({"skip": ["lift_weights"]}, CompileError, "'assign' requires 'lifted'"),
        ({"skip": ["fusion"]}, ConfigError, "skip names 'fusion', which is not in the pipeline; did you mean 'border_fusion'"),
        ({"pipeline": ["canonicalise", {"pass": "fuse", "rule": 3}]}, ConfigError, "no option 'rule'; did you mean 'rules'"),
        ({"pipeline": ["canonicalise", {"pass": "fuse", "fuel": "x"}]}, ConfigError, "option 'fuel' of pass 'fuse' is 'x'"),
        ({"pipeline": ["canonicalise", {"pass": "shard", "mesh": []}]}, ConfigError, "the compiler gives 'mesh' to it"),
        ({"pipeline": ["canonicalise", {"pass": "lift_weights", "x": 1}]}, ConfigError, "no option 'x'; it has none"),
        ({"pipeline": [{"rules": []}]}, ConfigError, "does not name its pass"),
        ({"pipeline": "canonicalise"}, ConfigError, "pipeline is 'canonicalise', expected a list of passes"),
        ({"mesh": {"tp": 2}, "skip": ["shard"]}, ConfigError, "mesh is given, but the pass 'shard'"),
        ({"quantise": "int8", "skip": ["quantise"]}, ConfigError, "quantise is given, but the pass 'quantise'"),
    ],
)
def test_impossible_pipelines_are_refused_with_the_configuration(
    table: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compile_config(table)


@cache
def graph() -> Any:
    return deltaloom.build_graph("tiny-next").main


def hits(compiled: deltaloom.CompiledModel) -> list[str]:
    rows = compiled.driver.ledgers["shared"]
    return [event.rule for row in rows for event in row.events if event.kind == "hit"]


def test_options_of_a_step_reach_its_pass() -> None:
    steps = ("canonicalise", "pack_siblings", {"pass": "fuse", "rules": ["packed_swiglu"]}, "lift_weights")
    assert set(hits(deltaloom.compile(graph(), CompileConfig(pipeline=steps)))) <= {"packed_swiglu"}
    alone = ("canonicalise", "pack_siblings", {"pass": "fuse", "rules": ["add_rms_norm"]}, "lift_weights")
    assert set(hits(deltaloom.compile(graph(), CompileConfig(pipeline=alone)))) == {"add_rms_norm"}


def test_fuel_ends_the_rewrites_after_so_many() -> None:
    everything = hits(deltaloom.compile(graph()))
    assert len(everything) > 5
    for fuel in (0, 1, 4, len(everything)):
        compiled = deltaloom.compile(graph(), CompileConfig(fuel=fuel))
        assert hits(compiled) == everything[:fuel]
        kinds = {event.kind for row in compiled.driver.ledgers["shared"] for event in row.events}
        assert ("out of fuel" in kinds) == (fuel < len(everything))


@cache
def golden(*skip: str, fuel: int | None = None) -> list[np.ndarray]:
    """Logits of every stage of two goldens, compared with those that the library gave."""
    found = []
    for case in (case_named("next_base", "chunked"), case_named("next_base", "batch2")):
        model = deltaloom.load(case.folder, config=CompileConfig(skip=skip, fuel=fuel))
        state = None
        for stage in walk(case):
            state = state or model.new_state(len(stage.token_ids))
            mask = None if stage.valid.all() else stage.valid
            out = model.forward(stage.token_ids, state=state, attention_mask=mask, output_hidden_states=True)
            assert out.logits is not None and out.hidden_states is not None and out.final_norm is not None
            hidden, norm = out.hidden_states, out.final_norm
            compare(case, stage, logits=out.logits, hidden=hidden, final_norm=norm, state=state.arrays().__getitem__)
            found.append(out.logits)
    return found


@pytest.mark.parametrize(
    "skip", [("fuse",), ("border_fusion",), ("pack_siblings",), ("fold",), ("fold", "pack_siblings", "fuse", "border_fusion")]
)
def test_results_are_the_same_without_any_of_the_optional_passes(skip: tuple[str, ...]) -> None:
    for wanted, found in zip(golden(), golden(*skip), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(np.abs(wanted).max()))


def test_results_are_the_same_with_half_of_the_rewrites() -> None:
    for wanted, found in zip(golden(), golden(fuel=5), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(np.abs(wanted).max()))


def test_a_pass_that_is_left_out_is_not_in_the_ledger() -> None:
    for skip in ((), ("fuse",), ("fold", "border_fusion")):
        ran = [row.name for row in deltaloom.compile(graph(), CompileConfig(skip=skip)).driver.ledgers["shared"]]
        idle = ("shard", "quantise")
        assert ran == [step_name(step) for step in SHARED if step_name(step) not in (*skip, *idle)]


def test_a_mesh_and_a_policy_bring_their_passes_in() -> None:
    rows = deltaloom.compile(graph(), CompileConfig(mesh={"tp": 2}, quantise="int8")).driver.ledgers["shared"]
    assert {"shard", "quantise"} <= {row.name for row in rows}


def test_the_script_of_a_failing_step_has_what_its_options_are_made_of(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        deltaloom.compile(graph(), CompileConfig(mesh={"tp": 3}, dump=str(tmp_path)))
    done = subprocess.run([sys.executable, tmp_path / "repro" / "shard" / "run.py"], capture_output=True, text=True, check=False)
    assert "which 3 ranks of 'tp' do not divide" in str(caught.value)
    assert done.returncode == 1 and "which 3 ranks of 'tp' do not divide" in done.stderr, done.stderr


BUDGET = """
import json, resource, sys, time
import deltaloom
compiled = deltaloom.compile(deltaloom.build_graph(sys.argv[1]).main)
programs = {kind: compiled.program(kind, outputs=("last_logits",)).graph for kind in ("prefill", "decode")}
try:  # ru_maxrss counts what the parent held when it forked
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bodies = {name: len(region.nodes) for name, region in programs["decode"].regions.items()}
print(json.dumps({"cpu": time.process_time(), "bytes": peak, "bodies": bodies}))
"""


def test_the_largest_model_compiles_within_its_budget() -> None:
    """48 layers with 512 experts, from the start of Python to both programs: 10 s of CPU and 500 MB."""
    config = Path(__file__).parents[1] / "models" / "config_80b.json"
    done = subprocess.run([sys.executable, "-c", BUDGET, str(config)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(f"{found['cpu']:.2f} s of CPU, {found['bytes'] / 1e6:.0f} MB")
    assert found["cpu"] < 10 and found["bytes"] < 500e6
    assert found["bodies"]["linear_layer"] <= 8 and found["bodies"]["attention_layer"] <= 9


def test_the_names_of_passes_in_the_documentation_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text.split("## The pipeline")[1].split("\n## ")[0], re.MULTILINE)
    assert set(listed) == set(TABLE)
