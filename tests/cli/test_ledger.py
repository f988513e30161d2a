"""``inspect --ledger``, ``--explain-miss`` and the flags of the compile cache, as a user runs them."""

import json
import os
from pathlib import Path

import pytest

from deltaloom.cli.app import run
from deltaloom.cli.ledger import change, ledger_text, table
from deltaloom.passes.pipeline import Event, LedgerRow

CONFIG = Path(__file__).parents[1] / "models" / "config_80b.json"


def test_a_table_has_a_line_a_pass_and_what_all_of_them_did() -> None:
    rows = [
        LedgerRow("one", {"top": 3, "layer": 9}, {"top": 3, "layer": 7}, 0.5),
        LedgerRow("two", {"top": 3}, {"top": 4, "new": 1}, 0.25),
    ]
    assert [line.split() for line in table(rows).splitlines()] == [
        ["top", "layer", "new", "ms"],
        ["one", "3", "9", "->", "7", "-", "500"],
        ["two", "3", "->", "4", "-", "-", "->", "1", "250"],
        ["in", "all", "3", "->", "4", "9", "->", "-", "-", "->", "1", "750"],
    ]
    assert (change(2, 2), change(2, 3), change(None, None)) == ("2", "2 -> 3", "-")


def test_rules_are_counted_and_refusals_shown_once() -> None:
    hit = Event("hit", "rule", "layer", "a", "replaced 3 nodes")
    refused = [Event("refused", "rule", "layer", name, "it is used twice") for name in "bc"]
    text = ledger_text({"shared": [LedgerRow("fuse", {"layer": 9}, {"layer": 7}, 0.0, (hit, hit, *refused))]})
    assert "rule  layer  2 times" in text
    assert text.count("it is used twice") == 1 and "refused" in text
    assert "did not apply" not in ledger_text({"shared": []}) and "of CPU" in ledger_text({"shared": []})


def test_the_ledger_of_a_config_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG.read_bytes())
    assert run(["inspect", str(tmp_path), "--ledger", "--json"]) == 0
    folder = json.loads(capsys.readouterr().out)["parts"]
    assert run(["inspect", str(CONFIG), "--ledger"]) == 0
    text = capsys.readouterr().out
    decode = folder["decode -> last_logits"][-1]["after"]
    assert decode["linear_layer"] <= 8 and decode["attention_layer"] <= 9
    assert folder["shared"][0]["before"]["linear_layer"] > 500
    for title in ("shared:", "prefill -> last_logits:", "decode -> last_logits:", "rewrites:"):
        assert title in text
    (lifted,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["lift_weights"]]
    assert int(lifted[lifted.index("->", 4) + 1]) <= 9, "the body of a layer, after its weights have left it"


def test_passes_left_out_are_not_in_the_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--ledger", "--skip", "fuse,border_fusion"]) == 0
    first = capsys.readouterr().out.split("\n\n")[0]
    assert "pack_siblings" in first and "fuse" not in first and "border_fusion" not in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--ledger", "--graph"], "--graph and --ledger exclude each other"),
        (["inspect", "--explain-miss", "--json"], "--json and --explain-miss exclude each other"),
        (["inspect", "--mesh", "tp=3"], "4 query heads cannot be divided over tp = 3"),
        (["inspect", "nowhere.json"], "nowhere.json"),
        (["generate", "x", "--skip", "lift_weights"], "run lift_weights before it"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_cannot_be_loaded_on_several_ranks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[compile]\nmesh = {tp = 2}\n")
    assert run(["generate", "x", "--config", str(path)]) == 2
    assert "mesh tp=2 divides the model over several ranks" in capsys.readouterr().err


def test_the_cache_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    ask = ["generate", "--chat", "What is the capital of France?", "--cache", str(folder)]
    explain = ["inspect", "--explain-miss", "--cache", str(folder)]
    assert run(explain) == 0 and "has no entry of that kind" in capsys.readouterr().out
    assert not folder.exists()
    for _ in range(2):
        assert run(ask) == 0
        said = capsys.readouterr()
        assert said.out == "The capital of France is Paris.\n" and said.err == ""
    assert run(explain) == 0 and "hit: it is in" in capsys.readouterr().out
    assert run([*explain, "--fuel", "1"]) == 0 and "  compile.fuel: null -> 1" in capsys.readouterr().out
    for path in folder.glob("*.program"):
        path.write_bytes(path.read_bytes()[:-10])
    assert run(ask) == 0
    said = capsys.readouterr()
    assert said.out == "The capital of France is Paris.\n"
    lines = said.err.splitlines()
    assert lines and all(line.startswith("deltaloom: the cache entry ") and line.endswith("compiling instead") for line in lines)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run([*ask, "--no-cache"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_an_open_folder_is_refused_with_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert run(["generate", "x", "--cache", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is open to other users (mode 777, expected 700)" in said and "--no-cache" in said


def test_doctor_says_what_is_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deltaloom.cli.doctor import compile_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert dict(compile_cache())["entries"].startswith("0, ")
    assert "not there yet" in dict(compile_cache())["folder"]
    (tmp_path / "deltaloom").mkdir()
    os.chmod(tmp_path / "deltaloom", 0o755)
    assert "is open to other users" in dict(compile_cache())["cannot be used"]
