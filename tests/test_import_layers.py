"""Imports go one way: graph <- ops <- passes <- backends, models <- runtime <- cli; torch stays in backends/torch and cuda."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "graph": set(),
    "ops": {"graph"},
    "passes": {"graph", "ops"},
    "backends": {"graph", "ops", "passes"},
    "models": {"graph", "ops", "passes"},
    "runtime": {"graph", "ops", "passes", "backends", "models"},
    "cli": {"graph", "ops", "passes", "backends", "models", "runtime", "testing"},
    "testing": {"graph", "ops", "passes", "backends", "models", "runtime"},
}
TEST_LIBRARIES = {"hypothesis", "pytest", "safetensors"}
ONLY_IN = {
    "torch": ("backends/torch", "backends/cuda"),
    "triton": ("backends/cuda",),
    "transformers": ("backends/torch",),
    "onnx": ("backends/onnx", "testing"),
    "onnxruntime": ("backends/onnx", "testing"),
}
"""Libraries of extras, and where they may be imported."""


def core_libraries() -> set[str]:
    """What the core installs, by import name (the same as the distribution's name for all of them)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.split(r"[><=]", requirement)[0] for requirement in project["dependencies"]}


def imported(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Each imported dotted name with its line, and whether it is imported with the module rather than in a function.

    ``from a import b`` counts as ``a.b``; a literal name given to ``import_module`` or ``__import__`` counts as well.
    """
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                names = [str(node.args[0].value)]
        for name in names:
            yield node.lineno, name, id(node) not in inside


def faults(path: str, source: str) -> list[str]:
    """What the imports of the file at ``path`` (relative to the root) break, a sentence each."""
    found = []
    part = path.split("/")[0]
    for line, name, at_top in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        reason = None
        if name.startswith("."):
            reason = "a relative import; write deltaloom.… in full"
        elif top == "deltaloom":
            reason = inner_fault(part, rest)
        elif top in ONLY_IN:
            if not path.startswith(tuple(f"{folder}/" for folder in ONLY_IN[top])):
                reason = f"{top}, which only {' and '.join(ONLY_IN[top])} may import"
        elif top in TEST_LIBRARIES:
            if part != "testing" and at_top:
                reason = f"{top} at the top of the file, but the core installs without it"
        elif top not in sys.stdlib_module_names and top not in core_libraries():
            reason = f"{top}, which the core does not install"
        if reason:
            found.append(f"{path}:{line} imports {reason}")
    return found


def inner_fault(part: str, rest: str) -> str | None:
    target = rest.split(".")[0]
    if target == "__version__" or (part == "cli" and target not in MAY_IMPORT):
        return None
    if target not in MAY_IMPORT:
        return "names of the package itself; import them from the module that defines them"
    if target != part and target not in MAY_IMPORT[part]:
        return f"deltaloom.{target}, which is not below {part}"
    return None


FILES = sorted(path for part in MAY_IMPORT for path in (ROOT / part).rglob("*.py"))


def test_every_part_is_checked() -> None:
    linked = {path.name for path in (ROOT / "src" / "deltaloom").iterdir() if path.is_symlink()}
    assert linked == set(MAY_IMPORT)
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_respect_the_layers(part: str) -> None:
    found = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(f"{part}/"):
            found += faults(name, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path, source, fault",
    [
        ("graph/x.py", "import deltaloom.ops.norms", "deltaloom.ops, which is not below graph"),
        ("ops/x.py", "from deltaloom.passes.assign import f", "deltaloom.passes, which is not below ops"),
        ("models/x.py", "from deltaloom import backends", "deltaloom.backends, which is not below models"),
        ("backends/numpy/x.py", "from deltaloom.models import y", "deltaloom.models, which is not below backends"),
        ("runtime/x.py", "def f():\n    import deltaloom.cli.app", "deltaloom.cli, which is not below runtime"),
        ("runtime/x.py", "from deltaloom.testing import y", "deltaloom.testing, which is not below runtime"),
        ("passes/x.py", "from deltaloom import load", "names of the package itself"),
        ("ops/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", "torch, which only"),
        ("runtime/x.py", "def f():\n    from torch.nn import functional", "torch, which only backends/torch"),
        ("backends/x.py", "import importlib\nimportlib.import_module('torch.fx')", "torch, which only backends/torch"),
        ("ops/x.py", "from .norms import y", "a relative import"),
        ("ops/x.py", "import hypothesis", "hypothesis at the top of the file"),
        ("runtime/x.py", "import onnx", "onnx, which only backends/onnx and testing may import"),
        ("ops/x.py", "import scipy", "scipy, which the core does not install"),
        ("graph/x.py", "import ops", "ops, which the core does not install"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str, fault: str) -> None:
    (found,) = faults(path, source)
    assert fault in found


@pytest.mark.parametrize(
    "path, source",
    [
        ("ops/x.py", "import numpy as np\nfrom deltaloom.graph.op import Op\nfrom deltaloom.ops.norms import y"),
        ("backends/torch/x.py", "import torch\nfrom torch import nn"),
        ("ops/x.py", "def cases(draw):\n    from hypothesis import strategies"),
        ("testing/x.py", "import pytest\nfrom deltaloom.runtime.load import load"),
        ("cli/x.py", "import typer\nimport deltaloom\nfrom deltaloom import LLM, __version__"),
        ("runtime/x.py", "from importlib import import_module\nimport_module('deltaloom.backends.torch.backend')"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert faults(path, source) == []
