"""Damaged copies of the bundled model: each gives one sentence that names the fault, and exit code 2."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from deltaloom.cli import app
from deltaloom.models.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copytree(ROOT / "models" / "tiny_next", tmp_path / "model"))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file; the data stay as they are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def shard(folder: Path) -> None:
    """Split the one weight file into two shards with an index."""
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: np.array(checkpoint.read(name)) for name in checkpoint.names()}
    (folder / WEIGHTS).unlink()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def poison(path: Path, name: str) -> None:
    """One NaN into a bfloat16 tensor."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + start : 10 + length + start] = b"\xc0\x7f"
    path.write_bytes(data)


def overlap(header: dict[str, Any]) -> None:
    first, second = sorted((entry for name, entry in header.items() if name != "__metadata__"),
                           key=lambda entry: entry["data_offsets"])[:2]  # fmt: skip
    begin, end = second["data_offsets"]
    shift = (first["data_offsets"][1] - first["data_offsets"][0]) // 2
    second["data_offsets"] = [begin - shift, end - shift]


def damage(kind: str, folder: Path) -> None:
    weights, config = folder / WEIGHTS, folder / "config.json"
    match kind:
        case "truncated":
            truncate(weights, 1000)
        case "truncated shard":
            shard(folder)
            truncate(folder / "model-00002-of-00002.safetensors", 1000)
        case "missing shard":
            shard(folder)
            (folder / "model-00002-of-00002.safetensors").unlink()
        case "wrong shape":
            change_header(weights, lambda header: header[EMBEDDING]["shape"].reverse())
        case "overlapping offsets":
            change_header(weights, overlap)
        case "index outside":
            shard(folder)
            change_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: "../other.safetensors"}))
        case "unknown model_type":
            change_json(config, lambda values: values.update(model_type="llama9"))
        case "wrong vocabulary":
            token = {"id": 5000, "content": "<|new|>", "special": True, "single_word": False, "lstrip": False,
                     "rstrip": False, "normalized": False}  # fmt: skip
            change_json(folder / "tokenizer.json", lambda values: values["added_tokens"].append(token))
        case "unreadable file":
            weights.unlink()
            weights.mkdir()
        case "not safetensors":
            weights.write_bytes(b"PK\x03\x04" * 100)
        case "missing tensor":
            change_header(weights, lambda header: header.update({"other.weight": header.pop(NORM)}))
        case "broken config":
            config.write_text("{")
        case "no config":
            config.unlink()
        case "unknown field":
            change_json(config, lambda values: values.update(hiden_size=3))
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "broken tokenizer":
            (folder / "tokenizer.json").write_text('{"model": 1}')
        case "broken generation config":
            (folder / "generation_config.json").write_text('{"temperature": "hot"}')
        case "no weights":
            weights.unlink()
        case _:
            raise AssertionError(kind)


CASES = {
    "truncated": [WEIGHTS],
    "truncated shard": ["model-00002-of-00002.safetensors"],
    "missing shard": ["model-00002-of-00002.safetensors"],
    "wrong shape": [EMBEDDING, "[192, 4096]", "[4096, 192]"],
    "overlapping offsets": [WEIGHTS, "overlap"],
    "index outside": [INDEX, "../other.safetensors"],
    "unknown model_type": ["config.json", "'llama9'", "known are"],
    "wrong vocabulary": ["tokenizer.json", "wrong vocabulary", "4097", "4096"],
    "unreadable file": [WEIGHTS],
    "not safetensors": [WEIGHTS],
    "missing tensor": [NORM, "other.weight"],
    "broken config": ["config.json"],
    "no config": ["config.json"],
    "unknown field": ["config.json", "'hiden_size'", "hidden_size"],
    "no tokenizer": ["tokenizer.json", "missing"],
    "broken tokenizer": ["tokenizer.json"],
    "broken generation config": ["generation_config.json", "temperature", "'hot'"],
    "no weights": [WEIGHTS],
}


@pytest.mark.parametrize("kind", CASES)
def test_damage_is_named_in_a_sentence(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(kind, folder)
    assert app.run(["generate", "a", "--max-tokens", "1", "--model", str(folder)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("deltaloom: ")
    for words in CASES[kind]:
        assert words in output.err


def test_a_sharded_copy_is_as_good_as_the_original(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(folder)
    assert app.run(["generate", "--chat", "What is the capital of France?", "--model", str(folder)]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


def test_nan_weights_are_found_when_asked_and_otherwise_at_the_first_token(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(folder / WEIGHTS, NORM)
    arguments = ["generate", "a", "--max-tokens", "1", "--model", str(folder)]
    assert app.run([*arguments, "--check-weights"]) == 2
    assert f"tensor '{NORM}'" in (found := capsys.readouterr().err) and "holds nan at [0]" in found
    assert app.run(arguments) == 2
    assert "prompt 0, sample 0: the logits hold NaN" in capsys.readouterr().err


def test_a_broken_chat_template_is_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert app.run(["generate", "--chat", "a", "--model", str(folder)]) == 2
    assert "template" in capsys.readouterr().err


def test_a_process_that_is_given_a_damaged_model_exits_with_2(folder: Path) -> None:
    damage("truncated", folder)
    command = [sys.executable, "-m", "deltaloom", "chat", "--model", str(folder)]
    settings = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, input="a", capture_output=True, text=True, check=False, env=settings, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and WEIGHTS in result.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts": 2**40}, "num_experts is 1099511627776"),
        ({"num_experts": 2**20}, "experts in all"),
        ({"head_dim": 2**40}, "head_dim is 1099511627776; expected at most"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps"),
    ],
)
def test_sizes_beyond_reason_are_refused_before_anything_is_allocated(
    change: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(folder / "config.json", lambda values: values.update(change))
    assert app.run(["generate", "a", "--model", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_an_end_token_outside_the_vocabulary_and_an_overlong_shard_name_are_sentences(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(folder / "generation_config.json", lambda values: values.update(eos_token_id=99999))
    assert app.run(["generate", "a", "--model", str(folder)]) == 2
    assert "eos_token_id [99999] is outside the vocabulary" in capsys.readouterr().err
    shard(folder)
    (folder / "generation_config.json").unlink()
    change_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: "a" * 5000}))
    assert app.run(["generate", "a", "--model", str(folder)]) == 2
    assert "are missing" in capsys.readouterr().err
