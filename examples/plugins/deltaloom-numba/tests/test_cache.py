"""Where machine code is kept: in a private folder, quickly found again, and done without where there can be none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import sys, warnings
warnings.simplefilter("always")
import numba.core.config
from deltaloom_numba import loops
hits = sum(sum(f.stats.cache_hits.values()) for f in vars(loops).values() if hasattr(f, "stats"))
print("hits", hits, "setting", repr(numba.core.config.CACHE_DIR))
"""


def start(cache: Path | str, **environment: str) -> tuple[str, str]:
    """A process that imports the loops; its output and its warnings."""
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    given = {**kept, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, env=given, check=True)
    return done.stdout.strip(), done.stderr


def test_the_second_start_compiles_nothing_and_a_torn_file_is_compiled_again(tmp_path: Path) -> None:
    assert start(tmp_path) == ("hits 0 setting ''", "")
    folder = tmp_path / "deltaloom" / "numba"
    for private in (folder, folder.parent):
        assert private.stat().st_mode & 0o777 == 0o700
    indices = sorted(folder.rglob("*.nbi"))
    assert {path.name.split("-")[0] for path in indices} >= {"loops.multiply_rows", "loops.widen", "loops.delta_net_step"}
    assert start(tmp_path) == (f"hits {len(indices)} setting ''", "")
    indices[0].write_bytes(b"")
    indices[1].write_bytes(b"no pickle at all")
    output, errors = start(tmp_path)
    assert output == f"hits {len(indices) - 2} setting ''" and errors.count("CacheWarning") == 2 and "cannot be read" in errors


@pytest.mark.parametrize("fault", ["no folder", "open to others"])
def test_without_a_private_folder_it_compiles_and_says_so(fault: str, tmp_path: Path) -> None:
    if fault == "no folder":
        (tmp_path / "deltaloom").write_text("a file")
        wanted = "cannot be written"
    else:
        (tmp_path / "deltaloom" / "numba").mkdir(parents=True, mode=0o755)
        wanted = "is open to other users (mode 755"
    output, errors = start(tmp_path)
    assert output == "hits 0 setting ''" and errors.count("CacheWarning") == 1 and wanted in errors
    assert not list(tmp_path.rglob("*.nbi"))


def test_the_users_own_folder_is_used(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert start(tmp_path, NUMBA_CACHE_DIR=str(own)) == (f"hits 0 setting {str(own)!r}", "")
    assert list(own.rglob("*.nbi")) and not (tmp_path / "deltaloom").exists()
