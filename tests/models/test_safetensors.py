"""The safetensors reader against the safetensors library, and against headers that lie."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

from deltaloom.graph.errors import CheckpointError
from deltaloom.models.safetensors_file import DTYPES, SafetensorsFile

GOLDEN = Path(__file__).parents[1] / "golden"
Header = dict[str, Any]


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file in the format, by hand; ``length`` lies about the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile.open(path)
    text = str(caught.value)
    assert str(path) in text and text.endswith(".") and "\n" not in text
    return text


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_reads_what_the_library_wrote(tmp_path: Path, kind: str) -> None:
    dtype = DTYPES[kind]
    raw = np.random.default_rng(3).integers(
        0, 2 if kind == "BOOL" else 127, size=3 * 5 * dtype.itemsize, dtype=np.uint8
    )
    arrays = {
        "a.b": raw.view(dtype).reshape(3, 5),
        "scalar": np.array(raw.view(dtype)[4]),
        "none": np.zeros((0, 7), dtype),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    assert sorted(file.names()) == sorted(arrays)
    assert file.nbytes == sum(array.nbytes for array in arrays.values())
    for name, array in arrays.items():
        found = file.tensor(name)
        assert found.dtype == array.dtype and found.shape == file.info(name).shape == np.shape(array)
        assert found.tobytes() == array.tobytes()
        assert not found.flags.writeable


ANY_ARRAY = hnp.arrays(
    hnp.integer_dtypes(endianness="<", sizes=(8, 32, 64)),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@given(st.dictionaries(st.text(min_size=1, max_size=5), ANY_ARRAY, max_size=5))
def test_any_set_of_arrays_survives(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any]) -> None:
    known = {name: array for name, array in arrays.items() if array.dtype in DTYPES.values() and name != "__metadata__"}
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    save_file(known, path, metadata={"format": "np"})
    file = SafetensorsFile.open(path)
    assert file.metadata == {"format": "np"} and set(file.names()) == set(known)
    for name, array in known.items():
        np.testing.assert_array_equal(file.tensor(name), array)


@pytest.mark.parametrize("folder", ["next_base", "next_bf16", "next_fp8", "next_fused_experts"])
def test_golden_headers_agree_with_the_library(folder: str) -> None:
    path = GOLDEN / folder / "model.safetensors"
    file = SafetensorsFile.open(path)
    with safe_open(path, "np") as oracle:
        assert set(file.names()) == set(oracle.keys())
        for name in file.names():
            part = oracle.get_slice(name)
            assert list(file.info(name).shape) == part.get_shape()
            assert file.info(name).dtype == DTYPES[part.get_dtype()]


def test_views_outlive_the_file_and_closing_ends_reading(tmp_path: Path) -> None:
    save_file({"w": np.arange(4.0)}, tmp_path / "x.safetensors")
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    view = file.tensor("w")
    file.close()
    np.testing.assert_array_equal(view, np.arange(4.0))
    with pytest.raises(CheckpointError, match="was closed"):
        file.tensor("w")
    with pytest.raises(CheckpointError, match="has no tensor 'v'; it holds 1"):
        file.info("v")


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"w": entry()}, b"12345678")
    file = SafetensorsFile.open(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="has shrunk"):
        file.tensor("w")


def test_an_unaligned_tensor_reads_right(tmp_path: Path) -> None:
    value = np.array([1.5, -2.25], np.float32)
    header = {"odd": entry("U8", [1], [0, 1]), "w": entry("F32", [2], [1, 9])}
    file = SafetensorsFile.open(write(tmp_path / "x.safetensors", header, b"\7" + value.tobytes()))
    np.testing.assert_array_equal(file.tensor("w"), value)


def test_bfloat16_values(tmp_path: Path) -> None:
    file = SafetensorsFile.open(
        write(tmp_path / "x.safetensors", {"w": entry("BF16", [2], [0, 4])}, b"\x80\x3f\x00\xc0")
    )
    assert file.tensor("w").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(file.tensor("w").astype(np.float32), [1.0, -2.0])


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": entry()}, b"1234567", "is truncated: tensor 'w' ends at byte"),
        ({"w": entry()}, b"123456789", "1 bytes after its last tensor"),
        ({"w": entry(offsets=(4, 12))}, b"123456789012", "4 bytes before tensor 'w' that belong to no tensor"),
        ({"v": entry(), "w": entry(offsets=(4, 12))}, b"123456789012", "tensors 'v' and 'w' in"),
        ({"v": entry(), "w": entry()}, b"12345678", "overlap by 8 bytes"),
        ({"w": entry(shape=(3,))}, b"12345678", "which takes 12 bytes, but its data_offsets span 8"),
        ({"w": entry(dtype="F4")}, b"12345678", "has the dtype the string 'F4'; readable are F64"),
        ({"w": entry(dtype=None)}, b"12345678", "has the dtype null"),  # type: ignore[arg-type]
        ({"w": entry(shape=(-2, -1))}, b"12345678", "expected a list of at most 32 sizes"),
        ({"w": entry(shape=(1,) * 40)}, b"12345678", "expected a list of at most 32 sizes"),
        ({"w": entry(shape=(2.0,))}, b"12345678", "expected a list of at most 32 sizes"),
        ({"w": entry(shape=(True, 2))}, b"12345678", "expected a list of at most 32 sizes"),
        ({"w": entry(shape=(2**62, 0))}, b"12345678", "which takes 0 bytes"),
        ({"w": entry(offsets=(8, 0))}, b"12345678", "expected two positions"),
        ({"w": entry(offsets=(0, 8, 9))}, b"12345678", "expected two positions"),
        ({"w": entry(offsets=(-8, 0))}, b"12345678", "expected two positions"),
        ({"w": entry() | {"extra": 1}}, b"12345678", "expected exactly dtype, shape and data_offsets"),
        ({"w": 3}, b"", "is the number 3; expected exactly"),
        ([1], b"", "is a list of 1; expected an object"),
        (b"{", b"", "is not valid JSON"),
        (b"\xff\xff", b"", "is not valid JSON"),
        (b"[" * 100_000, b"", "is not valid JSON"),
        (b'{"w": 1, "w": 2}', b"", "names 'w' twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ of"),
    ],
)
def test_a_lying_header_is_one_sentence(tmp_path: Path, header: object, data: bytes, words: str) -> None:
    assert words in refused(write(tmp_path / "x.safetensors", header, data))


def test_damaged_lengths(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert "does not exist" in refused(path)
    path.write_bytes(b"1234")
    assert "has 4 bytes; a safetensors file has at least 8" in refused(path)
    assert "over the format's limit" in refused(write(path, {}, length=2**63))
    assert "its header of 50 bytes does not fit the file of 10 bytes" in refused(write(path, {}, length=50))
    path.unlink()
    path.mkdir()
    assert "cannot be read: Is a directory" in refused(path)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.safetensors", {})

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    assert refused(path) == f"{path} cannot be read: Permission denied."


def damage(header: Header, draw: Callable[..., Any]) -> Header:
    """One field of one entry, or a whole entry, replaced by some JSON value."""
    scalar = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=4)
    value = draw(scalar | st.lists(scalar, max_size=3) | st.lists(st.integers(0, 40), max_size=3))
    name = draw(st.sampled_from(sorted(header)))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other", None]))
    if field is None:
        return header | {name: value}
    return header | {name: header[name] | {field: value}}


@settings(max_examples=300)
@given(st.data())
def test_fuzzed_headers_give_only_checkpoint_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header: Header = {"a": entry("F32", [2], [0, 8]), "b": entry("U8", [3], [8, 11]), "c": entry("I64", [], [11, 19])}
    raw = json.dumps(damage(header, data.draw)).encode()
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw = raw[:position] + bytes([data.draw(st.integers(0, 255))]) + raw[position + 1 :]
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    length = data.draw(st.just(len(raw)) | st.integers(0, 2**64 - 1) | st.integers(0, 400))
    path.write_bytes(length.to_bytes(8, "little") + raw + bytes(data.draw(st.just(19) | st.integers(0, 25))))
    try:
        file = SafetensorsFile.open(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:  # what is accepted must be readable, each byte by one tensor only
        assert sum(file.tensor(name).nbytes for name in file.names()) == file.nbytes
        assert file.nbytes + 8 + length == path.stat().st_size
