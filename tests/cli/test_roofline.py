"""``deltaloom roofline`` as a user runs it: text, JSON, the plot, the kept profile, and mistakes."""

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from deltaloom.cli import app
from deltaloom.cli.output import quantity
from deltaloom.cli.roofline import duration
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime import device_limits
from deltaloom.runtime.device_profile import DeviceProfile

CONFIG_80B = Path(__file__).resolve().parents[1] / "models" / "config_80b.json"
PROFILE = {"name": "even", "bandwidth": 40e9, "flops": {"float32": 160e9}, "dispatch": 1e-6}


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = app.run(["roofline", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_predicted_and_measured_stand_side_by_side(capsys: pytest.CaptureFixture[str], profile: str) -> None:
    code, out, err = run(capsys, "--profile", profile, "--context", "64", "--repetitions", "1")
    assert (code, err) == (0, "")
    facts = dict(line.split(None, 1) for line in out.splitlines()[:7] if line)
    assert facts["step"] == "decode of 1 token after 64, 1 sequence"
    assert facts["device"].startswith("even: 40 GB/s, float32 160 GFLOP/s, 1 us a kernel (")
    assert "linear_layer, 6 times" in out and "attention_layer, 2 times" in out
    header = next(line for line in out.splitlines() if line.lstrip().startswith("op "))
    assert header.split()[-1] == "share" and "at least" in header and "takes" in header


def test_the_80b_is_predicted_from_its_config(capsys: pytest.CaptureFixture[str], profile: str) -> None:
    code, out, _ = run(capsys, CONFIG_80B, "--profile", profile, "--json", "--context", "128")
    found = json.loads(out)
    assert (found["format"], found["version"]) == ("deltaloom.roofline", 1)
    assert code == 0 and found["total"]["layers"] == 48 and found["total"]["seconds"] is None
    assert found["total"]["floor"] == pytest.approx(0.335 * 43 / 40, rel=0.01)  # 335 ms at 43 GB/s
    assert found["total"]["bytes"] == sum(row["bytes"] for row in found["rows"])
    assert found["total"]["flops"] == sum(row["flops"] for row in found["rows"])
    assert found["total"]["kernels"] == sum(row["calls"] * len(row["nodes"]) for row in found["rows"])


def test_a_rank_has_about_half_the_work(capsys: pytest.CaptureFixture[str], profile: str) -> None:
    whole, half = (
        json.loads(run(capsys, CONFIG_80B, "--profile", profile, "--json", *mesh)[1])["total"] for mesh in ((), ("--mesh", "tp=2"))
    )
    assert 0.5 < half["bytes"] / whole["bytes"] < 0.55 and half["seconds"] is None


def test_weights_are_not_run_when_only_the_prediction_is_asked_for(capsys: pytest.CaptureFixture[str], profile: str) -> None:
    _, out, _ = run(capsys, "--profile", profile, "--predicted", "--json", "--program", "prefill", "--tokens", "40", "--batch", "2")
    found = json.loads(out)
    assert found["step"] == {"kind": "prefill", "batch": 2, "tokens": 40, "context": 0}
    assert all(row["seconds"] is None for row in found["rows"])


@pytest.mark.parametrize("flags", [(), ("--predicted",)])
def test_the_plot_is_a_drawing_with_a_dot_for_each_op(
    capsys: pytest.CaptureFixture[str], profile: str, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    file = tmp_path / "plot.svg"
    _, out, _ = run(capsys, "--profile", profile, "--svg", file, "--json", *flags)
    drawn = [row for row in json.loads(out)["rows"] if row["flops"]]
    name = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(file.read_text())
    circles = list(root.iter(f"{name}circle"))
    assert len(circles) == len(drawn) and len(list(root.iter(f"{name}polyline"))) == 1
    assert {circle.get("fill") == "none" for circle in circles} == {bool(flags)}
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for circle in circles:
        assert 0 < float(circle.get("cx", "")) < width and 0 < float(circle.get("cy", "")) < height
    assert "prefers-color-scheme: dark" in file.read_text()


def test_the_device_is_measured_once(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(config: CompileConfig, dtypes: tuple[object, ...]) -> DeviceProfile:
        measured.append(config.backends[0])
        return DeviceProfile("new", 1e10, {"float32": 1e11}, 0.0, "measured")

    monkeypatch.setattr(device_limits, "measured_profile", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for flags in ((), (), ("--measure",), ("--no-cache",), ("--cache", str(tmp_path / "other"))):
        assert run(capsys, "--predicted", *flags)[0] == 0
    assert len(measured) == 4
    assert sorted(path.suffix for path in (tmp_path / "deltaloom").iterdir()) == [".profile"]
    os.chmod(tmp_path / "deltaloom", 0o755)
    code, _, err = run(capsys, "--predicted")
    assert code == 0 and err.startswith("deltaloom: the device's profile is not kept: the cache folder") and len(measured) == 5


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--program", "train"), "--program is 'train', expected prefill or decode"),
        (("--tokens", "2"), "tokens is 2, and a decode step takes 1"),
        (("--program", "prefill", "--tokens", "0"), "tokens is 0, expected at least 1"),
        (("--profile", "h200", "--measure"), "--profile and --measure exclude each other"),
        (("--profile", "/no/such/file"), "no device profile '/no/such/file'"),
        (("--predicted", "--repetitions", "3"), "--repetitions needs a run"),
        (("--profile", "h200", "--repetitions", "0"), "repetitions is 0"),
        (("--profile", "h200", "--context", "5000"), "maximum context length of 2048"),
        (("--profile", "h200", "--predicted", "--svg", "/no/such/folder/plot.svg"), "the plot cannot be written"),
        (("--profile", "h200", "--predicted", "--dtype", "float64"), "has no flops for float64"),
        (("--cache", "/", "--predicted"), "the cache folder /"),
    ],
)
def test_mistakes_are_sentences(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("deltaloom: ") and sentence in err


def test_numbers_are_short() -> None:
    assert [quantity(x, "B") for x in (0, 999, 1000, 38.64e9, 1.46e15)] == ["0 B", "999 B", "1 kB", "38.6 GB", "1.46 PB"]
    assert [duration(x) for x in (2.0, 0.0115, 1.5e-6)] == ["2 s", "11.5 ms", "1.5 us"]
