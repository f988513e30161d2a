"""A folder like site-packages for the tests of plugins."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugins.distributions import Site

from deltaloom.graph import plugins


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty one, on the path while the test runs; nothing of it is left behind."""
    made = Site(tmp_path / "site")
    made.folder.mkdir()
    monkeypatch.syspath_prepend(str(made.folder))
    monkeypatch.delenv("DELTALOOM_PLUGINS", raising=False)
    monkeypatch.delenv("DELTALOOM_PLUGINS_STRICT", raising=False)
    plugins.rescan()
    yield made
    for name in made.imported():
        del sys.modules[name]
    plugins.rescan()
