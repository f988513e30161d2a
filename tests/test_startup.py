"""Starting is cheap: what a bare import, `--version` and a run on NumPy may bring in."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["torch", "jinja2", "rich", "typer", "networkx", "tokenizers", "safetensors", "ml_dtypes", "numpy"]
DEMO = """
import sys
from deltaloom.__main__ import main
argv, sys.argv = sys.argv, ["deltaloom", "generate", "--chat", "What is the capital of France?"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop
sys.argv = argv
"""
AFTER = "import sys\nprint(sorted(set(sys.argv[1:]) & set(sys.modules)), file=sys.stderr)"


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter; the last line of its standard error lists the heavy modules then loaded."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", f"{code}\n{AFTER}", *HEAVY]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)


def loaded(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.splitlines()[-1]


def test_the_list_of_loaded_modules_is_seen() -> None:
    assert loaded(run("import numpy")) == "['numpy']"


def test_import_deltaloom_brings_in_no_library() -> None:
    assert loaded(run("import deltaloom")) == "[]"


def test_version_is_answered_before_any_library_is_imported() -> None:
    code = "import sys\nargv, sys.argv = sys.argv, ['deltaloom', '--version']\n"
    result = run(code + "from deltaloom.__main__ import main\nmain()\nsys.argv = argv")
    assert result.stdout == "deltaloom 0.1.0\n"
    assert loaded(result) == "[]"


def test_a_run_on_numpy_does_not_import_torch() -> None:
    result = run(DEMO)
    assert "Paris" in result.stdout
    assert "'numpy'" in loaded(result) and "torch" not in loaded(result)


def test_looking_at_a_model_imports_what_it_needs() -> None:
    for command in ('"inspect"', '"explain", "--program", "decode"', '"diff", "fold", "fuse"', '"source", "decode"'):
        code = f"import sys\nargv, sys.argv = sys.argv, ['deltaloom', {command}]\nfrom deltaloom.__main__ import main\n"
        result = run(f"{code}try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop\nsys.argv = argv")
        assert loaded(result) == "['ml_dtypes', 'numpy', 'typer']", command
