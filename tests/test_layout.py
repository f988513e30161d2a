"""The house itself: links, guards, the public names, the declared dependencies, and what a built wheel holds."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib import import_module
from pathlib import Path

import pytest

import deltaloom

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "deltaloom"
PARTS = ["backends", "cli", "graph", "models", "ops", "passes", "runtime", "testing"]
PUBLIC = [
    "LLM", "AutoModelForCausalLM", "AutoTokenizer", "CompileConfig", "CompiledModel", "DeltaloomError", "Plugin", "SamplingParams",
    "bisect", "build_graph", "compare", "compile", "export_onnx", "load",
]  # fmt: skip


def test_each_part_is_a_real_folder_and_a_relative_link() -> None:
    links = {path.name: str(path.readlink()) for path in PACKAGE.iterdir() if path.is_symlink()}
    assert links == {part: f"../../{part}" for part in PARTS}
    for part in PARTS:
        assert (ROOT / part).is_dir() and not (ROOT / part).is_symlink()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_refuses_to_be_imported_by_its_folder_name(part: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {part}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"import deltaloom.{part}, not {part}" in result.stderr


def test_public_names_are_pinned_and_come_from_their_modules() -> None:
    assert deltaloom.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(deltaloom))
    for name in PUBLIC:
        assert getattr(deltaloom, name).__name__ == name
    with pytest.raises(AttributeError, match="'lode'; its public names are .*load"):
        deltaloom.lode  # noqa: B018


def test_lazy_exports_and_the_type_checkers_imports_are_the_same() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
    declared = {
        alias.name: node.module for node in imports if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert declared == deltaloom._MODULES
    assert set(declared) == set(PUBLIC)


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_declared_dependency_is_pinned_within_its_lower_bound() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([0-9.]+)", line)
            assert match, f"constraints.txt: {line!r} is not name==version"
            pins[match[1]] = version(match[2])
    declared = [*project()["dependencies"], *sum(project()["optional-dependencies"].values(), [])]
    for requirement in declared:
        name, _, least = requirement.partition(";")[0].partition(">=")
        if not name.startswith("deltaloom["):
            assert pins[name.replace("_", "-")] >= version(least), requirement
    assert pins["torch"] == (2, 13, 0)


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def source_files() -> list[str]:
    """The files of the tree that git knows or would add, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout to know which files belong to the tree")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_symlink() or (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, so that no earlier build folder can add to it."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in source_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--wheel-dir", out, copy], check=True)
    (built,) = out.glob("deltaloom-*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_file_of_the_parts_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {"deltaloom/__init__.py", "deltaloom/__main__.py", "deltaloom/py.typed"}
    expected |= {f"deltaloom/{name}" for name in source_files() if name.split("/")[0] in PARTS}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {"model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"} <= {
        name.removeprefix("deltaloom/models/tiny_next/") for name in packed
    }


def test_the_wheel_says_what_it_is_and_does_not_ask_for_torch(wheel: zipfile.ZipFile) -> None:
    info = f"deltaloom-{deltaloom.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == deltaloom.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(core) == 6 and not any(line.startswith("torch") for line in core)
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(wheel.namelist())
    assert "deltaloom = deltaloom.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_every_module_of_the_package_imports() -> None:
    paths = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))
    assert len(paths) > len(PARTS)
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert import_module(f"deltaloom.{name}").__name__ == f"deltaloom.{name}"
