"""Device profiles: files good and bad, what is kept and what is not believed, and a measurement."""

import errno
import json
import os
import warnings
from pathlib import Path

import pytest

from deltaloom.graph.errors import ConfigError
from deltaloom.graph.types import bf16, f32, f64
from deltaloom.passes import cache
from deltaloom.passes.cache import CacheWarning
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.cost import Work
from deltaloom.passes.pipeline import Context
from deltaloom.runtime import device_limits
from deltaloom.runtime.compile import backends_of
from deltaloom.runtime.device_limits import device_profile, measured_profile
from deltaloom.runtime.device_profile import DeviceProfile, Profiles, named_profile, read_profile

PROFILE = DeviceProfile("here", 4e10, {"float32": 1.5e11}, 1e-6, "measured")
GOOD = '{"name": "mine", "bandwidth": 1e10, "flops": {"float32": 2e11, "bfloat16": 4e11}, "dispatch": 2e-6}'

GOOD_TOML = 'name = "mine"\nbandwidth = 1e10\ndispatch = 2e-6\nflops = {float32 = 2e11, bfloat16 = 4e11}\n'


def kept(folder: Path, *, threads: int | None = 1) -> Profiles:
    return Profiles(folder, backend="numpy", device="cpu", threads=threads)


def test_the_longer_of_operations_and_bytes_is_the_time() -> None:
    assert PROFILE.seconds(Work(flops=3 * 10**11, bytes=1), f32) == 2.0
    assert PROFILE.seconds(Work(flops=1, bytes=2 * 10**11), f32) == 5.0
    with pytest.raises(ConfigError, match="'here' has no flops for float64, only for float32"):
        PROFILE.peak(f64)


def test_files_of_both_kinds_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(GOOD)
    (tmp_path / "one.toml").write_text(
        'name = "mine"\nbandwidth = 1e10\ndispatch = 2e-6\nflops = {float32 = 2e11, bfloat16 = 4e11}\n'
    )
    first, second = (read_profile(tmp_path / name) for name in ("one.json", "one.toml"))
    assert (first.bandwidth, first.dispatch, dict(first.flops)) == (second.bandwidth, second.dispatch, dict(second.flops))
    assert first.name == second.name == "mine" and first.peak(bf16) == 4e11 and first.source.endswith("one.json")


def test_known_devices_have_a_name() -> None:
    assert named_profile("h200") is named_profile("H200")
    assert named_profile("h200").bandwidth == 4.58e12 and named_profile("h100").peak(bf16) == 790e12


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "cannot be read as JSON"),
        ("[1]", "holds list, expected name, bandwidth"),
        ("{", "cannot be read as JSON"),
        ("\x00\xff", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"flops": {"float32": 1}}', "has no field 'bandwidth'"),
        ('{"bandwidth": 1}', "has no field 'flops'"),
        ('{"bandwidth": 1, "flops": 3}', "flops is 3, expected a table"),
        ('{"bandwidth": 1, "flops": {}}', "has no flops; give at least flops.float32"),
        ('{"bandwidth": 1, "flops": {"float23": 1}}', "did you mean 'float32'"),
        ('{"bandwidth": 1, "flops": {"float32": "fast"}}', "flops.float32 = 'fast'"),
        ('{"bandwidth": 1, "flops": {"float32": 0}}', "expected operations a second above 0"),
        ('{"bandwidth": -1, "flops": {"float32": 1}}', "has bandwidth -1, expected bytes a second above 0"),
        ('{"bandwidth": NaN, "flops": {"float32": 1}}', "has bandwidth nan"),
        ('{"bandwidth": true, "flops": {"float32": 1}}', "has bandwidth True"),
        ('{"bandwidth": 1, "flops": {"float32": 1}, "dispatch": -1}', "has dispatch -1"),
        ('{"bandwidth": 1, "flops": {"float32": 1}, "name": 3}', "name is 3, expected a text"),
        ('{"bandwith": 1, "flops": {"float32": 1}}', "unknown field 'bandwith'; did you mean 'bandwidth'"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        read_profile(path)
    assert sentence in str(error.value) and "bad.json" in str(error.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no device profile 'h300': no such file, and known devices are h100, h200"):
        named_profile("h300")
    with pytest.raises(ConfigError, match="cannot be read as JSON: Is a directory"):
        read_profile(tmp_path)
    long = tmp_path / "long.json"
    long.write_bytes(b" " * (1 << 20) + GOOD.encode())
    with pytest.raises(ConfigError, match="is longer than 1048576 bytes"):
        read_profile(long)


def test_a_measured_profile_is_kept_for_this_machine_and_thread_count(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert kept(folder).read() is None
    assert kept(folder).keep(PROFILE)
    assert kept(folder).read() == PROFILE
    assert kept(folder, threads=2).read() is None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def entry(folder: Path) -> Path:
    (path,) = folder.glob("*.profile")
    return path


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def open_up(path: Path) -> None:
    path.chmod(0o666)


def link(path: Path) -> None:
    other = path.with_suffix(".other")
    path.rename(other)
    path.symlink_to(other)


@pytest.mark.parametrize("change", [damage, shorten, open_up, link])
def test_what_was_changed_is_not_believed(tmp_path: Path, change: object) -> None:
    assert callable(change)
    profiles = kept(tmp_path / "cache")
    profiles.keep(PROFILE)
    change(entry(tmp_path / "cache"))
    with pytest.warns(CacheWarning, match="measuring instead"):
        assert profiles.read() is None


def test_a_foreign_content_under_the_right_key_is_not_believed(tmp_path: Path) -> None:
    profiles = kept(tmp_path / "cache")
    profiles._cache.write(profiles._key, "profile", {"profile": json.dumps({"bandwidth": "much", "flops": {"float32": 1}})})
    with pytest.warns(CacheWarning, match="bandwidth 'much'.*measuring instead"):
        assert profiles.read() is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache, "_create", refuse)
    with pytest.warns(CacheWarning, match="nothing can be kept in the cache .*: Read-only file system"):
        assert not kept(tmp_path / "cache").keep(PROFILE)


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ConfigError, match="the cache folder"):
            kept(place)


def test_a_folder_of_all_users_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        kept(folder)


def test_it_is_measured_once_and_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, ...]] = []

    def measure(config: CompileConfig, dtypes: tuple[object, ...]) -> DeviceProfile:
        measured.append(tuple(map(str, dtypes)))
        return DeviceProfile("new", 1e10, {getattr(one, "long_name", ""): 1e11 for one in dtypes}, 0.0, "measured")

    monkeypatch.setattr(device_limits, "measured_profile", measure)
    folder = tmp_path / "cache"
    contexts = {}
    for dtype in ("float32", "float64"):
        config = CompileConfig(dtype=dtype, threads=1)
        contexts[dtype] = Context(config, backends_of(config))
    for again in (False, False, True):
        device_profile(contexts["float32"], folder=folder, again=again)
    assert measured == [("f32",), ("f32",)]
    both = device_profile(contexts["float64"], folder=folder)
    assert measured[2:] == [("f32", "f64")] and set(both.flops) == {"float32", "float64"}
    assert set(device_profile(contexts["float32"], folder=folder).flops) == {"float32", "float64"} and len(measured) == 3
    device_profile(contexts["float32"], folder=None)
    assert len(measured) == 4


def test_a_measurement_is_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes: the figures only have to be possible ones."""
    monkeypatch.setattr(device_limits, "PRODUCT", {"cpu": 256, "cuda": 256})
    monkeypatch.setattr(device_limits, "STREAM", 16 << 20)
    monkeypatch.setattr(device_limits, "WINDOW", 4 << 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured_profile(CompileConfig(threads=1), (f32, f64))
    assert 1e9 < found.peak(f64) < found.peak(f32) * 1.5 < 1e14
    assert 1e8 < found.bandwidth < 1e13 and 0 <= found.dispatch < 1e-3
    assert found.name == "numpy on cpu, 1 thread" and found.source.startswith("measured at load ")
