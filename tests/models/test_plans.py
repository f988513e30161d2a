"""Which meshes a model's config allows, and why not."""

import pytest

from deltaloom.graph.errors import ConfigError
from deltaloom.models.config import read_config
from deltaloom.models.plans import legal, shard_pass

BASE = {
    "model_type": "qwen3_next", "vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WIDE = {
    "hidden_size": 512, "head_dim": 128, "num_attention_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "quantization_config": FP8,
}  # fmt: skip
ILLEGAL = [
    ({}, {"tp": 3}, "4 query heads cannot be divided over tp = 3"),
    ({}, {"tp": 3}, "4 value heads cannot be divided over tp = 3"),
    ({"num_attention_heads": 12, "num_key_value_heads": 3}, {"tp": 4}, "3 KV heads can be neither divided over tp = 4 nor given"),
    ({"linear_num_value_heads": 12, "linear_num_key_heads": 3}, {"tp": 2}, "3 key heads can be neither divided over tp = 2"),
    ({"moe_intermediate_size": 10}, {"tp": 4}, "moe_intermediate_size = 10 cannot be divided over tp = 4"),
    ({"shared_expert_intermediate_size": 6}, {"tp": 4}, "shared_expert_intermediate_size = 6 cannot be divided over tp = 4"),
    ({"mlp_only_layers": [1], "intermediate_size": 30}, {"tp": 4}, "intermediate_size = 30 cannot be divided over tp = 4"),
    (WIDE, {"tp": 8}, "mlp.experts.0.down_proj, in blocks of 128x128, would be cut into runs of 64 under tp = 8"),
    ({}, {"ep": 2}, "experts cannot be divided over ep"),
    ({}, {"tp": 2, "pp": 2}, "layers cannot be divided over pp"),
    ({}, {"dp": 2}, "batches cannot be divided over dp"),
]


@pytest.mark.parametrize(("change", "mesh", "reason"), ILLEGAL)
def test_illegal_meshes_have_reasons(change: dict[str, object], mesh: dict[str, int], reason: str) -> None:
    config = read_config({**BASE, **change})
    assert any(reason in refusal for refusal in legal(config, mesh).refusals)
    with pytest.raises(ConfigError, match="does not fit this model"):
        shard_pass(config, mesh)


def test_what_is_legal_has_notes() -> None:
    notes = legal(read_config({**BASE, "vocab_size": 162}), {"tp": 4}).notes
    assert [note.partition(",")[0] for note in notes] == [
        "each of the 2 KV heads is kept by 2 ranks",
        "each of the 2 key heads of the delta rule is computed by 2 ranks",
        "the output head stays whole on every rank",
    ]
    assert legal(read_config(BASE), {"tp": 2}) == legal(read_config(BASE), {"tp": 1})
    assert not legal(read_config(WIDE | BASE | WIDE), {"tp": 4}).refusals
