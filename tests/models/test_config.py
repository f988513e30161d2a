"""config.json: every published form reads, every contradiction is one sentence."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.graph.errors import CheckpointError, ConfigError
from deltaloom.models.bundled import model_folder
from deltaloom.models.config import read_config

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/config.json"))
PUBLISHED: dict[str, object] = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
    "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "model_type": "qwen3_next", "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16,
    "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2,
    "output_router_logits": False, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MODERN = {
    name: value
    for name, value in PUBLISHED.items()
    if name not in ("rope_theta", "rope_scaling", "partial_rotary_factor", "full_attention_interval", "torch_dtype")
} | {
    "dtype": "bfloat16",
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
}


def refused(raw: dict[str, object], overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(raw, overrides)
    text = str(caught.value)
    assert text.startswith("the model configuration: ") and text.endswith((".", "?")) and "\n" not in text
    return text


@pytest.mark.parametrize("folder", [*FOLDERS, model_folder("tiny-next")], ids=lambda folder: folder.name)
def test_every_shipped_config_reads_with_its_own_values(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    config = read_config(folder)
    same_name = {field.name for field in dataclasses.fields(config)} & raw.keys()
    assert len(same_name) > 12
    for name in same_name:
        value = raw[name]
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value), name
    assert config.eos_token_ids == (raw["eos_token_id"],)
    assert config.dtype == raw.get("dtype", raw.get("torch_dtype"))
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    assert config.rope.theta == rope.get("rope_theta", raw.get("rope_theta"))
    assert (config.rope.yarn is None) == (rope.get("rope_type", "default") == "default")


def test_there_are_fourteen_golden_variants() -> None:
    assert len(FOLDERS) == 14


def test_published_and_modern_form_are_the_same_model() -> None:
    assert read_config(PUBLISHED) == read_config(MODERN)


def test_the_80b_has_the_layer_kinds_of_its_inventory() -> None:
    inventory = json.loads((GOLDEN / "inventory" / "tensors_80b.json").read_text())
    config = read_config(PUBLISHED)
    full = [layer for layer in range(48) if config.layer_types[layer] == "full_attention"]
    assert full == inventory["full_layers"]
    assert all(config.is_moe_layer(layer) for layer in range(48))
    assert config.head_dim == 256 and config.rope.rotary_dim == 64 and config.num_nextn_predict_layers == 1


def test_defaults_when_fields_are_absent() -> None:
    next_ = read_config({"model_type": "qwen3_next"})
    assert (next_.head_dim, next_.intermediate_size, next_.num_experts, next_.norm_topk_prob) == (256, 5632, 512, True)
    assert (next_.rope.theta, next_.rope.partial_rotary_factor, next_.max_position_embeddings) == (10000, 0.25, 32768)
    assert next_.bos_token_id is None and next_.eos_token_ids == () and next_.attn_output_gate
    dense = read_config({"model_type": "qwen3", "hidden_size": 1024})
    assert (dense.head_dim, dense.rope.rotary_dim, dense.num_experts, dense.linear_conv_kernel_dim) == (128, 128, 0, 0)
    assert set(dense.layer_types) == {"full_attention"} and not dense.attn_output_gate and not dense.is_moe_layer(0)
    moe = read_config({"model_type": "qwen3_moe", "hidden_size": 1536, "num_attention_heads": 16})
    assert (moe.head_dim, moe.norm_topk_prob, moe.num_experts, moe.num_experts_per_tok) == (96, False, 128, 8)
    assert moe.rope.partial_rotary_factor == 1.0 and moe.shared_expert_intermediate_size == 0


def test_null_sizes_are_derived() -> None:
    config = read_config({"model_type": "qwen3", "num_key_value_heads": None, "num_attention_heads": 8, "head_dim": 64})
    assert config.num_key_value_heads == 8


def test_num_local_experts_is_num_experts() -> None:
    assert read_config({"model_type": "qwen3_moe", "num_local_experts": 64}).num_experts == 64


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({"mlp_only_layers": [1, 3]}, [0, 2, 4, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, [5]),
        ({"num_experts": 0}, []),
    ],
)
def test_which_layers_have_experts(changes: dict[str, object], moe_layers: list[int]) -> None:
    config = read_config({"model_type": "qwen3_next", "num_hidden_layers": 6, **changes})
    assert [layer for layer in range(6) if config.is_moe_layer(layer)] == moe_layers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hiden_size": 3}, "'hiden_size' is not a field of qwen3_next; did you mean hidden_size"),
        ({"text_config": {}}, "wrapped in text_config"),
        ({"model_type": "llama"}, "the string 'llama', which is unknown; known are qwen3, qwen3_moe, qwen3_next"),
        ({"model_type": ["qwen3"]}, "model_type is a list of 1"),
        ({"hidden_size": "2048"}, "hidden_size is the string '2048'; expected an integer"),
        ({"hidden_size": 2048.0}, "hidden_size is the number 2048.0"),
        ({"hidden_size": True}, "hidden_size is true"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"hidden_size": 0}, "hidden_size is the number 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is the number 1000000000"),
        ({"hidden_size": 10**400}, "an integer of over 30 digits"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is the number 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is the number nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is an integer of over 30 digits"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is the number 1; expected true or false"),
        ({"layer_types": ["full_attention"] * 47, "full_attention_interval": 1}, "names 47 layers but"),
        ({"layer_types": ["full_attention"] * 48}, "layer_types[0] is 'full_attention', but full_attention_interval 4"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types[0] is 'sliding_attention'"),
        ({"layer_types": "full_attention"}, "layer_types is the string"),
        ({"num_local_experts": 256}, "num_experts and num_local_experts are two names of one field but differ"),
        ({"dtype": "float16"}, "dtype and torch_dtype are two names of one field but differ"),
        ({"torch_dtype": "int4"}, "dtype is 'int4'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 16 is not a multiple of num_key_value_heads 3"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads 24 is not a multiple of linear_num_key_heads 16"),
        ({"num_experts": 4}, "num_experts_per_tok 10 exceeds num_experts 4"),
        ({"hidden_act": "gelu"}, "hidden_act is the string 'gelu'; qwen3_next is supported only with"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_scale": True}, "layer_scale is true"),
        ({"attn_output_gate": False}, "attn_output_gate is false"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is the number 2"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers names layer 48"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers[0] is true"),
        ({"eos_token_id": [151645, 151936]}, "eos_token_id 151936 is outside the vocabulary"),
        ({"pad_token_id": -1}, "pad_token_id is the number -1"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "the rope type 'llama3' in rope_scaling is known but not",
        ),
        ({"rope_scaling": {"rope_type": "spiral"}}, "the rope type 'spiral' in rope_scaling is unknown"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "betafast": 1}}, "rope_scaling.betafast is not a field"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2}}, "rope_scaling.factor belongs to rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling.factor is the number 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "default", "factor": 2}}, "has rope_type 'yarn' and type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "rope_theta": 5}}, "rope_theta is 10000000 at the top"),
        ({"rope_scaling": [4]}, "rope_scaling is a list of 1"),
        ({"rope_theta": 1}, "rope_theta is the number 1"),
        ({"partial_rotary_factor": 0.001}, "rotates 0 elements"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is the number 1.5"),
    ],
)
def test_a_bad_field_is_refused_by_name(changes: dict[str, object], words: str) -> None:
    assert words in refused(PUBLISHED | changes)


def test_yarn_without_any_theta_is_refused() -> None:
    raw = {name: value for name, value in PUBLISHED.items() if name != "rope_theta"}
    assert "has no rope_theta" in refused(raw | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    both = MODERN | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert "rope_scaling replaces rope_parameters but has no rope_theta" in refused(both)


def test_fields_of_another_family_are_refused_with_its_name() -> None:
    text = refused({"model_type": "qwen3", "linear_num_key_heads": 4})
    assert "'linear_num_key_heads' is not a field of qwen3; it belongs to qwen3_next." in text
    assert "layer_types[0]" in refused(
        {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    )
    assert "no model_type" in refused({"hidden_size": 4})
    moe = {"model_type": "qwen3_moe", "hidden_size": 100, "num_attention_heads": 32}
    assert "hidden_size 100 is not a multiple of num_attention_heads 32" in refused(moe)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}


@pytest.mark.parametrize("raw", [PUBLISHED, MODERN], ids=["published", "modern"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_scaling": YARN},
        {"rope_parameters": YARN},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}},
        {"rope_parameters": YARN | {"rope_theta": 10000000}},
        {"rope_parameters.rope_type": "yarn", "rope_parameters.factor": 4.0},
    ],
)
def test_a_yarn_override_keeps_theta_in_either_form(raw: dict[str, object], overrides: dict[str, object]) -> None:
    rope = read_config(raw, overrides).rope
    assert rope.theta == 1e7 and rope.partial_rotary_factor == 0.25 and rope.rotary_dim == 64
    assert rope.yarn is not None and rope.yarn.factor == 4.0 and rope.yarn.original_max_position_embeddings == 262144


@pytest.mark.parametrize("raw", [PUBLISHED, MODERN], ids=["published", "modern"])
def test_overrides_reach_the_value_that_decides(raw: dict[str, object]) -> None:
    assert read_config(raw, {"rope_theta": 5e6}).rope.theta == 5e6
    assert read_config(raw, {"rope_parameters": {"rope_theta": 5e6}}).rope.theta == 5e6
    with_yarn = dict(raw) | (
        {"rope_scaling": YARN} if raw is PUBLISHED else {"rope_parameters": YARN | {"rope_theta": 1e7}}
    )
    plain = read_config(with_yarn, {"rope_scaling": {"rope_type": "default"}}).rope
    assert plain.yarn is None and plain.theta == 1e7
    assert read_config(with_yarn, {"rope_scaling": None}).rope == plain
    stronger = read_config(with_yarn, {"rope_parameters": {"factor": 8}}).rope.yarn
    assert stronger is not None and stronger.factor == 8.0 and stronger.original_max_position_embeddings == 262144
    assert read_config(raw, {"torch_dtype": "torch.float32"}).dtype == "float32"
    assert read_config(raw, {"max_position_embeddings": 1048576}).max_position_embeddings == 1048576


def test_bad_overrides_are_refused() -> None:
    assert "overrides give rope_theta as 1.0 and as 2.0" in refused(
        PUBLISHED, {"rope_theta": 1.0, "rope_scaling.rope_theta": 2.0}
    )
    assert "the override of hidden_size is an object" in refused(PUBLISHED, {"hidden_size.x": 1})
    assert "'a..b' is not a field name" in refused(PUBLISHED, {"a..b": 1})
    assert "override of rope_scaling is the string 'yarn'" in refused(PUBLISHED, {"rope_scaling": "yarn"})
    assert "layer_types names 48 layers but num_hidden_layers is 4" in refused(MODERN, {"num_hidden_layers": 4})
    raw = dict(PUBLISHED)
    read_config(raw, {"rope_theta": 3.0})
    assert raw == PUBLISHED


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8 |= {
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate", "mtp.fc"]
}


def test_block_fp8_matches_whole_dotted_names() -> None:
    quantization = read_config(PUBLISHED | {"quantization_config": FP8}).quantization
    assert quantization is not None and quantization.block == (128, 128)
    assert quantization.keeps("lm_head") and quantization.keeps("model.layers.0.mlp.gate")
    assert quantization.keeps("mtp.fc.inner")
    assert not quantization.keeps("model.layers.0.mlp.gate_proj")
    assert not quantization.keeps("model.layers.0.mlp.shared_expert.gate_proj")
    assert not quantization.keeps("model.layers.10.mlp.gate") and not quantization.keeps("head.lm_head")
    assert quantization.type.scale_shape((12288, 2048)) == (96, 16) and quantization.type.scale_shape((129, 1)) == (2, 1)


def test_fp8_scale_shapes_of_the_80b_inventory() -> None:
    quantization = read_config(PUBLISHED | {"quantization_config": FP8}).quantization
    assert quantization is not None
    inventory = json.loads((GOLDEN / "inventory" / "tensors_80b.json").read_text())
    checked = [entry for entry in inventory["tensors"] if entry["fp8_scale_shape"]]
    assert len(checked) > 10
    for entry in checked:
        assert list(quantization.type.scale_shape(tuple(entry["shape"]))) == entry["fp8_scale_shape"], entry["name"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised with ModelOpt NVFP4, which is not supported"),
        ({"quant_method": "modelopt_fp4"}, "quantised with ModelOpt FP4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "compressed-tensors NVFP4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors INT4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {"g": {"weights": {"num_bits": 8}}}}, "compressed-tensors INT8"),
        ({"quant_method": "awq", "bits": 4}, "quantised with AWQ"),
        ({"quant_method": "gptq", "bits": 4}, "quantised with GPTQ"),
        ({"load_in_4bit": True}, "quantised with bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised with bitsandbytes"),
        ({"quant_method": "abacus"}, "quantised with the method 'abacus'"),
        ({}, "has no quant_method"),
        (FP8 | {"weight_block_size": None}, "FP8 without weight_block_size"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is a list of 1"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size[1] is the number 0"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme is 'static'"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (FP8 | {"scale_fmt": "ue8m0"}, "quantization_config.scale_fmt is not a field of block FP8"),
        (FP8 | {"modules_to_not_convert": [1]}, "modules_to_not_convert[0] is the number 1"),
    ],
)  # fmt: skip
def test_other_quantisation_is_refused_by_name(found: dict[str, object], words: str) -> None:
    assert words in refused(PUBLISHED | {"quantization_config": found})


def test_modelopt_description_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(ConfigError, match=r"hf_quant_config.json: .* ModelOpt NVFP4"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b"[]", "holds a list of 0; expected one JSON object"),
        (b'{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice"),
        (b"[" * 100000, "nests JSON deeper"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert words in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json" / "config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        read_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="zero byte"):
        read_config("a\0b")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["yarn", "default", "full_attention", "fp8", "float32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "quant_method", "weight_block_size", "x"]), inner,
        max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*PUBLISHED, *MODERN, "quantization_config", "num_local_experts", "x"]), JSON),
       st.sampled_from([PUBLISHED, MODERN]), st.booleans())  # fmt: skip
def test_no_json_value_gives_another_exception(
    changes: dict[str, object], raw: dict[str, object], as_override: bool
) -> None:
    try:
        read_config(raw, changes) if as_override else read_config(raw | changes)
    except ConfigError as error:
        assert str(error).endswith((".", "?"))
