"""``plugins new``: what it makes is whole, and what it cannot make it refuses, leaving nothing behind."""

from __future__ import annotations

import errno
import json
import os
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import deltaloom.cli.plugins_new as plugins_new
from deltaloom import __version__
from deltaloom.cli.app import run
from deltaloom.cli.plugins_new import DESCRIPTIONS, scaffold
from deltaloom.graph.errors import ConfigError
from deltaloom.graph.plugins import registered
from deltaloom.testing import outcomes
from deltaloom.testing.plugin_suites import plugin_suites

KINDS = sorted(DESCRIPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaffold_is_a_distribution_with_code_a_test_and_a_page(kind: str, tmp_path: Path) -> None:
    made = scaffold("my_lab", kind, tmp_path)
    assert made == tmp_path / "deltaloom-my-lab"
    assert list(tmp_path.iterdir()) == [made], "nothing is left of the temporary folder"
    project = tomllib.loads((made / "pyproject.toml").read_text())
    assert project["project"]["name"] == "deltaloom-my-lab"
    assert project["project"]["dependencies"] == [f"deltaloom>={__version__}"]
    assert project["project"]["entry-points"] == {"deltaloom.plugins": {"my_lab": "deltaloom_my_lab:plugin"}}
    sources = sorted((made / "src" / "deltaloom_my_lab").glob("*.py"))
    assert len(sources) > 1 and sources[0].name == "__init__.py"
    for path in [*sources, made / "tests" / "test_conformance.py"]:
        compile(path.read_text(), str(path), "exec")
    assert (made / "tests" / "test_conformance.py").read_text().splitlines()[-1] == 'test_my_lab = conformance("my_lab.")'
    for path in (path for path in made.rglob("*") if path.is_file()):
        assert "$" not in path.read_text(), f"{path} has a word that was not filled in"
    assert "deltaloom plugins check my_lab" in (made / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_scaffold_passes_the_conformance_kit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; tests/plugins/test_tutorial.py does the same with it installed, by the command."""
    made = scaffold(f"kit_{kind}", kind, tmp_path)
    monkeypatch.syspath_prepend(made / "src")
    with registered(import_module(f"deltaloom_kit_{kind}").plugin):
        found = list(outcomes(plugin_suites(f"kit_{kind}"), examples=3))
    assert not [one for one in found if one.status == "failed"]
    assert len([one for one in found if one.status == "passed"]) >= 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected lower-case letters"),
        ("My", "expected lower-case letters"),
        ("my-lab", "expected lower-case letters"),
        ("../escape", "expected lower-case letters"),
        ("1lab", "expected lower-case letters"),
        ("läb", "expected lower-case letters"),
        ("lab\n", "expected lower-case letters"),
        ("x" * 65, "it has 65 characters, expected at most 64"),
        ("class", "the word is taken"),
        ("deltaloom", "the word is taken"),
        ("linear", "deltaloom itself has the op 'linear'"),
        ("numpy", "deltaloom itself has the backend 'numpy'"),
        ("qwen3", "deltaloom itself has the model type 'qwen3'"),
    ],
)
def test_a_name_that_no_plugin_can_have_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a plugin") as refused:
        scaffold(name, "op", tmp_path)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no kind 'ops' of plugin; expected one of op, backend, pass, model"):
        scaffold("mylab", "ops", tmp_path)


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "deltaloom-mylab"
    kept.mkdir()
    with pytest.raises(ConfigError, match="is there already; move it away"):
        scaffold("mylab", "op", tmp_path)
    kept.rmdir()
    kept.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="is there already"):
        scaffold("mylab", "op", tmp_path)
    assert list(tmp_path.iterdir()) == [kept] and kept.is_symlink()


def test_a_place_where_nothing_can_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which is no folder; make it first"):
        scaffold("mylab", "op", tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="which is no folder"):
        scaffold("mylab", "op", tmp_path / "file")
    if os.geteuid() == 0:
        return  # who may do everything finds no folder read-only
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="nothing can be made in .*: Permission denied; choose another folder"):
        scaffold("mylab", "op", tmp_path)


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plugins_new, "_fill", full)
    with pytest.raises(ConfigError, match="deltaloom-mylab cannot be written: No space left on device"):
        scaffold("mylab", "op", tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, other = plugins_new.write, tmp_path / "deltaloom-mylab"

    def write(folder: Path, kind: str, words: dict[str, str]) -> None:
        real(folder, kind, words)
        other.mkdir()
        (other / "mine").write_text("kept")

    monkeypatch.setattr(plugins_new, "write", write)
    with pytest.raises(ConfigError, match="is there already"):
        scaffold("mylab", "op", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["deltaloom-mylab", "mine"]


def test_the_folder_has_the_rights_that_new_folders_have(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert scaffold("mylab", "op", tmp_path).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "a b"
    place.mkdir()
    assert run(["plugins", "new", "mylab", "--kind", "op", "--into", str(place)]) == 0
    said = capsys.readouterr().out
    assert f"cd '{place}/deltaloom-mylab'" in said and "deltaloom plugins check mylab" in said
    assert run(["plugins", "new", "other", "--kind", "model", "--into", str(place), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["folder"] == str(place / "deltaloom-other") and "pyproject.toml" in made["files"]
    assert all((place / "deltaloom-other" / name).is_file() for name in made["files"])
    assert run(["plugins", "new", "other", "--kind", "model", "--into", str(place)]) == 2
    assert "is there already" in capsys.readouterr().err
