"""The example plugins, built and installed beside deltaloom in a clean environment: listed, asked about, checked, used, removed."""

import json
import re

import pytest
from plugins.environment import EXAMPLES, PARTS, ROOT, Environment, example, installed

GOLDEN = example("deltaloom-qwen3-5") / "tests" / "golden"
GREEDY = [130, 48, 21, 236, 84, 68, 44, 123, 48, 100, 50, 248, 177, 127, 180, 135]
"""What transformers continues "Once upon a time" with (``greedy.continuation`` of the golden file)."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return installed(tmp_path_factory.mktemp("good"), ["deltaloom-kda", "deltaloom-qwen3-5"])


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return installed(tmp_path_factory.mktemp("broken"), ["deltaloom-kda", "deltaloom-broken"])


def listed(environment: Environment, **variables: str) -> dict[str, dict[str, object]]:
    """``plugins list --json`` by plugin."""
    done = environment.deltaloom("plugins", "list", "--json", **variables)
    assert done.returncode == 0, done.stderr
    return {entry["name"]: entry for entry in json.loads(done.stdout)["plugins"]}


def test_the_folders_are_whole() -> None:
    """Every example is a distribution of its own, and its plugins are what its pyproject.toml says."""
    for folder in sorted(path for path in EXAMPLES.iterdir() if (path / "pyproject.toml").is_file()):
        assert (folder / "README.md").is_file() and list((folder / "src").glob("*/__init__.py")), folder


def test_nothing_of_the_core_knows_the_examples() -> None:
    modules = [path.parent.name for path in EXAMPLES.glob("*/src/*/__init__.py")]
    assert len(modules) >= 3
    pattern = re.compile("|".join(modules))
    found = [str(path) for part in (*PARTS, "src") for path in (ROOT / part).rglob("*.py") if pattern.search(path.read_text())]
    assert not found


def test_the_list_reads_metadata_only(good: Environment) -> None:
    plugins = listed(good)
    assert set(plugins) == {"kda", "qwen3_5"}
    assert plugins["kda"]["distribution"] == "deltaloom-kda" and plugins["kda"]["distribution_version"] == "0.1.0"
    seen = "import sys; sys.argv = ['deltaloom', 'plugins', 'list']\n"
    seen += "from deltaloom.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
    seen += "print([name for name in sys.modules if name.startswith(('deltaloom_', 'torch'))])"
    assert good.check("-c", seen).splitlines()[-1] == "[]"


def test_info_names_what_a_plugin_offers_and_all_of_it_loads(good: Environment) -> None:
    done = good.deltaloom("plugins", "info", "kda", "--load", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)["offers"]
    assert {(offer["kind"], offer["name"]) for offer in found} == {
        ("ops", "kda.decay"),
        ("ops", "kda.delta_attention"),
        ("ops", "kda.normed_delta_attention"),
        ("kernels", "numpy"),
        ("kernels", "torch"),
        ("rules", "kda.fuse_norms"),
    }
    assert all(offer["usable"] for offer in found)


def test_a_quick_check_passes(good: Environment) -> None:
    """With few cases; the tests marked slow draw many."""
    done = good.deltaloom("plugins", "check", "kda", "--examples", "2", "--backends", "numpy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_layer_of_the_op_runs_on_two_backends(good: Environment) -> None:
    said = good.check(str(good.tree("deltaloom-kda") / "example.py"))
    assert "kda.normed_delta_attention on numpy.kda.normed_step" in said
    assert "kda.delta_attention on torch.kda.delta_attention" in said


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_checkpoint_of_the_family_generates_what_transformers_does(good: Environment, backend: str) -> None:
    arguments = ("--model", str(GOLDEN), "--backend", backend, "--temperature", "0", "--max-tokens", "16", "--ignore-eos", "--json")
    done = good.deltaloom("generate", "Once upon a time", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["token_ids"] == GREEDY


def test_the_family_agrees_with_transformers_as_installed(good: Environment) -> None:
    tests = good.tree("deltaloom-qwen3-5") / "tests" / "test_golden.py"
    said = good.check("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))
    assert "passed" in said and "skipped" not in said


def test_removed_plugins_are_gone(good: Environment) -> None:
    """After the tests above, as the last of those that use this environment."""
    good.uninstall("deltaloom-kda", "deltaloom-qwen3-5")
    assert listed(good) == {}
    done = good.deltaloom("generate", "Once", "--model", str(GOLDEN))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "qwen3_5_text" in done.stderr and "qwen3_next" in done.stderr


MESSAGES = {
    "broken_import": "deltaloom_no_such_package",
    "broken_target": "no_such_name",
    "broken_type": "tuple",
    "broken_future": "99.0",
    "broken_name": "linear",
    "broken_path": "NoSuchClass",
}
"""What the message about each broken plugin names."""


def test_broken_plugins_do_not_stop_the_list(broken: Environment) -> None:
    assert set(listed(broken)) == {"kda", "broken_kernel", "broken_clash", "broken_clash_too", *MESSAGES}


@pytest.mark.parametrize("plugin", MESSAGES)
def test_a_broken_plugin_is_told_in_a_sentence(broken: Environment, plugin: str) -> None:
    done = broken.deltaloom("plugins", "info", plugin, "--load")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    for word in (plugin, "deltaloom-broken", MESSAGES[plugin]):
        assert word in said, said


def test_a_broken_plugin_cannot_be_checked(broken: Environment) -> None:
    done = broken.deltaloom("plugins", "check", "broken_future")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "needs plugin API 99.0" in done.stderr


def test_a_broken_plugin_that_nobody_asks_for_is_a_line_on_the_side(broken: Environment) -> None:
    done = broken.deltaloom("generate", "Once", "--model", "tiny-next", "--backend", "numpy", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for plugin in ("broken_import", "broken_target", "broken_type", "broken_future", "broken_name"):
        assert len([line for line in lines if f"'{plugin}'" in line]) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_two_plugins_offer_is_an_error_that_names_both(broken: Environment) -> None:
    done = broken.deltaloom("generate", "Once", "--model", "tiny-next", "--backend", "broken_twin", "--max-tokens", "2")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "'broken_clash'" in done.stderr and "'broken_clash_too'" in done.stderr


def test_chosen_plugins_are_the_only_ones(broken: Environment) -> None:
    asked = ("generate", "Once", "--model", "tiny-next", "--backend", "numpy", "--max-tokens", "2")
    for chosen in ("kda", "none"):
        done = broken.deltaloom(*asked, DELTALOOM_PLUGINS=chosen)
        assert done.returncode == 0 and "broken" not in done.stderr
    done = broken.deltaloom(*asked, DELTALOOM_PLUGINS="kda,broken_import", DELTALOOM_PLUGINS_STRICT="1")
    assert done.returncode == 2 and "deltaloom_no_such_package" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_kernel_fails_its_check(broken: Environment) -> None:
    done = broken.deltaloom("plugins", "check", "broken_kernel")
    assert done.returncode == 1, done.stderr
    assert "FAILED kernel numpy.broken_kernel.twice" in done.stdout and "from the float64 reference" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["kda", "qwen3_5"])
def test_the_whole_check_passes(tmp_path_factory: pytest.TempPathFactory, plugin: str) -> None:
    environment = installed(tmp_path_factory.mktemp("checked"), ["deltaloom-kda", "deltaloom-qwen3-5"])
    done = environment.deltaloom("plugins", "check", plugin)
    assert done.returncode == 0, done.stdout + done.stderr
