"""What the layer graphs are made of: bodies, names, types, layouts. What they compute is in tests/goldens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from goldens.golden_data import FOLDER, VARIANTS

from deltaloom.graph.dims import bounds, symbol
from deltaloom.graph.errors import CheckpointError, ConfigError
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import QuantType, bf16, bool_, f8_e4m3, f32, f64, i64
from deltaloom.graph.verify import verify
from deltaloom.models.build import ModelGraphs, build_graph
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import ModelConfig, read_config
from deltaloom.models.coverage import coverage
from deltaloom.models.families import FAMILIES, family_named
from deltaloom.models.inventory import checkpoint_tensors

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past", low=0)


def config_of(variant: str, **changes: object) -> ModelConfig:
    return read_config(FOLDER / variant, changes)


def names_of(variant: str) -> list[str]:
    with Checkpoint.open(FOLDER / variant) as checkpoint:
        return checkpoint.names()


def bodies(graph: Graph) -> list[str]:
    """The region of each layer, in order."""
    return [instance.graph.name for instance in graph.instances() if instance.prefix]


def fp8(kept: list[str]) -> dict[str, object]:
    return {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": kept}


@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_verify_and_read_exactly_the_checkpoint(variant: str) -> None:
    with Checkpoint.open(FOLDER / variant) as checkpoint:
        found = checkpoint.shapes()
        dtypes = {name: checkpoint.info(name).dtype for name in found}
    built = build_graph(config_of(variant), dtype=bf16, names=found)
    for graph in filter(None, (built.main, built.mtp)):
        verify(graph)
    expected = checkpoint_tensors(built.main, built.mtp)
    report = coverage({name: tensor.shape for name, tensor in expected.items()}, found)
    assert report.complete, report.summary()
    assert {name: tensor.dtype.numpy for name, tensor in expected.items() if tensor.dtype} == {
        name: dtypes[name] for name, tensor in expected.items() if tensor.dtype
    }


@pytest.mark.parametrize(
    "variant, layers",
    [
        ("next_base", ["linear_layer"] * 3 + ["attention_layer"] + ["linear_layer"] * 3 + ["attention_layer"]),
        ("next_fused_experts", (["linear_layer_stacked"] * 3 + ["attention_layer_stacked"]) * 2),
        ("next_fp8", ["linear_layer_fp8", "attention_layer_fp8"]),
        ("qwen3_dense", ["attention_layer_dense"] * 3),
        ("qwen3_moe", ["attention_layer"] * 2 + ["attention_layer_dense", "attention_layer"]),
    ],
)
def test_one_body_a_kind_of_layer(variant: str, layers: list[str]) -> None:
    main = build_graph(config_of(variant), names=names_of(variant)).main
    assert bodies(main) == layers
    assert sorted(main.regions) == sorted(set(layers))
    prefixes = [instance.prefix for instance in main.instances()]
    assert prefixes == ["", *(f"model.layers.{number}." for number in range(len(layers)))]


def test_dense_layers_are_where_the_config_puts_them() -> None:
    mixed = build_graph(config_of("next_dense_mix")).main
    assert [name.endswith("_dense") for name in bodies(mixed)] == [False, True, False, True, False, False]
    stepped = build_graph(config_of("next_sparse_step2")).main
    assert [name.endswith("_dense") for name in bodies(stepped)] == [True, False, True, False, True]


@pytest.mark.parametrize("dtype", [f32, bf16, f64])
def test_signature_of_the_main_model(dtype: Any) -> None:
    main = build_graph(config_of("next_base"), dtype=dtype).main
    assert [(value.name, value.type) for value in main.inputs] == [
        ("token_ids", i64[BATCH, SEQ]),
        ("positions", i64[BATCH, SEQ]),
        ("valid", bool_[BATCH, PAST + SEQ]),
    ]
    types = {name: value.type for name, value in main.outputs}
    assert types == {
        "logits": dtype[BATCH, SEQ, 160],
        "last_logits": dtype[BATCH, 1, 160],
        "final_norm": dtype[BATCH, SEQ, 32],
        **{f"hidden.{number}": dtype[BATCH, SEQ, 32] for number in range(9)},
    }
    lows = {name: bounds(symbol(found.name, found.low, found.high)) for name, found in main.symbols().items()}
    assert lows == {"batch": (1, None), "past": (0, None), "seq": (1, None)}


def test_states_of_the_layers() -> None:
    """In bfloat16 the recurrent state alone stays float32; in float64 it is float64, for the reference."""
    states = build_graph(config_of("next_base"), dtype=bf16).main.all_states()
    assert len(states) == 16
    found = {name: (state.value.type, state.append_axis) for name, state in states.items() if ".2." in name or ".3." in name}
    assert found == {
        "model.layers.2.linear_attn.conv": (bf16[BATCH, 64, 3], None),
        "model.layers.2.linear_attn.delta": (f32[BATCH, 4, 8, 8], None),
        "model.layers.3.self_attn.key": (bf16[BATCH, 2, PAST, 32], 2),
        "model.layers.3.self_attn.value": (bf16[BATCH, 2, PAST, 32], 2),
    }
    wide = build_graph(config_of("next_base"), dtype=f64).main.all_states()
    assert wide["model.layers.2.linear_attn.delta"].value.type.dtype == f64


def test_key_and_value_heads_of_different_sizes() -> None:
    """The goldens have dk = dv: here channels, states and the scale of q tell them apart."""
    config = config_of("next_base", linear_key_head_dim=4, linear_value_head_dim=16)
    region = build_graph(config).main.region("linear_layer")
    verify(region)
    states = {state.name: state.value.type.shape[1:] for state in region.states}
    assert states == {"linear_attn.conv": (2 * 2 * 4 + 4 * 16, 3), "linear_attn.delta": (4, 4, 16)}
    assert region.producers["linear_attn.delta_rule"].op.attributes() == {"scale": 0.5}
    assert region.producers["linear_attn.qkvz"].outputs[0].type.shape[-1] == 2 * 2 * 4 + 2 * 4 * 16


def test_signature_of_the_mtp_head() -> None:
    built = build_graph(config_of("next_mtp"), dtype=bf16, names=names_of("next_mtp"))
    mtp = head(built)
    assert [(value.name, value.type) for value in mtp.inputs] == [
        ("next_ids", i64[BATCH, SEQ]),
        ("positions", i64[BATCH, SEQ]),
        ("valid", bool_[BATCH, PAST + SEQ]),
        ("hidden", bf16[BATCH, SEQ, 32]),
    ]
    assert {name: value.type.shape[1:] for name, value in mtp.outputs} == {
        "logits": (SEQ, 160),
        "hidden": (SEQ, 32),
        "last_logits": (1, 160),
        "last_hidden": (1, 32),
        "fc_out": (SEQ, 32),
        "layer_out": (SEQ, 32),
    }
    assert sorted(mtp.all_states()) == ["mtp.layers.0.self_attn.key", "mtp.layers.0.self_attn.value"]
    shared = set(mtp.all_params()) & set(built.main.all_params())
    assert shared == {"model.embed_tokens.weight", "lm_head.weight"}


def test_who_has_an_mtp_head() -> None:
    config, names = config_of("next_mtp"), names_of("next_mtp")
    assert build_graph(config).mtp is not None
    assert build_graph(config, names=[name for name in names if not name.startswith("mtp.")]).mtp is None
    silent = config_of("next_mtp", num_nextn_predict_layers=0)
    assert build_graph(silent).mtp is None
    assert build_graph(silent, names=names).mtp is not None
    assert build_graph(config_of("qwen3_moe")).mtp is None


def test_the_mtp_layer_may_be_dense() -> None:
    config = config_of("next_mtp")
    assert any("mlp.experts" in name for name in head(build_graph(config)).all_params())
    dense = head(build_graph(config, names=["mtp.layers.0.mlp.gate_proj.weight"])).all_params()
    assert dense["mtp.layers.0.mlp.gate_proj.weight"] == f32[56, 32]
    without = head(build_graph(config_of("next_mtp", num_experts=0, num_experts_per_tok=1)))
    assert "mtp.layers.0.mlp.gate_proj.weight" in without.all_params()


def test_tied_head_reads_the_embedding() -> None:
    config = config_of("next_heads_equal")
    assert config.tie_word_embeddings
    built = build_graph(config)
    for graph in (built.main, head(built)):
        assert "lm_head.weight" not in graph.all_params()
        readers = graph.users[next(p for p in graph.params if p.name == "model.embed_tokens.weight")]
        assert [node.op.name for node in readers] == ["embedding", "linear", "linear"]


def test_expert_layout_is_decided_layer_by_layer() -> None:
    config, names = config_of("next_base"), names_of("next_base")
    stacked = [name for name in names if not name.startswith("model.layers.1.mlp.experts")]
    stacked += [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    found = build_graph(config, names=stacked).main
    assert bodies(found)[:3] == ["linear_layer", "linear_layer_stacked", "linear_layer"]
    params = found.all_params()
    assert params["model.layers.1.mlp.experts.gate_up_proj"] == f32[8, 24, 32]
    assert params["model.layers.1.mlp.experts.down_proj"] == f32[8, 32, 12]


def test_experts_stored_both_ways_are_read_one_by_one() -> None:
    config, names = config_of("next_base"), names_of("next_base")
    both = [*names, "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    assert set(build_graph(config, names=both).main.regions) == {"linear_layer", "attention_layer"}


def test_a_layer_without_either_layout_is_reported_as_missing_experts() -> None:
    config, names = config_of("next_base"), names_of("next_base")
    rest = [name for name in names if not name.startswith("model.layers.5.mlp.experts")]
    expected = checkpoint_tensors(build_graph(config, names=rest).main)
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    report = coverage(shapes, {name: shapes[name] for name in rest})
    assert len(report.missing) == 3 * 8 and not report.unexpected
    assert "model.layers.5.mlp.experts.{0-7}.down_proj.weight" in report.summary()


def test_stacked_experts_in_fp8_are_refused() -> None:
    names = names_of("next_fused_experts")
    config = config_of("next_fused_experts", quantization_config=fp8(["lm_head"]))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj holds stacked experts"):
        build_graph(config, names=names)
    kept = ["lm_head", *(f"model.layers.{number}.mlp.experts" for number in range(8))]
    built = build_graph(config_of("next_fused_experts", quantization_config=fp8(kept)), names=names)
    assert built.main.all_params()["model.layers.0.mlp.experts.gate_up_proj"].dtype == f32


def test_fp8_modules_are_those_that_the_config_does_not_keep() -> None:
    """Names match whole or as a dotted prefix: ``mlp.gate`` does not keep ``mlp.gate_proj``."""
    kept = ["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp.gate", "model.layers.2"]
    params = build_graph(config_of("qwen3_dense", quantization_config=fp8(kept))).main.all_params()
    quantised = {name for name, type_ in params.items() if isinstance(type_.dtype, QuantType)}
    mlp, attention = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
    assert quantised == {
        *(f"model.layers.0.mlp.{name}.weight" for name in mlp),
        *(f"model.layers.1.mlp.{name}.weight" for name in mlp),
        *(f"model.layers.1.self_attn.{name}.weight" for name in attention),
    }
    assert params["model.layers.0.mlp.up_proj.weight"] == QuantType(f8_e4m3, (128, 128), f32)[56, 32]


def test_layers_share_a_body_exactly_if_their_fp8_modules_are_the_same() -> None:
    kept = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.experts.3", "model.layers.1.input_layernorm"]
    main = build_graph(config_of("qwen3_moe", quantization_config=fp8(kept))).main
    # layer 1 keeps a norm, which is never quantised: it has layer 3's body
    assert bodies(main) == ["attention_layer_fp8", "attention_layer_fp8_2", "attention_layer_dense_fp8", "attention_layer_fp8_2"]


def test_fp8_reaches_head_and_mtp_head_where_they_are_not_kept() -> None:
    built = build_graph(config_of("next_mtp", quantization_config=fp8(["mtp.fc"])))
    params = {**built.main.all_params(), **head(built).all_params()}
    quantised = [name for name in ("lm_head", "mtp.fc", "mtp.layers.0.self_attn.q_proj") if is_fp8(params, f"{name}.weight")]
    assert quantised == ["lm_head", "mtp.layers.0.self_attn.q_proj"]


def test_attention_bias_is_regrouped_with_its_rows() -> None:
    """q_proj's bias is stored head by head, query before gate, like its rows; the graph puts all queries first."""
    config = config_of("next_base", attention_bias=True)
    main = build_graph(config, dtype=f64).main
    region = main.region("attention_layer")
    types = {value.name: value.type for value in region.params}
    sizes = (("q", 256), ("k", 64), ("v", 64), ("o", 32))
    biases = {name: type_.static_shape() for name, type_ in types.items() if name.endswith(".bias")}
    assert biases == {f"self_attn.{m}_proj.bias": (size,) for m, size in sizes}

    rng = np.random.default_rng(3)
    values = {name: rng.normal(size=type_.static_shape()) for name, type_ in types.items()}
    seen = run_region(region, values, rng)
    x = seen["input_layernorm"]
    for name in ("k", "v"):
        expected = x @ values[f"self_attn.{name}_proj.weight"].T + values[f"self_attn.{name}_proj.bias"]
        np.testing.assert_allclose(seen[f"self_attn.{name}_proj"], expected)
    stored = x @ values["self_attn.q_proj.weight"].T + values["self_attn.q_proj.bias"]
    queries, gates = np.moveaxis(stored.reshape(2, 5, 4, 2, 32), 3, 0)
    expected = np.concatenate([queries.reshape(2, 5, 128), gates.reshape(2, 5, 128)], axis=-1)
    np.testing.assert_allclose(seen["self_attn.q_proj"], expected)
    expected = seen["self_attn.gated"] @ values["self_attn.o_proj.weight"].T + values["self_attn.o_proj.bias"]
    np.testing.assert_allclose(seen["self_attn.o_proj"], expected)


@pytest.mark.parametrize("variant", ["qwen3_dense", "qwen3_moe"])
def test_siblings_have_attention_biases_too(variant: str) -> None:
    params = build_graph(config_of(variant, attention_bias=True)).main.all_params()
    found = {name.removeprefix("model.layers.1.self_attn.") for name in params if name.endswith(".bias") and ".1." in name}
    assert found == {"q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"}


def test_every_family_of_the_configs_has_graphs() -> None:
    for name in FAMILIES:
        family = family_named(name)
        assert family.model_type == name and family.function("graph") is not None
    with pytest.raises(ConfigError, match="model_type is the string 'qwen4', .* known are qwen3, qwen3_moe, qwen3_next"):
        family_named("qwen4")


def head(built: ModelGraphs) -> Graph:
    assert built.mtp is not None
    return built.mtp


def is_fp8(params: Mapping[str, Any], name: str) -> bool:
    return isinstance(params[name].dtype, QuantType)


def run_region(region: Graph, values: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Every value of an attention region over random inputs, batch 2, five new tokens."""
    sizes = {"batch": 2, "seq": 5, "past": 0}
    inputs = {
        value.name: rng.normal(size=value.type.substitute(sizes).static_shape()) for value in region.inputs if value.name != "valid"
    }
    states = {s.name: np.zeros(s.value.type.substitute(sizes).static_shape()) for s in region.states}
    seen: dict[str, Any] = {}
    interpret(region, {**inputs, "valid": np.ones((2, 5), bool)}, values.__getitem__, states, observe=seen.__setitem__)
    return seen
