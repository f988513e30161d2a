"""The commands as a user runs them: a process, its output, its exit code; never a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltaloom.cli import app
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1", "COLUMNS": "100"}
COMMAND = [sys.executable, "-m", "deltaloom"]
PARIS = "The capital of France is Paris."


def deltaloom(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*COMMAND, *arguments], input=text, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result


def shown(*arguments: str, text: str | None = None) -> str:
    result = deltaloom(*arguments, text=text)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refused(*arguments: str, text: str | None = None) -> str:
    result = deltaloom(*arguments, text=text)
    assert (result.returncode, result.stdout) == (2, "")
    return result.stderr


def test_generate_answers_and_its_output_is_plain() -> None:
    assert shown("generate", "--chat", "What is the capital of France?") == f"{PARIS}\n"
    asked = shown("generate", "--chat", "--no-stream", "-", text="What is the capital of France?\n")
    assert asked == f"{PARIS}\n"


def test_generate_gives_json() -> None:
    output = shown("generate", "Once upon a time", "--json", "--max_tokens=5", "--n", "2", "--seed", "4", "--temperature", "1",
                   "--logprobs", "1")  # fmt: skip
    found = json.loads(output)
    assert output.count("\n") == 1
    assert (found["model"], found["prompt"], found["seed"]) == ("tiny-next", "Once upon a time", 4)
    assert [entry["index"] for entry in found["outputs"]] == [0, 1]
    assert {entry["finish_reason"] for entry in found["outputs"]} == {"length"}
    assert all(len(entry["token_ids"]) == len(entry["logprobs"]) == 5 for entry in found["outputs"])
    assert found["metrics"]["prompt_tokens"] == len(found["prompt_token_ids"]) and found["metrics"]["generated_tokens"] == 10


def test_samples_are_numbered_and_underscores_are_dashes() -> None:
    arguments = ["generate", "Once upon a time", "--temperature", "1", "--seed", "4", "--n", "2"]
    first = shown(*arguments, "--max-tokens", "5")
    assert [line[:3] for line in first.splitlines()] == ["[0]", "[1]"]
    assert shown(*arguments, "--max_tokens", "5") == first


def test_a_run_file_is_used_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[compile]\nbackends = ["numpy"]\n[sampling]\nstop = ["France"]\n')
    output = shown("generate", "--chat", "What is the capital of France?", "--config", str(path))
    assert output == "The capital of \n"
    settings = shown("generate", "--print-config", "--config", str(path), "--top-p", "0.5")
    assert 'stop = ["France"]' in settings and "# flag --top-p" in settings and "# checkpoint" in settings
    assert shown("chat", "--print-config", "--seed", "3", text="").splitlines()[0] == "[model]"


def test_chat_remembers_resets_and_ends_with_its_input() -> None:
    lines = "My name is Ada.\n\nWhat is my name?\n/reset\nWhat is the capital of France?\n/exit\nignored\n"
    result = deltaloom("chat", text=lines)
    assert (result.returncode, result.stderr) == (0, "")
    answers = result.stdout.splitlines()
    assert len(answers) == 3 and answers[2] == PARIS
    unknown = deltaloom("chat", text="/help")
    assert (unknown.returncode, unknown.stdout) == (0, "")
    assert unknown.stderr == "there is no command /help; /reset forgets the conversation, /exit leaves.\n"


def test_chat_from_a_pipe_fails_on_what_does_not_fit() -> None:
    result = deltaloom("chat", "--max-model-len", "40", text="word " * 60)
    assert result.returncode == 2 and "maximum context length is 40" in result.stderr


def test_torch_is_a_flag_away() -> None:
    pytest.importorskip("torch")
    arguments = ["generate", "--chat", "What is the capital of France?", "--threads", "1", "--backend"]
    assert shown(*arguments, "torch") == shown(*arguments, "torch,numpy") == f"{PARIS}\n"


def test_ops_lists_the_registry_and_shows_one_op() -> None:
    table = shown("ops")
    (line,) = [line for line in table.splitlines() if line.startswith("gated_delta_rule ")]
    assert line.split()[1] == "x" and "numpy" in table.splitlines()[0]
    one = shown("ops", "gated_delta_rule")
    assert "numpy.delta_step" in one and "version" in one


def test_doctor_checks_the_installation() -> None:
    output = shown("doctor")
    assert re.search(r"deltaloom +0\.1\.0", output)
    assert "  numpy     ok, on cpu" in output and "'The opposite of hot is cold.'" in output


def test_help_and_version() -> None:
    assert shown("--version") == "deltaloom 0.1.0\n"
    assert "--presence-penalty" in shown("generate", "--help")
    bare = deltaloom()
    assert bare.returncode == 2 and "Usage: deltaloom" in bare.stderr + bare.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "there is no prompt"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "a", "--model", "nowhere"], "'nowhere' is neither a folder nor a bundled name"),
        (["generate", "a", "--backend", "tpu"], "there is no backend 'tpu'; known are numpy"),
        (["generate", "a", "--dtype", "int3"], "not in 'int3'"),
        (["generate", "a", "--device", "cuda"], "runs on the device 'cpu', not on 'cuda'"),
        (["generate", "a", "--threads", "0"], "threads is 0"),
        (["generate", "a", "--max-model-len", "0"], "max_model_len is 0"),
        (["generate", "word " * 3000], "maximum context length is 2048"),
        (["generate", "a", "--temperature", "-1"], "temperature is -1.0; it must be"),
        (["generate", "a", "--temperature", "warm"], "Invalid value for '--temperature'"),
        (["generate", "a", "--top-p", "nan"], "top_p is nan"),
        (["generate", "a", "--n", "0"], "n is 0; it must be from 1"),
        (["generate", "a", "--max-tokens", "0"], "max_tokens is 0; it must be at least 1"),
        (["generate", "a", "--stop", ""], "stop is"),
        (["generate", "a", "--stream", "--json"], "--stream and --json exclude each other"),
        (["generate", "a", "--stream", "--n", "2"], "--stream shows one sample"),
        (["generate", "a", "--logprobs", "2"], "--logprobs needs --json"),
        (["generate", "a", "--system", "b"], "--system is given without --chat"),
        (["generate", "a", "--generation-config", "x"], "generation_config is 'x'"),
        (["generate", "a", "--hf-overrides", '{"hidden": 1}'], "'hidden' is not a field of qwen3_next"),
        (["generate", "a", "--max-tokns", "3"], "No such option: --max-tokns"),
        (["generate", "a", "b"], "unexpected extra argument"),
        (["inspect", "--dot", "--graph"], "--graph and --dot exclude each other"),
        (["inspect", "nowhere"], "'nowhere' is neither"),
        (["ops", "lineer"], "there is no op 'lineer'; did you mean linear"),
        (["sing"], "No such command 'sing'"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("deltaloom: ") and message in output.err


def test_a_mistake_in_a_process() -> None:
    message = refused("generate", "a", "--config", "none.toml")
    assert message == "deltaloom: none.toml: there is no such file (--config)\n"


@pytest.mark.parametrize("arguments", [["generate", "-"], ["chat"]])
def test_input_that_is_not_text_is_a_sentence(arguments: list[str]) -> None:
    strict = ENVIRONMENT | {"PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run([*COMMAND, *arguments], input=b"a\xff", capture_output=True, check=False, env=strict, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith(b"deltaloom: standard input is not UTF-8 text")
    escaped = ENVIRONMENT | {"PYTHONIOENCODING": "utf-8:surrogateescape"}
    result = subprocess.run([*COMMAND, *arguments], input=b"a\xff", capture_output=True, check=False, env=escaped, timeout=60)
    assert result.returncode == 2 and b"not valid Unicode" in result.stderr


def test_notes_of_an_error_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("it is wrong")
    error.add_note("seen in a.toml")

    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("deltaloom.cli.settings.Settings", fails)
    assert app.run(["generate", "a"]) == 2
    assert capsys.readouterr().err == "deltaloom: it is wrong\nseen in a.toml\n"


def test_interrupt_ends_with_130() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "Once", "--ignore-eos", "--max-model-len", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "Once", "--ignore-eos", "--max-model-len", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    started = time.monotonic()
    assert process.wait(timeout=60) == 141 and time.monotonic() - started < 30
    assert process.stderr.read() == ""


def test_columns_are_aligned() -> None:
    assert columns([("a", "bb"), ("ccc", "d")], indent=" ") == " a    bb\n ccc  d"


@pytest.mark.skipif(os.name != "posix", reason="closes streams with the shell")
@pytest.mark.parametrize(
    "line, code, message",
    [
        ("generate - <&-", 2, "the prompt is empty"),
        ("chat --max-tokens 1 <&-", 0, ""),
        ("ops add >&-", 0, ""),
        ("ops add >/dev/full", 2, "standard output cannot be written: No space left on device"),
    ],
)
def test_closed_and_full_streams_are_no_traceback(line: str, code: int, message: str) -> None:
    command = f"{sys.executable} -m deltaloom {line}"
    result = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120
    )
    assert result.returncode == code and message in result.stderr and "Traceback" not in result.stderr


def test_a_torch_that_cannot_be_imported_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    settings = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"}
    result = subprocess.run(
        [*COMMAND, "generate", "a", "--max-tokens", "1", "--backend", "torch"],
        capture_output=True, text=True, check=False, env=settings, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2 and "broken on purpose" in result.stderr and result.stderr.count("\n") == 1
