"""The tutorial of docs/plugins.md, followed to the letter in a clean environment; and each kind of scaffold, checked there."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from plugins.environment import ROOT, Environment

from deltaloom.cli.plugins_new import DESCRIPTIONS
from deltaloom.graph.plugin import Plugin
from deltaloom.testing import FEATURES

PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
TUTORIAL = PAGE.split("## Your first plugin in 20 lines")[1].split("\n## ")[0]
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("clean"))
    made.install(ROOT)
    return made


def script(text: str) -> tuple[str, list[str]]:
    """The blocks of a page as one shell script, its files written where the page has them, and the lines that it promises."""
    parts, promised = [], []
    for match in BLOCK.finditer(text):
        if match["file"]:
            parts.append(f"cat > {shlex.quote(match['file'])} <<'END OF FILE'\n{match['body']}END OF FILE\n")
        elif match["language"] == "bash":
            parts.append(match["body"])
        elif match["language"] == "text":
            promised += match["body"].split("\n")[:-1]
        else:
            raise AssertionError(f"a block of the tutorial is neither a file nor a command:\n{match['body']}")
    return "set -euo pipefail\n" + "\n".join(parts), promised


def commands(environment: Environment) -> Path:
    """A folder with ``deltaloom``, ``pip``, ``pytest`` and ``python`` of the environment; pip needs no network."""
    folder = environment.folder / "commands"
    folder.mkdir(exist_ok=True)
    for name, module in (("deltaloom", "deltaloom"), ("pip", "pip"), ("pytest", "pytest"), ("python", "")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(str(environment.python))} {f"-m {module}" if module else ""} "$@"\n')
        path.chmod(0o755)
    return folder


def test_the_tutorial_works_as_it_is_written(clean: Environment) -> None:
    text, promised = script(TUTORIAL)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "1"}
    lines = f"export PATH={shlex.quote(str(commands(clean)))}:$PATH\n{text}"
    said = clean.check("-c", f"import subprocess, sys; sys.exit(subprocess.run(['bash', '-c', {lines!r}]).returncode)", **offline)
    for line in promised:
        assert line in said, f"the page promises {line!r}, but the output is\n{said}"
    assert "mylab.soft_cap" in said and "mylab passes: " in said
    assert re.search(r"^\d+ passed", said, re.MULTILINE), said
    assert "mylab" not in said.rsplit("numpy.reference", 1)[1], "after pip uninstall the plugin is still listed"


def test_the_plugin_is_twenty_lines_of_code() -> None:
    (body,) = (match["body"] for match in BLOCK.finditer(TUTORIAL) if (match["file"] or "").endswith("soft_cap.py"))
    assert len([line for line in body.splitlines() if line.strip()]) <= 22


def test_the_other_code_of_the_page_runs(clean: Environment) -> None:
    rest = PAGE.replace(TUTORIAL, "")
    blocks = re.findall(r"(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for reason, body in blocks:
        compile(body, "docs/plugins.md", "exec")
        if not reason:
            assert clean.check("-c", body).startswith("4.0 {")


def test_the_page_lists_every_feature_and_every_field_of_a_plugin() -> None:
    table = PAGE.split("| feature |")[1].split("\n\n")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE)) == dict(FEATURES)
    table = PAGE.split("| field of `Plugin` |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
    assert [name for row in listed for name in re.findall(r"`(\w+)`", row)] == [f.name for f in fields(Plugin)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(DESCRIPTIONS))
def test_a_fresh_scaffold_passes_its_own_check_where_it_is_installed(kind: str, clean: Environment, tmp_path: Path) -> None:
    name = f"fresh_{kind}"
    done = clean.deltaloom("plugins", "new", name, "--kind", kind, "--into", str(tmp_path))
    assert done.returncode == 0, done.stderr
    clean.install(tmp_path / f"deltaloom-fresh-{kind}")
    try:
        done = clean.deltaloom("plugins", "check", name, "--json", "-", "--examples", "5")
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        report = json.loads(done.stdout)
        assert report["conforms"] and report["counts"]["failed"] == 0 and report["counts"]["passed"] >= 10
        assert f"{name} passes: " in done.stderr
    finally:
        clean.uninstall(f"deltaloom-fresh-{kind}")
