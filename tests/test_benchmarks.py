"""The benchmark programs: seeded checkpoints are what they claim, the floor counts them right, the table is right."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors import safe_open

from deltaloom.runtime.device_profile import DeviceProfile

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return {name: __import__(name) for name in ("make_midsize", "floor", "compare")}


def write(programs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["make_midsize.py", "next-tiny", str(folder), *flags])
    programs["make_midsize"].main()


def test_both_dtypes_of_a_seed_are_one_model_and_another_seed_is_not(
    programs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(programs, monkeypatch, tmp_path / "wide", "--dtype", "float32", "--shard-gb", "0.001")
    write(programs, monkeypatch, tmp_path / "narrow")
    write(programs, monkeypatch, tmp_path / "other", "--seed", "1")
    index = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 2
    with (
        safe_open(tmp_path / "narrow" / "model-00001.safetensors", "np") as narrow,
        safe_open(tmp_path / "other" / "model-00001.safetensors", "np") as other,
    ):
        assert set(index) == set(narrow.keys())
        for name, file in index.items():
            with safe_open(tmp_path / "wide" / file, "np") as wide:
                values = wide.get_tensor(name)
            assert values.dtype == np.float32
            assert np.array_equal(values, narrow.get_tensor(name).astype(np.float32))
            assert not np.array_equal(values, other.get_tensor(name).astype(np.float32))


def test_the_floor_of_decode_is_the_weights_that_the_checkpoint_has(programs: dict[str, ModuleType]) -> None:
    tiny = programs["make_midsize"].PRESETS["next-tiny"]
    every_expert = replace(tiny, num_experts_per_tok=tiny.num_experts)
    profile = DeviceProfile("slow memory", 1.0, {"float32": 1e15})
    decode, *_ = programs["floor"].floors(every_expert, "float32", profile)
    drawn = programs["make_midsize"].tensors(every_expert, programs["make_midsize"].Draw(0))
    matrices = sum(tensor.nbytes for name, tensor in drawn if tensor.ndim == 2 and "embed_tokens" not in name)
    assert matrices < decode.floor == decode.work.bytes
    linear = sum(row.work.bytes for row in decode.rows if row.op in ("linear", "shared_moe"))
    assert linear == pytest.approx(matrices, rel=0.02)


def test_the_table_gives_medians_spread_and_ratio(programs: dict[str, ModuleType]) -> None:
    rounds = {"a": [{"prefill_8": 10.0}, {"prefill_8": 30.0}, {"prefill_8": 20.0}], "b": [{"prefill_8": 50.0}] * 3}
    assert programs["compare"].table(rounds).splitlines() == [
        "| tokens/s | a | b |",
        "| --- | --- | --- |",
        "| prefill_8 | 20.0 (10.0–30.0) | 50.0 (50.0–50.0), 2.50× |",
    ]


def test_the_quantisation_tables_compare_with_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = __import__("quantization")
    row = {"scheme": "float32", "perplexity": 30.0, "generations": 40, "agreeing": 1.0, "file_mb": 12.0, "held_mb": 24.0}
    row |= {"memory_mb": 30.0, "tokens_per_second": 100.0}
    int8 = row | {"scheme": "int8", "perplexity": 30.03, "generations": 38, "agreeing": 0.9}
    *_, first, second = program.models_table([row, int8]).splitlines()
    assert first.startswith("| float32 | 30.0000 | 1.0000 |  | 40 of 40 | 100.0 % |")
    assert second == "| int8 | 30.0300 | 1.0010 | 1.01 | 38 of 40 | 90.0 % | 12.00 | 24.00 | 30.0 | 100 |"
    assert program.same_start([1, 2, 3], [1, 2, 4]) == program.same_start([1, 2], [1, 2, 4]) == 2
