"""The tensors of the 80B model, built from its published config alone, against the recorded inventory."""

import json
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from deltaloom.graph.types import bf16, f8_e4m3, f32
from deltaloom.models.build import ModelGraphs, build_graph
from deltaloom.models.config import read_config
from deltaloom.models.inventory import StoredTensor, checkpoint_tensors, parameter_count

CONFIG: dict[str, Any] = json.loads((Path(__file__).parent / "config_80b.json").read_text())
RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "inventory" / "tensors_80b.json").read_text())
KEPT = "input_layernorm post_attention_layernorm mlp.gate mlp.shared_expert_gate".split()
KEPT_LINEAR = [f"linear_attn.{name}" for name in ("A_log", "conv1d", "dt_bias", "in_proj_ba", "norm")]
KEPT_ATTENTION = ["self_attn.q_norm", "self_attn.k_norm"]


def fp8_config() -> dict[str, Any]:
    """The config with what the FP8 checkpoint adds: full names of all modules that it keeps (specification, 11.1)."""
    names = ["lm_head", "mtp.fc", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"]
    for layer in range(48):
        own = KEPT_ATTENTION if layer % 4 == 3 else KEPT_LINEAR
        names += [f"model.layers.{layer}.{name}" for name in (*KEPT, *own)]
    names += [f"mtp.layers.0.{name}" for name in (*KEPT, *KEPT_ATTENTION)]
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return {**CONFIG, "quantization_config": {**quantization, "modules_to_not_convert": names}}


@cache
def graphs(*, fp8: bool) -> ModelGraphs:
    return build_graph(read_config(fp8_config() if fp8 else CONFIG), dtype=bf16)


def recorded(*, fp8: bool) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor of the recorded patterns by its full name."""
    layers = {"all": range(48), "linear": RECORDED["linear_layers"], "full": RECORDED["full_layers"], None: [0]}
    for entry in RECORDED["tensors"]:
        experts = range(RECORDED["experts"]) if "{E}" in entry["name"] else [0]
        names = [
            entry["name"].replace("{L}", str(layer)).replace("{E}", str(expert))
            for layer in layers[entry["layers"]]
            for expert in experts
        ]
        assert len(names) == entry["count"], entry["name"]
        quantised = fp8 and entry["fp8_quantised"]
        for name in names:
            yield name, StoredTensor(tuple(entry["shape"]), f8_e4m3 if quantised else None)
            if quantised:
                yield f"{name}_scale_inv", StoredTensor(tuple(entry["fp8_scale_shape"]), f32)


def test_the_80b_is_built_in_seconds_with_one_body_a_kind() -> None:
    start = time.perf_counter()
    built = build_graph(read_config(CONFIG), dtype=bf16)
    assert time.perf_counter() - start < 20
    assert list(built.main.regions) == ["linear_layer", "attention_layer"]
    assert built.mtp is not None and list(built.mtp.regions) == ["mtp_attention_layer"]


def test_parameters_of_the_80b() -> None:
    built = graphs(fp8=False)
    assert parameter_count(built.main) == RECORDED["main_model_parameters"] == 79_674_391_296
    assert parameter_count(built.main, built.mtp) == 81_324_862_720
    assert parameter_count(graphs(fp8=True).main) == 79_674_391_296


def test_tensors_of_the_80b() -> None:
    found = checkpoint_tensors(graphs(fp8=False).main, graphs(fp8=False).mtp)
    assert len(found) == RECORDED["bf16_checkpoint"]["tensors"] == 75_944
    assert sum(tensor.elements for tensor in found.values()) == RECORDED["bf16_checkpoint"]["elements"]
    assert found == dict(recorded(fp8=False))


def test_tensors_of_the_fp8_80b() -> None:
    built = graphs(fp8=True)
    assert list(built.main.regions) == ["linear_layer_fp8", "attention_layer_fp8"]
    found = checkpoint_tensors(built.main, built.mtp)
    assert len(found) == RECORDED["fp8_checkpoint"]["tensors"] == 151_479
    assert sum(tensor.elements for tensor in found.values()) == RECORDED["fp8_checkpoint"]["elements"]
    assert found == dict(recorded(fp8=True))
