"""Finding plugins: what is read, what is imported and when, and what is said of those that cannot be used."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from plugins.distributions import Site

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom import CompileConfig, Plugin
from deltaloom.backends import backend
from deltaloom.cli.app import run
from deltaloom.cli.settings import Settings
from deltaloom.graph import plugins
from deltaloom.graph.errors import ConfigError, PluginError
from deltaloom.graph.plugin import API
from deltaloom.graph.registry import ops
from deltaloom.models.config import read_config
from deltaloom.models.families import family_named

SOURCE = Path(__file__).resolve().parents[2] / "src"
GOOD = "from deltaloom import Plugin\nplugin = Plugin('{name}', backends={{'{backend}': '{name}_code:Backend'}})\n"


def good(site: Site, name: str, backend: str = "") -> None:
    """A plugin of a distribution ``dist-NAME`` that offers one backend."""
    site.module(f"{name}_lab", GOOD.format(name=name, backend=backend or name))
    site.distribution(f"dist-{name}", {name: f"{name}_lab:plugin"})


def test_metadata_say_what_there_is_and_asking_imports_one(site: Site) -> None:
    good(site, "alpha")
    good(site, "beta")
    site.distribution("unrelated", {"gamma": "nothing:here"}, group="other.plugins")
    found = {record.name: (record.state, record.origin, record.target) for record in plugins.records()}
    assert found == {
        "alpha": ("found", "dist-alpha 1.0", "alpha_lab:plugin"),
        "beta": ("found", "dist-beta 1.0", "beta_lab:plugin"),
    }
    assert site.imported() == set()
    assert plugins.load("beta").kinds == ("backends",)
    assert site.imported() == {"beta_lab"}
    assert {record.name: record.state for record in plugins.records()} == {"alpha": "found", "beta": "loaded"}


def test_metadata_are_read_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    good(site, "alpha")
    plugins.records()
    monkeypatch.setattr("deltaloom.graph.plugins.installed", lambda: pytest.fail("looked again"))
    plugins.load_all()
    assert plugins.load("alpha").name == "alpha"


MADE = "from deltaloom import Plugin\nplugin = Plugin({})\n"
BROKEN = {
    "broken_import": ("import no_such_package_of_anyone\n", "ModuleNotFoundError: No module named 'no_such_package_of_anyone'"),
    "broken_exit": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "broken_syntax": ("def f(:\n", "SyntaxError"),
    "no_target": ("", "AttributeError: module 'no_target_lab' has no attribute 'plugin'"),
    "no_plugin": ("plugin = (1, 0)\n", "its target 'no_plugin_lab:plugin' is tuple, expected a deltaloom.Plugin"),
    "is_class": ("from deltaloom import Plugin as plugin\n", "is type, expected a deltaloom.Plugin"),
    "two_names": (MADE.format("'another'"), "is called 'two_names' and its Plugin 'another'"),
    "too_new": (MADE.format("'too_new', api=(2, 0)"), "needs plugin API 2.0, and this deltaloom has 1.0; upgrade deltaloom"),
    "newer_minor": (MADE.format("'newer_minor', api=(1, 7)"), "API 1.7.*upgrade deltaloom"),
    "too_old": (MADE.format("'too_old', api=(0, 9)"), "API 0.9.*install a newer version"),
    "future_field": (MADE.format("'future_field', fonts={}"), "TypeError.*fonts"),
    "undotted": (MADE.format("'undotted', ops={'linear': 'a:b'}"), "must begin with the plugin's name"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_an_error_for_who_asks_and_a_warning_for_others(site: Site, name: str) -> None:
    text, message = BROKEN[name]
    site.module(f"{name}_lab", text)
    site.distribution("dist-broken", {name: f"{name}_lab:plugin"})
    good(site, "alpha")
    with pytest.warns(plugins.PluginWarning, match=message) as caught:
        offers = plugins.offers("backends")
    assert [offer.name for offer in offers] == ["alpha"] and len(caught) == 1
    assert f"'{name}' (dist-broken 1.0)" in str(caught[0].message) and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins.load_all()  # said once
    with pytest.raises(PluginError, match=message) as refused:
        plugins.load(name)
    state = plugins.record(name)
    assert (state.state, refused.value.__cause__) == ("failed", state.cause)
    if "Error:" in message:
        assert type(state.cause).__name__ in message


def test_strict_makes_every_failure_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.distribution("dist-broken", {"broken": "no_such_module_of_anyone:plugin"})
    monkeypatch.setenv("DELTALOOM_PLUGINS_STRICT", "1")
    with pytest.raises(PluginError, match="'broken'.*cannot be imported"):
        plugins.load_all()
    monkeypatch.setenv("DELTALOOM_PLUGINS_STRICT", "yes")
    with pytest.raises(ConfigError, match="DELTALOOM_PLUGINS_STRICT is 'yes', expected 1 or 0"):
        plugins.load_all()
    monkeypatch.setenv("DELTALOOM_PLUGINS_STRICT", "0")
    with pytest.warns(plugins.PluginWarning):
        plugins.load_all()


def test_an_older_minor_is_welcome(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    good(site, "alpha")
    monkeypatch.setattr("deltaloom.graph.plugin.API", (API[0], API[1] + 1))
    assert plugins.load("alpha").api == API


def test_two_distributions_with_one_name(site: Site) -> None:
    good(site, "alpha")
    site.distribution("another", {"alpha": "alpha_lab:plugin"}, version="2.5")
    with pytest.raises(PluginError, match=r"taken by another 2.5 \(alpha_lab:plugin\) and dist-alpha 1.0"):
        plugins.load("alpha")
    assert site.imported() == set()


def test_a_copy_of_a_distribution_further_down_the_path_is_not_another(site: Site, tmp_path: Path) -> None:
    good(site, "alpha")
    later = Site(tmp_path / "later")
    later.folder.mkdir()
    later.distribution("dist.ALPHA", {"alpha": "elsewhere:plugin"}, version="0.1")
    sys.path.append(str(later.folder))
    try:
        plugins.rescan()
        assert [record.origin for record in plugins.records()] == ["dist-alpha 1.0"]
    finally:
        sys.path.remove(str(later.folder))


@pytest.mark.parametrize(
    ("choice", "states"),
    [
        ("none", {"alpha": "blocked", "beta": "blocked"}),
        ("alpha", {"alpha": "found", "beta": "blocked"}),
        (" beta , alpha", {"alpha": "found", "beta": "found"}),
        ("", {"alpha": "found", "beta": "found"}),
        ("alpha,gone", {"alpha": "found", "beta": "blocked", "gone": "failed"}),
    ],
)
def test_the_environment_chooses(site: Site, monkeypatch: pytest.MonkeyPatch, choice: str, states: dict[str, str]) -> None:
    good(site, "alpha")
    good(site, "beta")
    monkeypatch.setenv("DELTALOOM_PLUGINS", choice)
    plugins.rescan()
    assert {record.name: record.state for record in plugins.records()} == states
    for name, state in states.items():
        if state != "found":
            with pytest.raises(PluginError, match="DELTALOOM_PLUGINS"):
                plugins.load(name)
    assert site.imported() == set()


def test_unknown_plugins_are_named_with_what_is_near(site: Site) -> None:
    with pytest.raises(PluginError, match="there is no plugin 'alhpa'"):
        plugins.load("alhpa")
    good(site, "alpha")
    with pytest.raises(PluginError, match="there is no plugin 'alhpa'; did you mean 'alpha'"):
        plugins.load("alhpa")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "My Lab"}, "the name of a plugin is 'My Lab'; expected lower-case"),
        ({"name": "class"}, "'class'"),
        ({"name": "deltaloom"}, "'deltaloom'"),
        ({"api": 1}, "api of plugin lab is 1, expected two numbers"),
        ({"api": (1, True)}, "expected two numbers"),
        ({"url": None}, "url of plugin lab is None, expected a text"),
        ({"ops": ["lab.a"]}, "ops of plugin lab is list, expected a table"),
        ({"ops": {"a": "m:A"}}, "ops of plugin lab has the name 'a'; it must begin with the plugin's name, as in 'lab.name'"),
        ({"ops": {"lab.a.b": "m:A"}}, "has the name 'lab.a.b'"),
        ({"rules": {"other.a": "m:A"}}, "has the name 'other.a'"),
        ({"passes": {"lab.": "m:A"}}, "has the name 'lab.'"),
        ({"backends": {"lab.cpu": "m:A"}}, "backends of plugin lab has the name 'lab.cpu', expected a plain identifier"),
        ({"models": {3: "m:A"}}, "has the name 3, expected a plain identifier"),
        ({"ops": {"lab.a": "module.A"}}, "the op 'lab.a' of plugin lab is at 'module.A', expected 'module:attribute'"),
        ({"kernels": {"numpy": None}}, "the kernels for the backend 'numpy' of plugin lab is None"),
        ({"claims": "torch"}, "claims of plugin lab is 'torch', expected names of features"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_it_is_written(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        Plugin(**{"name": "lab", **fields})  # type: ignore[arg-type]


def test_a_plugin_is_data_that_stays_as_it_is() -> None:
    table: dict[str, object] = {"lab.a": "m:A"}
    plugin = Plugin("lab", ops=table)
    table["lab.b"] = "m:B"
    assert dict(plugin.ops) == {"lab.a": "m:A"} and plugin.kinds == ("ops",)
    with pytest.raises(TypeError):
        plugin.ops["lab.c"] = "m:C"  # type: ignore[index]


def test_registering_in_process(site: Site) -> None:
    good(site, "alpha")
    with plugins.registered(Plugin("lab")):
        assert plugins.load("lab").name == "lab" and plugins.record("lab").origin == "registered in this process"
        with pytest.raises(PluginError, match="'lab' cannot be registered: the name is taken by registered in this process"):
            plugins.register(Plugin("lab"))
        with pytest.raises(PluginError, match="'alpha' cannot be registered: the name is taken by dist-alpha 1.0"):
            plugins.register(Plugin("alpha"))
        with pytest.raises(PluginError, match="'late' cannot be registered: it needs plugin API 1.9"):
            plugins.register(Plugin("late", api=(1, 9)))
        plugins.rescan()
        assert plugins.load("lab").name == "lab"
    with pytest.raises(PluginError, match="there is no plugin 'lab'"):
        plugins.load("lab")
    for name in ("input", "linear", "dtype"):
        with pytest.raises(PluginError, match=f"it offers ops, and g.{name} of a graph builder is something else"):
            plugins.register(Plugin(name, ops={f"{name}.a": "m:A"}))
    with pytest.raises(PluginError, match="is given str, expected a deltaloom.Plugin"):
        plugins.register("lab")  # type: ignore[arg-type]


def test_what_is_built_in_is_had_without_looking_for_plugins(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaloom.graph.plugins.installed", lambda: pytest.fail("looked"))
    assert backend("numpy").name == "numpy"
    assert read_config({"model_type": "qwen3"}).family is family_named("qwen3")
    assert CompileConfig().backends == ("numpy",)
    assert "silu" in ops and "silly" not in ops and ops.get("silu").name == "silu"
    assert Settings({"backend": "numpy"}, None).describe()


def fresh(site: Site, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that has the site's folder on its path."""
    environment = os.environ | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{site.folder}"} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)


def test_neither_import_nor_version_nor_list_looks_at_more_than_it_needs(site: Site) -> None:
    site.module("loud_lab", "raise AssertionError('imported')\n")
    site.distribution("dist-loud", {"loud": "loud_lab:plugin"})
    look = "import sys; import deltaloom, deltaloom.ops; deltaloom.Plugin; print('importlib.metadata' in sys.modules)"
    assert fresh(site, look).stdout == "False\n"
    code = (
        "import sys; from deltaloom.cli.app import run; print(run(['plugins', 'list', '--json'])); print('loud_lab' in sys.modules)"
    )
    listed, code, imported = fresh(site, code).stdout.splitlines()
    assert (code, imported) == ("0", "False")
    (row,) = json.loads(listed)["plugins"]
    assert (row["name"], row["state"], row["distribution"], row["kinds"]) == ("loud", "found", "dist-loud", None)


def test_the_list_and_info_on_the_command_line(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "list"]) == 0
    assert "no plugin is installed" in capsys.readouterr().out
    good(site, "alpha")
    site.distribution("dist-broken", {"broken": "no_such_module_of_anyone:plugin"})
    assert run(["plugins", "list", "--load"]) == 0
    title, alpha, broken = capsys.readouterr().out.splitlines()
    assert title.split() == ["plugin", "distribution", "API", "offers", "state", "reason"]
    assert alpha.split() == ["alpha", "dist-alpha", "1.0", "1.0", "backends", "loaded"]
    assert "failed" in broken and "No module named 'no_such_module_of_anyone'" in broken
    assert run(["plugins", "info", "alpha"]) == 0
    assert "alpha_code:Backend" in capsys.readouterr().out
    assert run(["plugins", "info", "alpha", "--load", "--json"]) == 1
    (offer,) = json.loads(capsys.readouterr().out)["offers"]
    assert (offer["kind"], offer["name"], offer["usable"]) == ("backends", "alpha", False)
    assert "No module named 'alpha_code'" in offer["problem"]
    assert run(["plugins", "info", "broken"]) == 1
    assert run(["plugins", "info", "brokn"]) == 2
    assert "did you mean 'broken'?" in capsys.readouterr().err


def test_strict_ends_the_list_with_an_error(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.distribution("dist-broken", {"broken": "no_such_module_of_anyone:plugin"})
    monkeypatch.setenv("DELTALOOM_PLUGINS_STRICT", "1")
    assert run(["plugins", "list"]) == 0
    assert run(["plugins", "list", "--load"]) == 2
    assert "'broken' (dist-broken 1.0) cannot be used" in capsys.readouterr().err
