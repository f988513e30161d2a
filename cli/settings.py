"""Settings of a run and where each comes from: built-in < checkpoint < file < flags.

The file is TOML with the tables ``[model]`` (as the arguments of ``LLM``), ``[compile]`` (``CompileConfig``) and
``[sampling]`` (``SamplingParams``). Unknown tables and keys are refused.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.graph.errors import ConfigError, DeltaloomError, require
from deltaloom.passes.config import CACHE_OFF, CompileConfig, backend_order, compile_config, default_device
from deltaloom.passes.table import near
from deltaloom.runtime.params import DEFAULT_MAX_BATCH, SAMPLING_FIELDS, GenerationDefaults, SamplingParams

if TYPE_CHECKING:
    from deltaloom.runtime.llm import LLM

BUILT_IN: dict[str, Any] = {
    "model": "tiny-next",
    "max_model_len": None,
    "max_batch": DEFAULT_MAX_BATCH,
    "generation_config": "auto",
    "hf_overrides": {},
    "check_weights": False,
}
"""The table [model]."""
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "model": (str, "a folder or a bundled name"),
    "max_model_len": (int, "a whole number"),
    "max_batch": (int, "a whole number"),
    "generation_config": (str, "'auto' or 'none'"),
    "hf_overrides": (dict, "a table"),
    "check_weights": (bool, "true or false"),
}
TABLES = ("model", "compile", "sampling")
FLAGS = {"backend": "backends", "no_cache": "cache"}
"""Flags of [compile] that are not called as the key they set."""
SWITCHES = ("no_cache",)
"""Flags that say something only when they are given."""
SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))
COMPILE_KEYS = tuple(field.name for field in fields(CompileConfig))


@dataclass(frozen=True)
class Setting:
    """A value and who set it."""

    value: Any
    origin: str


class Settings:
    """The values of all three tables, those of the checkpoint excepted, which are read from it where needed."""

    def __init__(self, flags: Mapping[str, Any], run_file: Path | None) -> None:
        """``flags``: parameters of a command by name; those that are None or no settings are passed over."""
        defaults = {"model": BUILT_IN, "compile": _defaults(CompileConfig()), "sampling": _defaults(SamplingParams())}
        self.tables = {
            table: {key: Setting(value, "built-in") for key, value in values.items()} for table, values in defaults.items()
        }
        if run_file is not None:
            for table, values in read_run_file(run_file).items():
                self.tables[table] |= {key: Setting(value, f"file {run_file}") for key, value in values.items()}
        for name, value in flags.items():
            place = _place(name)
            absent = value is None or value == () or (name in SWITCHES and not value)
            if place is not None and not absent:
                table, key = place
                self.tables[table][key] = Setting(_flag_value(name, value), f"flag --{name.replace('_', '-')}")
        device, chosen = self.tables["compile"]["device"], default_device(self.value("compile", "backends"))
        if device.origin == "built-in" and device.value != chosen:
            self.tables["compile"]["device"] = Setting(chosen, "backend cuda")

    def value(self, table: str, key: str) -> Any:
        """One value."""
        return self.tables[table][key].value

    def compile_config(self) -> CompileConfig:
        """The table [compile] as an object."""
        return compile_config({key: setting.value for key, setting in self.tables["compile"].items()}, "[compile]")

    def sampling_params(self) -> SamplingParams:
        """The table [sampling] as an object."""
        return SamplingParams(**{key: setting.value for key, setting in self.tables["sampling"].items()})

    def llm(self) -> "LLM":
        """The model, loaded."""
        from deltaloom.runtime.llm import LLM

        options = {key: setting.value for key, setting in self.tables["model"].items()}
        return LLM(**options, config=self.compile_config())

    def with_checkpoint(self) -> dict[str, dict[str, Setting]]:
        """All tables with what the checkpoint decides filled in; reads its JSON files only."""
        from deltaloom.models.bundled import model_folder
        from deltaloom.models.config import read_config

        folder = model_folder(self.value("model", "model"))
        shape = read_config(folder, self.value("model", "hf_overrides"), use=self.compile_config().use)
        tables = {table: dict(values) for table, values in self.tables.items()}
        if tables["model"]["max_model_len"].value is None:
            tables["model"]["max_model_len"] = Setting(shape.max_position_embeddings, "checkpoint's config.json")
        neutral = GenerationDefaults()
        auto = self.value("model", "generation_config") == "auto"
        given = GenerationDefaults.from_folder(folder) if auto else neutral
        for key in (*SAMPLING_FIELDS, "max_tokens"):
            if tables["sampling"][key].value is None:
                value = getattr(given, key)
                origin = "checkpoint's generation_config.json" if value != getattr(neutral, key) else "built-in"
                tables["sampling"][key] = Setting(value, origin)
        return tables

    def _check_ranges(self) -> None:
        """What loading would refuse of [model] and [compile], refused without loading."""
        from deltaloom.backends import TABLE, names, unknown

        for name in self.compile_config().backends:
            if name not in TABLE and name not in names():
                raise ConfigError(unknown(name))
        for key in ("max_model_len", "max_batch"):
            value = self.value("model", key)
            require(value is None or value >= 1, f"{key} is {value}, expected at least 1", ConfigError)
        mode = self.value("model", "generation_config")
        require(mode in ("auto", "none"), f"generation_config is {mode!r}, expected 'auto' or 'none'", ConfigError)

    def _checked(self) -> dict[str, dict[str, Setting]]:
        """All tables, refused where loading would refuse them."""
        self._check_ranges()
        self.sampling_params()
        return self.with_checkpoint()

    def describe_json(self) -> str:
        """The same as a JSON object: of each key of each table the value and its origin."""
        tables = {table: {key: vars(setting) for key, setting in values.items()} for table, values in self._checked().items()}
        return json.dumps(tables)

    def describe(self) -> str:
        """What ``--print-config`` shows: a TOML file that gives these settings again, with the origins as comments."""
        lines: list[str] = []
        for table, values in self._checked().items():
            lines.append(f"[{table}]")
            for key, setting in values.items():
                text = f"# {key} is not set" if setting.value is None else f"{key} = {_toml(setting.value)}"
                lines.append(f"{text:<44} # {setting.origin}")
            lines.append("")
        return "\n".join(lines).rstrip()


def read_run_file(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a run file, checked. Raises ConfigError with the file's name."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (--config)") from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read as TOML: its values are nested too deep") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from None
    known = {"model": tuple(BUILT_IN), "compile": COMPILE_KEYS, "sampling": SAMPLING_KEYS}
    for table, values in content.items():
        require(table in TABLES, f"{path} has an unknown table [{table}]{near(table, TABLES)}", ConfigError)
        require(isinstance(values, dict), f"{path}: {table} is {values!r}, expected a table [{table}]", ConfigError)
        for key, value in values.items():
            require(key in known[table], f"{path}: [{table}] has an unknown key '{key}'{near(key, known[table])}", ConfigError)
            if table == "model":
                _check_kind(key, value, f"{path}: ")
    try:
        compile_config(content.get("compile", {}), "[compile]")
        SamplingParams(**content.get("sampling", {}))
    except DeltaloomError as error:
        raise ConfigError(f"{path}: {error}") from None
    return content


def _check_kind(key: str, value: object, prefix: str) -> None:
    kind, wanted = KINDS[key]
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    require(good, f"{prefix}{key} is {value!r}, expected {wanted}", ConfigError)


def _place(flag: str) -> tuple[str, str] | None:
    """The table and key that a flag sets."""
    if flag in FLAGS:
        return "compile", FLAGS[flag]
    for table, keys in (("model", BUILT_IN), ("compile", COMPILE_KEYS), ("sampling", SAMPLING_KEYS)):
        if flag in keys:
            return table, flag
    return None


def _flag_value(name: str, value: Any) -> Any:
    """The value of a setting from the text of its flag."""
    if name in ("backend", "skip"):
        return backend_order(value)
    if name == "no_cache":
        return CACHE_OFF
    if name == "mesh":
        return read_mesh(value, "--mesh")
    if name == "quantise" and value.lstrip().startswith("{"):
        return _json_object("--quantise", value, "name pattern to scheme")
    if name != "hf_overrides":
        return value
    found = _json_object("--hf-overrides", value, "config.json fields")
    _check_kind("hf_overrides", found, "the flag --hf-overrides: ")
    return found


def _json_object(flag: str, text: str, content: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(f"{flag} is nested too deep; it is an object of {content}") from None
    except ValueError as error:
        raise ConfigError(f"{flag} is not valid JSON: {error}") from None


def read_mesh(text: str, flag: str) -> dict[str, int]:
    """``tp=2,ep=4`` as a table; ``ConfigError`` names the flag."""
    mesh: dict[str, int] = {}
    for part in text.split(","):
        axis, _, ranks = part.partition("=")
        good = ranks.strip().isdecimal() and len(ranks) < 10
        require(good, f"{flag} is '{text}', expected an axis and its number of ranks, for example tp=2", ConfigError)
        mesh[axis.strip()] = int(ranks)
    return mesh


def _defaults(record: CompileConfig | SamplingParams) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(str(key))} = {_toml(entry)}" for key, entry in value.items())
        return "{" + inner + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
