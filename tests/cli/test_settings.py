"""Run files, flags and where each setting comes from."""

import json
import tomllib
from pathlib import Path

import pytest

from deltaloom.cli.settings import Settings, read_run_file
from deltaloom.graph.errors import ConfigError, RequestError

FILE = """
[model]
max_model_len = 99
hf_overrides = { rope_scaling = { rope_type = "yarn", factor = 4.0 } }
[compile]
backends = ["torch", "numpy"]
prefill_chunk = 64
[compile.kernels]
linear = ["numpy"]
[sampling]
temperature = 0.5
stop = ["a", "b"]
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    return path


def test_flags_win_over_the_file_and_the_file_over_what_is_built_in(run_file: Path) -> None:
    settings = Settings({"temperature": 0.9, "backend": "numpy, torch", "seed": None, "prompt": "x", "stop": ()}, run_file)
    params, compiled = settings.sampling_params(), settings.compile_config()
    assert (params.temperature, params.stop, params.seed, params.n) == (0.9, ("a", "b"), None, 1)
    assert (compiled.backends, compiled.prefill_chunk, compiled.dtype) == (("numpy", "torch"), 64, "auto")
    assert compiled.kernels == {"linear": ("numpy",)}
    assert settings.value("model", "max_model_len") == 99
    origins = {key: settings.tables[table][key].origin for table, key in [
        ("sampling", "temperature"), ("sampling", "stop"), ("sampling", "n"), ("compile", "backends"), ("model", "model"),
    ]}  # fmt: skip
    assert origins == {
        "temperature": "flag --temperature", "stop": f"file {run_file}", "n": "built-in", "backends": "flag --backend",
        "model": "built-in",
    }  # fmt: skip


def test_a_flag_of_zero_or_false_is_given(run_file: Path) -> None:
    settings = Settings({"temperature": 0.0, "check_weights": False}, run_file)
    assert settings.sampling_params().temperature == 0
    assert settings.tables["model"]["check_weights"].origin == "flag --check-weights"


def test_the_checkpoint_fills_what_is_left_open(run_file: Path) -> None:
    bare = Settings({}, None).with_checkpoint()
    assert (bare["model"]["max_model_len"].value, bare["model"]["max_model_len"].origin) == (2048, "checkpoint's config.json")
    assert (bare["sampling"]["temperature"].value, bare["sampling"]["temperature"].origin) == (
        0.0,
        "checkpoint's generation_config.json",
    )
    assert (bare["sampling"]["top_p"].value, bare["sampling"]["top_p"].origin) == (1.0, "built-in")
    neutral = Settings({"generation_config": "none"}, run_file).with_checkpoint()
    assert neutral["sampling"]["temperature"].value == 0.5
    assert neutral["model"]["max_model_len"].origin == f"file {run_file}"


def test_what_is_printed_is_a_run_file_that_gives_the_same_settings(run_file: Path, tmp_path: Path) -> None:
    settings = Settings({"max_tokens": 7, "hf_overrides": '{"rope_theta": 5000.0}'}, run_file)
    text = settings.describe()
    assert "max_tokens = 7 " in text and "# flag --max-tokens" in text and "# seed is not set" in text
    copy = tmp_path / "copy.toml"
    copy.write_text(text)
    again = Settings({}, copy)
    assert without_comments(again.describe()) == without_comments(text)
    assert again.compile_config() == settings.compile_config()
    assert again.value("model", "hf_overrides") == {"rope_theta": 5000.0}
    assert tomllib.loads(text)["sampling"]["stop"] == ["a", "b"]


def test_everything_of_compile_comes_back_from_what_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "[compile]\n"
        'pipeline = ["canonicalise", {pass = "fuse", rules = ["packed_swiglu"], fuel = 2}, "quantise", "lift_weights"]\n'
        'quantise = {"*.o_proj" = "plain", "*" = "int8"}\nmesh = {tp = 1}\ncache = "/somewhere"\ndump = "/else"\n'
    )
    settings = Settings({"skip": "specialise", "fuel": 0, "threads": 2}, path)
    copy = tmp_path / "copy.toml"
    copy.write_text(settings.describe())
    again = Settings({}, copy).compile_config()
    assert again == settings.compile_config()
    assert list(again.policy) == [("*.o_proj", "plain"), ("*", "int8")]
    assert again.pipeline[1] == {"pass": "fuse", "rules": ["packed_swiglu"], "fuel": 2}
    assert (again.skip, again.fuel) == (("specialise",), 0)


def test_the_same_as_json_has_each_value_with_its_origin(run_file: Path) -> None:
    tables = json.loads(Settings({"fuel": 3}, run_file).describe_json())
    assert tables["compile"]["fuel"] == {"value": 3, "origin": "flag --fuel"}
    assert tables["compile"]["prefill_chunk"] == {"value": 64, "origin": f"file {run_file}"}
    assert tables["compile"]["threads"] == {"value": None, "origin": "built-in"}
    assert tables["model"]["max_model_len"] == {"value": 99, "origin": f"file {run_file}"}
    assert tables["sampling"]["top_k"]["origin"] == "built-in"


@pytest.mark.parametrize(
    ("flags", "key", "value", "origin"),
    [
        ({"skip": "fuse, fold"}, "skip", ("fuse", "fold"), "flag --skip"),
        ({"mesh": "tp=2"}, "mesh", {"tp": 2}, "flag --mesh"),
        ({"quantise": "int8"}, "quantise", "int8", "flag --quantise"),
        ({"quantise": '{"*.up_proj*": "int4", "*": "int8"}'}, "quantise", {"*.up_proj*": "int4", "*": "int8"}, "flag --quantise"),
        ({"keep_quantized": False}, "keep_quantized", False, "flag --keep-quantized"),
        ({"cache": "/x"}, "cache", "/x", "flag --cache"),
        ({"no_cache": True}, "cache", "off", "flag --no-cache"),
        ({"no_cache": False}, "cache", "off", "built-in"),
        ({"fuel": 0}, "fuel", 0, "flag --fuel"),
    ],
)
def test_flags_of_the_compiler(flags: dict[str, object], key: str, value: object, origin: str) -> None:
    settings = Settings(flags, None)
    assert (settings.tables["compile"][key].value, settings.tables["compile"][key].origin) == (value, origin)
    assert getattr(settings.compile_config(), key) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mesh": "tp"}, "--mesh is 'tp', expected an axis and its number of ranks"),
        ({"mesh": "tp=two"}, "--mesh is 'tp=two'"),
        ({"mesh": "tp=99999999999999999999"}, "--mesh is"),
        ({"quantise": "{"}, "--quantise is not valid JSON"),
        ({"quantise": '{"a": 1}'}, r"quantise has \('a', 1\)"),
        ({"skip": "fuze"}, "skip names 'fuze', which is not in the pipeline; did you mean 'fuse'"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(flags, None).compile_config()


def without_comments(text: str) -> list[str]:
    return [line.split(" #")[0].rstrip() for line in text.splitlines()]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[serve]\nport = 1", r"unknown table \[serve\]; known are model, compile, sampling"),
        ("port = 1", r"unknown table \[port\]"),
        ("model = 1", r"model is 1, expected a table \[model\]"),
        ("[model]\nmodle = 'x'", r"\[model\] has an unknown key 'modle'; did you mean 'model'"),
        ("[model]\nmax_batch = '8'", "max_batch is '8', expected a whole number"),
        ("[model]\nmax_batch = true", "max_batch is True, expected a whole number"),
        ("[compile]\nbackend = 'numpy'", r"\[compile\] has an unknown key 'backend'; did you mean 'backends'"),
        ("[compile]\nthreads = 'two'", r"\[compile\]: threads is 'two', expected a whole number"),
        ("[sampling]\ntemprature = 1", r"\[sampling\] has an unknown key 'temprature'; did you mean 'temperature'"),
        ("[sampling]\ntemperature = -1", "temperature is -1.0; it must be"),
        ("[sampling", "cannot be read as TOML"),
        ("[compiler]\ndtype = 'x'", r"unknown table \[compiler\]; did you mean 'compile'"),
        ("[compile]\npipeline = ['lift_weights']", "pass 'lift_weights' requires 'canonical'"),
        ("[compile]\npipeline = ['canonicalise', {rules = []}]", "does not name its pass"),
        ("[compile]\nquantise = {a = 1}", "quantise has .'a', 1."),
        ("[compile]\nmesh = {tp = '2'}", "mesh is .*, expected a table of axis = ranks"),
    ],
)
def test_a_bad_run_file_is_a_sentence_with_its_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_run_file(path)
    assert str(path) in str(caught.value)


def test_the_run_file_in_the_readme_is_one(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "run.toml"
    path.write_text(readme.split("```toml\n")[1].split("```")[0])
    settings = Settings({}, path)
    assert settings.compile_config().backends == ("torch", "numpy")
    assert {setting.origin for table in settings.tables.values() for setting in table.values()} == {"built-in", f"file {path}"}


def test_unreadable_run_files_and_flags_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read_run_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_run_file(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[model]\nmodel = '\xe9'")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_run_file(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="--hf-overrides is not valid JSON"):
        Settings({"hf_overrides": "{"}, None)
    with pytest.raises(ConfigError, match="--hf-overrides: hf_overrides is 3, expected a table"):
        Settings({"hf_overrides": json.dumps(3)}, None)
    with pytest.raises(ConfigError, match="backends names numpy twice"):
        Settings({"backend": "numpy,numpy"}, None).compile_config()
    with pytest.raises(RequestError, match="top_p is 2.0"):
        Settings({"top_p": 2.0}, None).sampling_params()


def test_values_nested_too_deep_are_sentences(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deep"):
        read_run_file(path)
    with pytest.raises(ConfigError, match="--hf-overrides is nested too deep"):
        Settings({"hf_overrides": "[" * 100_000}, None)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"max_model_len": 0}, "max_model_len is 0, expected at least 1"),
        ({"generation_config": "x"}, "generation_config is 'x', expected 'auto' or 'none'"),
        ({"backend": "nosuch"}, "there is no backend 'nosuch'"),
    ],
)
def test_settings_that_loading_would_refuse_are_not_printed(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(flags, None).describe()
