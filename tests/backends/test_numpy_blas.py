"""How the NumPy backend finds the BLAS library whose threads it turns off."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from deltaloom.backends.numpy import threads


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wheels for other systems may use another BLAS")
def test_the_bundled_library_is_found_and_has_one_thread():
    found = threads._openblas_files()
    if not found:
        pytest.skip("this NumPy has no bundled OpenBLAS")
    assert all(path.is_file() and "openblas" in path.name for path in found)
    library = ctypes.CDLL(str(found[0]))
    name = "openblas_get_num_threads"
    getters = [getattr(library, f"{prefix}{name}{suffix}", None) for prefix in ("scipy_", "") for suffix in ("64_", "")]
    getter = next(getter for getter in getters if getter is not None)
    setter = next(
        found
        for prefix in ("scipy_", "")
        for suffix in ("64_", "")
        if (found := getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)) is not None
    )
    setter(ctypes.c_int(2))
    assert threads.single_threaded_blas()
    assert getter() == 1


def test_a_file_that_cannot_be_loaded_is_passed_over(monkeypatch, tmp_path):
    damaged = tmp_path / "libopenblas.so"
    damaged.write_bytes(b"not a library")
    found = threads._openblas_files()
    monkeypatch.setattr(threads, "_openblas_files", lambda: [damaged])
    assert not threads.single_threaded_blas()
    monkeypatch.setattr(threads, "_openblas_files", lambda: [damaged, *found])
    assert threads.single_threaded_blas() == bool(found)


def test_a_library_without_the_function_is_not_the_one(monkeypatch):
    """A library of that name with none of the functions."""
    monkeypatch.setattr(threads, "_openblas_files", lambda: [Path("libm.so")])
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda name: object())
    assert not threads.single_threaded_blas()


@pytest.mark.parametrize("symbol", ["scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads"])
def test_every_way_to_name_the_function_is_known(monkeypatch, symbol):
    """NumPy's wheels, builds with 64-bit integers, distributions."""
    given = []
    library = type("Library", (), {symbol: staticmethod(lambda count: given.append(count.value))})()
    monkeypatch.setattr(threads, "_openblas_files", lambda: [Path("libopenblas.so")])
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda name: library)
    assert threads.single_threaded_blas() and given == [1]


def test_a_library_of_a_distribution_is_found_in_the_memory_map(monkeypatch, tmp_path):
    """A NumPy without a bundled library: its folders are empty, and the process has mapped one from elsewhere."""
    (tmp_path / "numpy").mkdir()
    monkeypatch.setattr(np, "__file__", str(tmp_path / "numpy" / "__init__.py"))
    lines = [
        "7f00-7f01 r-xp 00000000 08:01 1234   /usr/lib/x86_64-linux-gnu/openblas pthread/libblas.so.3",
        "7f01-7f02 r--p 00000000 08:01 1234   /usr/lib/x86_64-linux-gnu/openblas pthread/libblas.so.3",
        "7f02-7f03 r-xp 00000000 08:01 99   /usr/lib/libc.so.6",
        "7f04-7f05 rw-p 00000000 00:00 0",
        "7f06-7f07 r-xp 00000000 08:01 77   /usr/lib/libopenblas.so.0",
    ]
    maps = tmp_path / "maps"
    maps.write_text("\n".join(lines) + "\n", encoding="utf-8")
    opened = open

    def redirected(name, *rest, **options):
        return opened(maps if name == "/proc/self/maps" else name, *rest, **options)

    monkeypatch.setattr("builtins.open", redirected)
    monkeypatch.setattr(threads.os.path, "exists", lambda name: name == "/proc/self/maps")
    assert threads._openblas_files() == [
        Path("/usr/lib/libopenblas.so.0"),
        Path("/usr/lib/x86_64-linux-gnu/openblas pthread/libblas.so.3"),
    ]
    monkeypatch.setattr(threads.os.path, "exists", lambda name: False)
    assert threads._openblas_files() == []
