"""A model family that only a plugin knows: its fields, its graph, its weights, a mesh, and text from it."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
from plugins.distributions import Site

from deltaloom import CompileConfig, Plugin, build_graph, compile, load
from deltaloom.cli.app import run
from deltaloom.graph import plugins
from deltaloom.graph.errors import ConfigError, PluginError
from deltaloom.graph.ir import Graph
from deltaloom.graph.plugins import registered
from deltaloom.graph.types import DType
from deltaloom.models.build import build_graph as build_family
from deltaloom.models.config import ModelConfig, read_config
from deltaloom.models.families import FIXED, Family, family_named
from deltaloom.models.plans import legal
from deltaloom.models.qwen3.graph import model as qwen3_model
from deltaloom.testing.model_suite import write_checkpoint
from deltaloom.testing.toy_models import HYBRID, random_weights

SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
FIELDS = {name: HYBRID[name] for name in SIZES} | {"model_type": "lab_text", "depth": 2, "max_position_embeddings": 64}


def read_depth(values: Mapping[str, object]) -> Mapping[str, object]:
    """``depth`` is this family's word for the number of layers."""
    if not isinstance(values.get("depth", 1), int):
        raise ConfigError(f"depth is {values['depth']!r}, expected a number of layers")
    return {**values, "num_hidden_layers": values.get("depth", 1)}


def graph(config: ModelConfig, dtype: DType, names: Collection[str] | None) -> Graph:
    """As Qwen3."""
    return qwen3_model(config, dtype, names)


FAMILY = Family(
    "lab_text",
    sizes={**family_named("qwen3").sizes, "memory_size": 7},
    partial_rotary_factor=1.0,
    norm_topk_prob=False,
    extra=frozenset({"depth", "nickname"}),
    fixed={**FIXED, "gate": ("open",)},
    reader=read_depth,
    graph=graph,
    plan=family_named("qwen3").plan,
)
LAB = Plugin("lab", models={"lab_text": FAMILY})


def test_fields_of_its_own_are_read_and_others_refused() -> None:
    with registered(LAB):
        config = read_config({**FIELDS, "nickname": "L", "gate": "open"})
        assert (config.model_type, config.num_hidden_layers) == ("lab_text", 2)
        assert config.more == {"memory_size": 7, "depth": 2, "nickname": "L"}
        assert read_config({**FIELDS, "memory_size": 9}).more["memory_size"] == 9
        for change, message in (
            ({"no_such_field": 1}, "'no_such_field' is not a field of lab_text"),
            ({"memory_size": 0}, "memory_size"),
            ({"memory_size": "many"}, "memory_size"),
            ({"gate": "shut"}, "gate is the string 'shut'; lab_text is supported only with the string 'open'"),
            ({"depth": "deep"}, "the model configuration: depth is 'deep', expected a number of layers"),
            ({"num_experts": 4}, "it belongs to qwen3_moe and qwen3_next"),
        ):
            with pytest.raises(ConfigError, match=message):
                read_config({**FIELDS, **change})
    with pytest.raises(ConfigError, match="'lab_text', which is unknown; known are qwen3, qwen3_moe, qwen3_next"):
        read_config(FIELDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint of the family."""
    with registered(LAB):
        write_checkpoint(tmp_path, FIELDS, random_weights(graph_of(FIELDS)))
    return tmp_path


def graph_of(fields: Mapping[str, object]) -> Graph:
    return build_family(read_config(fields)).main


def test_a_checkpoint_of_it_computes_what_the_same_layers_compute_as_qwen3(folder: Path, tmp_path: Path) -> None:
    ids = np.array([[3, 1, 4, 1, 5]])
    with registered(LAB):
        found = load(folder).forward(ids).logits
    fields = json.loads((folder / "config.json").read_text())
    del fields["depth"]
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "qwen3", "num_hidden_layers": 2}))
    expected = load(folder).forward(ids).logits
    assert found is not None and expected is not None and np.array_equal(found, expected)


def test_it_is_built_looked_at_and_divided_by_its_own_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CompileConfig(mesh={"tp": 2})
    with registered(LAB):
        assert build_graph(folder / "config.json").main.name == "lab_text"
        assert "lab_text" in compile(graph_of(FIELDS), config).driver.shared.graph.name
        assert run(["inspect", str(folder)]) == 0
        assert "lab_text" in capsys.readouterr().out
        assert legal(read_config(FIELDS), {"tp": 2}).refusals == ()
    whole = Plugin("lab", models={"lab_text": dataclasses.replace(FAMILY, plan=())})
    with registered(whole):
        assert "does not say what of it can be divided" in legal(read_config(FIELDS), {"tp": 2}).refusals[0]
        with pytest.raises(ConfigError, match="'lab_text' does not say what of it a mesh divides; give compile"):
            compile(graph_of(FIELDS), config)
    with registered(LAB):
        unknown = graph_of(FIELDS)
    with pytest.raises(ConfigError, match="nothing says how a mesh divides the graph 'lab_text'; known are qwen3, .*; give"):
        compile(unknown, config)


def test_a_built_in_family_is_replaced_only_by_the_configuration(folder: Path) -> None:
    own = dataclasses.replace(FAMILY, model_type="qwen3")
    fields = {**FIELDS, "model_type": "qwen3"}
    with registered(Plugin("lab", models={"qwen3": own})):
        with pytest.raises(ConfigError, match="'depth' is not a field of qwen3"):
            read_config(fields)
        assert read_config(fields, use={"models.qwen3": "lab"}).family is own
        (folder / "config.json").write_text(json.dumps(fields))
        use = {"models.qwen3": "lab"}
        assert load(folder, config=CompileConfig(use=use)).forward(np.array([[1]])).logits is not None
        with pytest.raises(ConfigError, match="'depth' is not a field"):
            load(folder)


def test_the_choice_of_a_run_file_is_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(f'[model]\nmodel = "{folder}"\n[compile]\nuse = {{ "models.lab_text" = "lab" }}\n')
    with registered(LAB):
        assert run(["generate", "--config", str(run_file), "--print-config"]) == 0
    assert 'use = {"models.lab_text" = "lab"}' in capsys.readouterr().out
    assert run(["generate", "--config", str(run_file), "--print-config"]) == 2
    assert "there is no plugin 'lab'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {"hidden_size": 4}}, "the family 'lab_text' has no vocab_size and no max_position_embeddings"),
        ({"graph": ""}, "the family 'lab_text' has no graph"),
        ({"plan": ("o_proj",)}, "has 'o_proj' in its plan, expected Divide"),
    ],
)
def test_a_family_that_lacks_something_is_refused_when_it_is_written(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FAMILY, **change)  # type: ignore[arg-type]


def test_what_is_no_family_or_has_no_function_is_said(site: Site) -> None:
    site.module("family_lab", "number = 7\n")
    for target, message in (
        ({"lab_text": {"sizes": {}}}, "it is dict, expected a deltaloom.models.families.Family"),
        ({"other_text": FAMILY}, "its model type is 'lab_text'; it has to be 'other_text'"),
        ({"lab_text": "family_lab:FAMILY"}, "module 'family_lab' has no attribute 'FAMILY'"),
    ):
        with registered(Plugin("lab", models=target)), pytest.raises(PluginError, match=message):
            family_named(next(iter(target)))
    for path, message in (("family_lab:number", "it is int, expected a function"), ("no_such_lab:f", "No module named")):
        with registered(Plugin("lab", models={"lab_text": dataclasses.replace(FAMILY, graph=path)})):
            with pytest.raises(PluginError, match=f"'graph' of model type 'lab_text', at '{path}', cannot be used: .*{message}"):
                graph_of(FIELDS)


def test_two_plugins_with_one_model_type() -> None:
    with registered(LAB, Plugin("rival", models={"lab_text": FAMILY})):
        with pytest.raises(PluginError, match="'lab_text' is offered by the plugin 'lab' .* and plugin 'rival'"):
            read_config(FIELDS)
        assert read_config(FIELDS, use={"models.lab_text": "rival"}).family is FAMILY
    assert not plugins.offers("models")
