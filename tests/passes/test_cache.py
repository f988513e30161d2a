"""The compile cache: an entry that is not exactly what was written for its key never becomes a program."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import deltaloom
from deltaloom.backends import backend
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import ConfigError
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import f32
from deltaloom.passes import cache as module
from deltaloom.passes.cache import CacheWarning, CompileCache, cache_of, default_folder
from deltaloom.passes.cache_key import CacheKey
from deltaloom.passes.config import CompileConfig, compile_config
from deltaloom.passes.driver import Driver, Variant, plain_variants
from deltaloom.passes.kernel import Kernel
from deltaloom.passes.pipeline import Context
from deltaloom.passes.stored import PROGRAM, SHARED

DECODE = Variant(True, False, ("y",))
NUMPY = backend("numpy", threads=1)


def small(*, activated: bool = False) -> Graph:
    """Projections behind a state; ``activated`` makes another graph with the same inputs and outputs."""
    g = GraphBuilder("small")
    x = g.input("x", f32[symbol("batch"), symbol("seq"), 4])
    taps = g.state("taps", f32[symbol("batch"), 4, 1])
    h, new = g.causal_conv1d(x, g.param("conv", [4, 1, 2]), taps, activation="silu")
    g.update(taps=new)
    gate, up = g.linear(h, g.param("gate", [6, 4])), g.linear(h, g.param("up", [6, 4]))
    y = g.linear(g.swiglu(gate, up), g.param("down", [4, 6]))
    g.output("y", g.silu(y) if activated else y)
    return g.build()


def driver(cache: CompileCache | None, *, graph: Graph | None = None, config: CompileConfig | None = None) -> Driver:
    ctx = Context(config or CompileConfig(), (NUMPY,))
    return Driver(graph or small(), ctx, planned=plain_variants(("y",)), cache=cache)


def compiled(folder: Path) -> tuple[Driver, list[str]]:
    """A driver that has made the decode program with the cache in ``folder``, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = driver(CompileCache(folder))
        assert found.program(DECODE).source == WANTED.source and found.program(DECODE).graph == WANTED.graph
    assert all(issubclass(warning.category, CacheWarning) for warning in caught)
    return found, [str(warning.message) for warning in caught]


WANTED = driver(None).program(DECODE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the entries of ``small``."""
    first, said = compiled(tmp_path / "cache")
    assert not first.cached and not said
    return tmp_path / "cache"


def entry(folder: Path, kind: str = PROGRAM) -> Path:
    (found,) = folder.glob(f"*.{kind}")
    return found


def test_what_is_in_the_cache_gives_the_same_program(folder: Path) -> None:
    again, said = compiled(folder)
    assert again.cached == {"shared", DECODE.title} and not said
    fresh = driver(None)
    fresh.program(DECODE)
    assert (again.layouts, again.conflicts, again.shared.graph) == (fresh.layouts, fresh.conflicts, fresh.shared.graph)
    names = {title: [(row.name, row.after, row.events) for row in rows] for title, rows in again.ledgers.items()}
    assert names == {title: [(row.name, row.after, row.events) for row in rows] for title, rows in fresh.ledgers.items()}


def test_a_model_from_the_cache_gives_the_same_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(type_.static_shape(), np.float32) for name, type_ in small().all_params().items()}
    x = rng.standard_normal((2, 3, 4), np.float32)
    found = []
    for _ in range(2):
        model = deltaloom.compile(small(), CompileConfig(cache=str(tmp_path / "cache"))).bind(weights)
        state = model.new_state(2)
        steps = [model.run({"x": part}, state, None, ("y",))["y"] for part in (x[:, :2], x[:, 2:])]
        found.append(np.concatenate(steps, axis=1))
    assert model.driver.cached == {"shared", "prefill -> y", "decode -> y"}
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].shape == (2, 3, 4) and found[0].any()


def test_a_program_that_is_not_there_is_made_from_the_shared_entry(folder: Path) -> None:
    again = driver(CompileCache(folder))
    prefill = Variant(False, False, ("y",))
    assert again.program(prefill).graph == driver(None).program(prefill).graph
    assert again.cached == {"shared"}
    assert driver(CompileCache(folder)).program(prefill).source and len(list(folder.glob(f"*.{PROGRAM}"))) == 2


@pytest.mark.parametrize("config", [{}, {"quantise": "int8"}, {"mesh": {"tp": 2}}, {"skip": ["fuse"]}], ids=str)
def test_every_program_of_a_model_comes_back_as_it_was(tmp_path: Path, config: dict[str, Any]) -> None:
    def made() -> tuple[deltaloom.CompiledModel, list[str]]:
        model = deltaloom.compile(graphs.main, compile_config({**config, "cache": str(tmp_path / "cache")}))
        return model, [model.program(kind, outputs=("last_logits",)).source for kind in ("prefill", "decode")]

    graphs = deltaloom.build_graph("tiny-next")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (first, sources), (second, again) = made(), made()
    assert not first.driver.cached and len(second.driver.cached) == 3
    assert again == sources and second.graph() == first.graph()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([SHARED, PROGRAM]), st.floats(0, 1), st.sampled_from(["cut", "flip", "zero", "insert", "append"]))
@example(PROGRAM, 0.0, "append")
def test_a_damaged_entry_is_reported_and_replaced(folder: Path, kind: str, where: float, how: str) -> None:
    path = entry(folder, kind)
    content = path.read_bytes()
    at = min(int(where * len(content)), len(content) - 1)
    changed = {
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :],
        "zero": content[:at] + bytes(len(content) - at),
        "insert": content[:at] + b"#" + content[at:],
        "append": content + b"#",
    }[how]
    path.write_bytes(changed)
    _, said = compiled(folder)
    assert len(said) == 1 and str(path) in said[0] and said[0].endswith("compiling instead")
    assert compiled(folder)[0].cached == {"shared", DECODE.title}


def rewritten(path: Path, change: Callable[[dict[str, object], bytes], bytes]) -> None:
    """The entry with another header and body, its checksums made right again by ``change``."""
    line, _, body = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    body = change(header, body)
    path.write_bytes(json.dumps(header, sort_keys=True).encode() + b"\n" + body)


def newer(header: dict[str, object], body: bytes) -> bytes:
    header["format"] = module.FORMAT + 1
    return body


def other_kernel(header: dict[str, object], body: bytes) -> bytes:
    return _graph_replaced(header, body, b"numpy.linear", b"numpy.nothing")


def other_type(header: dict[str, object], body: bytes) -> bytes:
    return _graph_replaced(header, body, b"f32[batch, 1, 4]", b"f32[batch, 1, 5]")


def other_output(header: dict[str, object], body: bytes) -> bytes:
    return _graph_replaced(header, body, b'"y",', b'"z",')


def newer_graph(header: dict[str, object], body: bytes) -> bytes:
    return _graph_replaced(header, body, b'"format": 1', b'"format": 9')


def _graph_replaced(header: dict[str, object], body: bytes, old: bytes, new: bytes) -> bytes:
    """The graph changed, with a checksum that fits: what a program of the same user could have written."""
    parts: list[list[object]] = header["parts"]  # type: ignore[assignment]
    graph = body[: int(str(parts[0][1]))]
    assert parts[0][0] == "graph" and old in graph
    changed = graph.replace(old, new)
    parts[0][1:] = [len(changed), sha256(changed).hexdigest()]
    return changed + body[len(graph) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, "it has format 2, and this deltaloom reads format 1"),
        (other_type, "is refused|has type|as f32"),
        (other_kernel, "nothing"),
        (other_output, "its graph gives .'z',., not .'y',."),
        (newer_graph, "format 9"),
    ],
)
def test_an_entry_with_right_checksums_and_a_wrong_graph_is_refused(
    folder: Path, change: Callable[[dict[str, object], bytes], bytes], message: str
) -> None:
    rewritten(entry(folder), change)
    _, said = compiled(folder)
    assert len(said) == 1
    assert re.search(message, said[0]), said[0]
    assert compiled(folder)[1] == []


def test_the_entry_of_another_graph_under_this_key_is_not_taken(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    driver(CompileCache(other), graph=small(activated=True)).program(DECODE)
    for kind in (SHARED, PROGRAM):
        shutil.copy(entry(other, kind), entry(folder, kind))
    _, said = compiled(folder)
    assert len(said) == 2 and all("it was written for something else" in line for line in said)


def test_links_devices_and_files_that_others_may_write_are_no_entries(folder: Path, tmp_path: Path) -> None:
    path = entry(folder)
    whole = path.read_bytes()
    path.chmod(0o622)
    assert "only you can write" in compiled(folder)[1][0]
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    path.symlink_to(tmp_path / "elsewhere")
    assert "is not used" in compiled(folder)[1][0]
    assert not path.is_symlink() and (tmp_path / "elsewhere").read_bytes() == whole
    path.unlink()
    os.mkfifo(path)
    assert "only you can write" in compiled(folder)[1][0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_and_folders_of_another_user_are_not_used(folder: Path) -> None:
    os.chown(entry(folder), 12345, -1)
    assert "only you can write" in compiled(folder)[1][0]
    os.chown(folder, 12345, -1)
    with pytest.raises(ConfigError, match=r"belongs to user 12345, and you are 0; give another one .* \(--no-cache\)"):
        CompileCache(folder)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o755])
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match=f"is open to other users .mode {mode:03o}, expected 700"):
        CompileCache(tmp_path)


def test_a_folder_that_becomes_open_is_no_longer_written_or_read(folder: Path) -> None:
    used = driver(CompileCache(folder))
    before = sorted(folder.iterdir())
    folder.chmod(0o777)
    with pytest.warns(CacheWarning) as caught:
        assert used.program(DECODE).source == WANTED.source
    assert ["open to other users" in str(one.message) for one in caught] == [True, True]
    assert sorted(folder.iterdir()) == before


def test_a_link_and_a_file_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match="is not a folder, nor may it be a link to one"):
            CompileCache(tmp_path / name)


def test_the_folder_is_made_for_this_user_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


READ_ONLY = """
import os
from pathlib import Path
from typing import Any
from deltaloom.passes.cache import CompileCache
from deltaloom.passes.cache_key import CacheKey
if os.geteuid() == 0:  # root may write anywhere
    os.setgid(65534); os.setuid(65534)
folder = Path("cache")
print(CompileCache(folder).write(CacheKey({"a": "b"}), "program", {"graph": "text"}))
print(CompileCache(folder).read(CacheKey({"a": "b"}), "program"))
"""


def test_where_nothing_can_be_written_work_goes_on_without_a_cache(tmp_path: Path) -> None:
    place = tmp_path / "closed"
    place.mkdir()
    place.chmod(0o555)
    done = subprocess.run([sys.executable, "-c", READ_ONLY], cwd=place, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "None"]
    assert "nothing can be kept in the cache" in done.stderr and "going on without it" in done.stderr


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(folder).unlink()

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_create", full)
    _, said = compiled(folder)
    assert len(said) == 1 and "No space left on device; going on without it" in said[0]
    assert [path.suffix for path in folder.iterdir()] == [f".{SHARED}"]


WRITER = """
import sys
from pathlib import Path
from typing import Any
from deltaloom.passes.cache import CompileCache
from deltaloom.passes.cache_key import CacheKey
cache, letter = CompileCache(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    cache.write(CacheKey({"program": "x"}), "program", {"graph": letter * (50_000 + 1000 * (number % 7)), "end": letter})
"""


def writer(folder: Path, letter: str, times: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", WRITER, str(folder), letter, str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_readers_see_whole_entries_while_two_processes_write(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache, key = CompileCache(folder), CacheKey({"program": "x"})
    writers = [writer(folder, letter, 150) for letter in "ab"]
    seen: set[str] = set()
    reads = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(process.poll() is None for process in writers) or not reads:
            parts = cache.read(key, PROGRAM) if folder.exists() else None
            if parts is not None:
                assert set(parts["graph"]) == {parts["end"]}
                seen.add(parts["end"])
                reads += 1
    assert [process.wait() for process in writers] == [0, 0]
    assert seen <= {"a", "b"} and reads > 10
    assert [path.suffix for path in folder.iterdir()] == [f".{PROGRAM}"]


def test_a_killed_writer_does_no_harm_and_is_swept_up_later(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache, key = CompileCache(folder), CacheKey({"program": "x"})
    for wait in (0.0, 0.01, 0.03):
        process = writer(folder, "k", 100_000)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parts = cache.read(key, PROGRAM) if folder.exists() else None
        assert parts is None or set(parts["graph"]) == {"k"}
    left, fresh = folder / f"{module._TEMPORARY}1-a", folder / f"{module._TEMPORARY}2-b"
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert cache.write(key, PROGRAM, {"graph": "g"})
    assert not left.exists() and fresh.exists()
    assert [one.name for one in cache.entries()] == [f"{key.digest}.{PROGRAM}"]


def test_the_oldest_entries_go_when_there_are_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CompileCache(tmp_path / "cache")
    keys = [CacheKey({"number": str(number)}) for number in range(4)]
    for age, key in enumerate(keys):
        assert cache.write(key, PROGRAM, {"graph": "x" * 1000})
        os.utime(cache.folder / f"{key.digest}.{PROGRAM}", (age, age))
    monkeypatch.setattr(module, "MOST_BYTES", 3000)
    assert cache.write(CacheKey({"number": "new"}), PROGRAM, {"graph": "x" * 1000})
    assert [cache.read(key, PROGRAM) is not None for key in (*keys, CacheKey({"number": "new"}))] == [False] * 3 + [True] * 2


def key_of(graph: Graph | None = None, **config: object) -> CacheKey:
    stored = driver(CompileCache(Path("/nowhere-at-all")), graph=graph, config=CompileConfig(**config)).stored  # type: ignore[arg-type]
    assert stored is not None
    return stored.key


@pytest.fixture
def no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompileCache, "write", lambda *arguments: True)


@pytest.mark.usefixtures("no_writing")
def test_whatever_decides_about_a_program_is_in_its_key() -> None:
    plain = key_of()
    assert key_of().digest == plain.digest
    others = {
        "graph": key_of(small(activated=True)),
        "compile.skip": key_of(skip=("fuse",)),
        "compile.fuel": key_of(fuel=1),
        "compile.threads": key_of(threads=1),
        "compile.dtype": key_of(dtype="float32"),
        "compile.kernels": key_of(kernels={"linear": ("numpy",)}),
        "compile.quantise": key_of(quantise={"*.up": "int8", "*": "plain"}),
        "compile.keep_quantized": key_of(keep_quantized=True),
    }
    for component, key in others.items():
        assert [line.split(":")[0] for line in key.changed(plain.components)] == [component]
    assert len({key.digest for key in (plain, *others.values())}) == len(others) + 1
    swapped = key_of(quantise={"*": "plain", "*.up": "int8"})
    assert swapped.digest != others["compile.quantise"].digest, "the first pattern that matches decides, so order counts"
    for same in (key_of(cache="default"), key_of(dump="/x"), key_of(prefill_chunk=3)):
        assert same.digest == plain.digest


@pytest.mark.usefixtures("no_writing")
def test_kernels_ops_and_code_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = key_of()

    class More:
        def __getattr__(self, name: str) -> object:
            return getattr(NUMPY, name)

        def kernels(self) -> list[Kernel]:
            return [replace(NUMPY.kernels()[0], title="another"), *NUMPY.kernels()]

    ctx = Context(CompileConfig(), (More(),))  # type: ignore[arg-type]
    found = Driver(small(), ctx, planned=plain_variants(("y",)), cache=CompileCache(Path("/nowhere-at-all"))).stored
    assert found is not None and [line.split(":")[0] for line in found.key.changed(plain.components)] == ["kernels of numpy on cpu"]
    from deltaloom.ops.linear import Linear
    from deltaloom.passes import cache_key

    monkeypatch.setattr(Linear, "version", 99)
    assert [line.split(":")[0] for line in key_of().changed(plain.components)][-1] == "ops"
    monkeypatch.undo()
    monkeypatch.setattr(CompileCache, "write", lambda *arguments: True)
    monkeypatch.setattr(cache_key, "_code", lambda: "other code")
    assert [line.split(":")[0] for line in key_of().changed(plain.components)] == ["deltaloom"]


def test_a_miss_is_explained_by_the_nearest_entry(folder: Path) -> None:
    cache = CompileCache(folder)
    key = driver(cache).stored.key  # type: ignore[union-attr]
    other = key.extended(**{"compile.fuel": "3", "python": "3.99.0"})
    assert cache.explain(key, SHARED) == [f"key {key.digest}", f"hit: it is in {folder}"]
    lines = cache.explain(other, SHARED)
    assert lines[0] == f"key {other.digest}" and key.digest[:12] in lines[1]
    assert lines[2:] == ["  compile.fuel: null -> 3", f"  python: {key.components['python']} -> 3.99.0"]
    assert cache.explain(key, "nothing")[1] == f"miss: {folder} has no entry of that kind"


def test_the_default_folder_and_when_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "deltaloom"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert default_folder() == tmp_path / "home" / ".cache" / "deltaloom"
    assert cache_of(CompileConfig()) is None and cache_of(CompileConfig(cache="off")) is None
    assert cache_of(CompileConfig(cache="default", dump="x")) is None
    found = cache_of(CompileConfig(cache="~/mine"))
    assert found is not None and found.folder == tmp_path / "home" / "mine"
