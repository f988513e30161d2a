"""Checkpoint folders: whole and sharded, each way to be damaged, key coverage, and what a model reference means."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from deltaloom.graph.errors import CheckpointError
from deltaloom.models.bundled import model_folder
from deltaloom.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, check_finite
from deltaloom.models.coverage import coverage, fold

GOLDEN = Path(__file__).parents[1] / "golden"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ARRAYS: dict[str, NDArray[Any]] = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, np.float16),
    "c": np.zeros(2, np.int8),
}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 34}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a.weight": ARRAYS["a.weight"]}, tmp_path / ONE)
    save_file({"b": ARRAYS["b"], "c": ARRAYS["c"]}, tmp_path / TWO)
    write_index(tmp_path, {"a.weight": ONE, "b": TWO, "c": TWO})
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and str(folder) in text
    return text


def test_shards_read_as_one(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.names() == ["a.weight", "b", "c"]
        assert checkpoint.shapes() == {"a.weight": (2, 3), "b": (4,), "c": (2,)}
        assert checkpoint.nbytes == 24 + 8 + 2 and "b" in checkpoint and "d" not in checkpoint
        info = checkpoint.info("b")
        assert (info.dtype.name, info.shape, info.file, info.nbytes) == ("float16", (4,), sharded / TWO, 8)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
        with pytest.raises(CheckpointError, match="has no tensor 'd'"):
            checkpoint.read("d")
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint.read("a.weight")


def test_one_file_reads_lazily(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint.open(tmp_path)
    found = checkpoint.read("a.weight")
    np.testing.assert_array_equal(found, ARRAYS["a.weight"])
    assert not found.flags.writeable and not found.flags.owndata


def test_hub_cache_links_are_followed(sharded: Path) -> None:
    blobs, snapshot = sharded / "blobs", sharded / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in (ONE, TWO, INDEX_FILE):
        (sharded / name).rename(blobs / name.upper())
        (snapshot / name).symlink_to(Path("../../blobs") / name.upper())
    np.testing.assert_array_equal(Checkpoint.open(snapshot).read("a.weight"), ARRAYS["a.weight"])
    (blobs / TWO.upper()).unlink()
    assert f"1 of the 2 files that {snapshot / INDEX_FILE} names are missing, first {TWO}" in refused(snapshot)


def test_missing_and_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert f"has neither {SINGLE_FILE} nor {INDEX_FILE}." in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "found pytorch_model.bin, which is not read" in refused(tmp_path)
    assert "cannot be read: Not a directory" in refused(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="zero byte"):
        Checkpoint.open("a\0b")

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    assert "cannot be read: Permission denied" in refused(tmp_path)


def test_a_missing_and_a_truncated_shard(sharded: Path) -> None:
    (sharded / TWO).write_bytes((sharded / TWO).read_bytes()[:-1])
    assert f"{TWO} is truncated" in refused(sharded)
    (sharded / TWO).unlink()
    assert f"names are missing, first {TWO}" in refused(sharded)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (
            {"a.weight": ONE, "b": TWO, "c": TWO, "d": TWO},
            f"places tensor 'd' in {TWO}, but that file does not hold it",
        ),
        ({"a.weight": ONE, "b": ONE, "c": TWO}, f"places tensor 'b' in {ONE}, but it is in {TWO}"),
        ({"a.weight": ONE, "b": TWO}, "holds tensor 'c', which"),
        ({"a.weight": "../" + ONE}, "which leaves its folder"),
        ({"a.weight": "/etc/passwd"}, "which leaves its folder"),
        ({"a.weight": "..\\" + ONE}, "which leaves its folder"),
        ({"a.weight": ".."}, "which leaves its folder"),
        ({"a.weight": ""}, "which leaves its folder"),
        ({"a.weight": "a\0b"}, "which leaves its folder"),
        ({"a.weight": 3}, "gives the number 3 as the file of 'a.weight'"),
        ([], "is a list of 0; expected an object of file names"),
        ({}, "is an object with 0 fields"),
        (None, "is null"),
    ],
)
def test_a_wrong_index(sharded: Path, weight_map: object, words: str) -> None:
    write_index(sharded, weight_map)
    assert words in refused(sharded)


def test_a_broken_index_file(sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text('{"weight_map": ')
    assert "is not valid JSON" in refused(sharded)
    (sharded / INDEX_FILE).write_text('{"weight_map": {"b": "x", "b": "y"}}')
    assert "has the key 'b' twice" in refused(sharded)
    (sharded / INDEX_FILE).write_text("[]")
    assert "holds a list of 0" in refused(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a.weight": ARRAYS["a.weight"], "b": ARRAYS["b"]}, sharded / ONE)
    assert "tensor 'b' is in both" in refused(sharded)


def test_a_whole_file_beside_a_foreign_index(sharded: Path) -> None:
    save_file(ARRAYS, sharded / SINGLE_FILE)
    assert "remove the one that is stale" in refused(sharded)
    write_index(sharded, dict.fromkeys(ARRAYS, SINGLE_FILE))
    assert Checkpoint.open(sharded).names() == sorted(ARRAYS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_non_finite_weights_are_found(tmp_path: Path, dtype: type) -> None:
    good: NDArray[Any] = np.linspace(-2, 2, 1_500_000).reshape(3, 500_000).astype(dtype)
    bad = good.copy()
    bad[2, 499_999] = np.nan
    for name, array in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        save_file({"int": np.arange(3), "w": array, "zero": np.zeros((0, 2), dtype)}, tmp_path / name / SINGLE_FILE)
    check_finite(Checkpoint.open(tmp_path / "good"))
    with pytest.raises(CheckpointError, match=r"tensor 'w' in .* holds nan at \[2, 499999\]"):
        check_finite(Checkpoint.open(tmp_path / "bad"))
    check_finite(Checkpoint.open(tmp_path / "bad"), ["int"])


def test_infinity_is_not_finite(tmp_path: Path) -> None:
    save_file({"w": np.array(-np.inf, np.float32)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"holds -inf at \[\]"):
        check_finite(Checkpoint.open(tmp_path))


def names_of_the_80b() -> dict[str, tuple[int, ...]]:
    inventory = json.loads((GOLDEN / "inventory" / "tensors_80b.json").read_text())
    layers = {"all": range(48), "linear": inventory["linear_layers"], "full": inventory["full_layers"], None: [0]}
    names = {}
    for row in inventory["tensors"]:
        for layer in layers[row["layers"]]:
            for expert in range(512) if "{E}" in row["name"] else [0]:
                names[row["name"].replace("{L}", str(layer)).replace("{E}", str(expert))] = tuple(row["shape"])
    return names


def test_a_report_on_75944_names_fits_a_screen() -> None:
    expected = names_of_the_80b()
    assert len(expected) == 75_944
    assert coverage(expected, expected).complete
    lines = coverage(expected, {}).summary().splitlines()
    assert len(lines) < 50 and max(map(len, lines)) < 160
    assert "  missing: model.layers.{0-47}.mlp.experts.{0-511}.up_proj.weight (24,576)" in lines
    assert "  missing: model.layers.{3,7..47}.self_attn.q_proj.weight (12)" in lines
    assert "  missing: lm_head.weight" in lines


def test_coverage_names_every_difference() -> None:
    expected = {"a": (1,), "l.0.w": (2, 3), "l.1.w": (2, 3), "l.2.w": (2, 3)}
    found = {"l.0.w": [2, 3], "l.1.w": [3, 2], "l.2.w": [3, 2], "x": [1], "mtp.y": [1]}
    report = coverage(expected, found, ignore=lambda name: name.startswith("mtp."))
    assert report.missing == ("a",) and report.unexpected == ("x",) and not report.complete
    assert [(wrong.name, wrong.expected, wrong.found) for wrong in report.wrong_shape] == [
        ("l.1.w", (2, 3), (3, 2)),
        ("l.2.w", (2, 3), (3, 2)),
    ]
    with pytest.raises(CheckpointError) as caught:
        report.require_complete("the checkpoint here")
    assert str(caught.value).splitlines() == [
        "the checkpoint here does not fit the model: of 4 expected tensors 1 are missing and 2 have a wrong shape; "
        "1 others are unexpected",
        "  missing: a",
        "  unexpected: x",
        "  wrong shape: l.{1-2}.w (2): expected [2, 3], found [3, 2]",
    ]
    coverage({"a": (1,)}, {"a": [1]}).require_complete("x")
    assert coverage({"a": (1,)}, {"a": [1], "mtp.y": [1]}).unexpected == ("mtp.y",)


def unfold(pattern: str) -> set[str]:
    """The names that a pattern of ``fold`` stands for, worked out independently."""
    text = pattern.split(" (")[0]
    if "{" not in text:
        return {text}
    head, rest = text.split("{", 1)
    inner, tail = rest.split("}", 1)
    if ".." in inner:
        first, second = inner.split("..")[0].split(",")
        numbers = list(range(int(first), int(inner.split("..")[1]) + 1, int(second) - int(first)))
    else:
        numbers = []
        for part in inner.split(","):
            low, _, high = part.partition("-")
            numbers += range(int(low), int(high or low) + 1)
    return {name for number in numbers for name in unfold(f"{head}{number}{tail}")}


@given(st.sets(st.builds("{}.{}.x.{}.{}".format, st.sampled_from("ab"), st.integers(0, 12), st.integers(0, 4),
                         st.sampled_from(["w", "v"]))))  # fmt: skip
def test_folding_loses_and_adds_nothing(names: set[str]) -> None:
    patterns = fold(names)
    unfolded = [name for pattern in patterns for name in unfold(pattern)]
    assert sorted(unfolded) == sorted(names)
    for pattern in patterns:
        count = len(unfold(pattern))
        assert pattern.endswith(f" ({count})") == (count > 1)


def test_what_a_model_reference_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = model_folder("tiny-next")
    assert (bundled / "model.safetensors").is_file() and (bundled / "config.json").is_file()
    (tmp_path / "tiny-next").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder("tiny-next") == bundled
    for reference, words in [
        ("./tiny-next", "has no config.json"),
        (
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            "neither a folder nor a bundled name (bundled: tiny-next). Nothing is downl",
        ),
        ("a" * 5000, "cannot be read: File name too long"),
        ("a\0", "zero byte"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            model_folder(reference)
        assert words in str(caught.value)
    (tmp_path / "tiny-next" / "config.json").write_text("{}")
    assert model_folder("./tiny-next") == Path("tiny-next")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        model_folder(tmp_path / "tiny-next" / "config.json")


def test_the_bundled_weights_are_finite_and_open() -> None:
    with Checkpoint.open(model_folder("tiny-next")) as checkpoint:
        check_finite(checkpoint)
        assert any(name.startswith("mtp.") for name in checkpoint.names())
