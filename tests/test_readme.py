"""What the documents tell a reader to type works, and prints what they say; so do the examples.

Every ``bash`` and ``python`` block of README.md and of the pages in docs/ is run. A block that is not says why in a comment
right above it: ``<!-- not run: reason -->``. In CONTRIBUTING.md only blocks below ``<!-- run -->`` are run. The lines of a ``text``
block right after a block that was run must occur in its output, in that order.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {"bash", "python", "text", "toml"}
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, what it holds, the comment above it and the output that the page promises."""

    place: str
    language: str
    body: str
    comment: str
    promised: tuple[str, ...]


def blocks(page: str, text: str) -> list[Block]:
    found = []
    matches = list(FENCE.finditer(text))
    for number, match in enumerate(matches):
        above = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
        comment = re.fullmatch(r"<!-- (.*) -->", above)
        promised: tuple[str, ...] = ()
        if number + 1 < len(matches):
            after = matches[number + 1]
            if after["language"] == "text" and not text[match.end() : after.start()].strip():
                promised = tuple(line.strip() for line in after["body"].splitlines() if line.strip())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(f"{page}:{line}", match["language"], match["body"], comment[1] if comment else "", promised))
    return found


def page_blocks(page: str) -> list[Block]:
    return blocks(page, (ROOT / page).read_text(encoding="utf-8"))


def to_run() -> list[Block]:
    documents = ("README.md", "docs/architecture.md", "docs/configuration.md", "docs/onnx.md", "docs/quantization.md")
    pages = [block for page in documents for block in page_blocks(page)]
    chosen = [block for block in pages if not block.comment.startswith("not run: ")]
    chosen += [block for block in page_blocks("CONTRIBUTING.md") if block.comment == "run"]
    return [block for block in chosen if block.language in ("bash", "python")]


def check(command: list[str], home: Path, promised: tuple[str, ...] = ()) -> None:
    """Run ``command`` at the root with an empty home; it must succeed and print ``promised``, in order."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = os.environ | {"PATH": path, "HOME": str(home), "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    rest = result.stdout
    for line in promised:
        assert line in rest, f"{line!r} is promised, but the output is\n{result.stdout}"
        rest = rest.split(line, 1)[1]


@pytest.mark.parametrize("block", to_run(), ids=lambda block: block.place)
def test_a_block_runs_and_prints_what_the_page_says(block: Block, tmp_path: Path) -> None:
    shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    check([*shell, block.body], tmp_path, block.promised)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    check([sys.executable, str(example)], tmp_path)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/configuration.md"])
def test_every_block_says_its_language_and_none_is_left_out_without_a_reason(page: str) -> None:
    found = page_blocks(page)
    assert found
    for block in found:
        assert block.language in LANGUAGES, f"{block.place}: {block.language!r} is not one of {sorted(LANGUAGES)}"
        assert not re.fullmatch(r"not run:?\s*", block.comment), f"{block.place}: say why it is not run"


def test_the_two_commands_that_the_readme_begins_with_are_run_by_the_check() -> None:
    check_lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    first = page_blocks("README.md")[0].body
    commands = [line.split("#")[0].strip() for line in first.splitlines() if line.startswith("make ")]
    assert commands == ["make demo", "make test"]
    assert set(commands) <= set(check_lines)


def test_blocks_are_found_with_their_comment_and_promise() -> None:
    text = "a\n\n<!-- not run: slow -->\n```bash\nls\n```\n\n```python\nprint(1)\n```\n\n```text\n1\n\n  2\n```\n"
    shell, code, output = blocks("p", text)
    assert (shell.place, shell.language, shell.body, shell.comment) == ("p:4", "bash", "ls\n", "not run: slow")
    assert (code.comment, code.promised) == ("", ("1", "2"))
    assert (output.language, output.promised) == ("text", ())


def test_a_broken_promise_is_seen(tmp_path: Path) -> None:
    check([sys.executable, "-c", "print('a'); print('b')"], tmp_path, ("a", "b"))
    with pytest.raises(AssertionError, match="'a' is promised"):
        check([sys.executable, "-c", "print('a'); print('b')"], tmp_path, ("b", "a"))
    with pytest.raises(AssertionError, match="no good"):
        check([sys.executable, "-c", "raise SystemExit('no good')"], tmp_path)
