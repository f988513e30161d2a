"""benchmarks/load_checkpoint.py writes a checkpoint that loads, and times every way of reading it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

ROOT = Path(__file__).resolve().parents[1]


def test_a_random_checkpoint_is_written_and_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = __import__("load_checkpoint")
    monkeypatch.setattr(program, "SHARD", 1 << 20)
    source = ROOT / "tests" / "golden" / "next_base" / "config.json"
    fields = json.loads(source.read_text())
    small = tmp_path / "small.json"
    small.write_text(
        json.dumps(fields | {"hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128})
    )
    monkeypatch.setattr("sys.argv", ["load_checkpoint.py", str(small), str(tmp_path / "made"), "--gb", "0.004"])
    program.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        [cache, way] for cache in ("cold", "warm") for way in ("read()", "deltaloom", "safetensors")
    ]
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and any(name.endswith("weight_scale_inv") for name in index)
    total = sum(file.stat().st_size for file in (tmp_path / "made").glob("*.safetensors"))
    assert total < 8e6
