"""The phases of ``deltaloom bench startup``: here, and in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import typer

from deltaloom.cli.settings import Settings
from deltaloom.cli.table import columns
from deltaloom.graph.errors import CompileError, require

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Folders in which compiled kernels are kept."""
HERE = ("once", "as_json")
"""Flags that a fresh process gets in any case."""


def phases_here(settings: Settings, layers: int | None, seed: int, batch: int, context: int) -> dict[str, float]:
    """The seconds of each phase until the first token, in this process."""
    started = perf_counter()
    from deltaloom.cli.bench import chosen_subject, made_bench
    from deltaloom.runtime import decode_bench  # noqa: F401 - the import is what is timed
    from deltaloom.runtime.compile import backends_of

    backends_of(settings.compile_config())
    imported = perf_counter()
    subject = chosen_subject(settings, layers)
    read = perf_counter()
    made = made_bench(subject, seed)
    step, _, record = made.ready(batch, context, steps=1)
    ready = perf_counter()
    step.tokens(step.run())
    first = perf_counter() - ready
    recording = step.phases or {"record": record}
    found = {"import": imported - started, "config": read - imported, **made.phases, **recording, "first_token": first}
    return found | {"together": sum(found.values())}


def fresh_runs(ctx: typer.Context) -> list[dict[str, Any]]:
    """The phases in a fresh process with empty kernel caches, then in one that finds what the first has kept. ``CompileError``
    where one of them fails."""
    command = [sys.executable, "-m", "deltaloom", "bench", "startup", *given(ctx), "--once", "--json"]
    runs = []
    with TemporaryDirectory(prefix="deltaloom-startup-") as folder:
        environment = os.environ | {name: str(Path(folder) / name.lower()) for name in CACHES}
        for cache in ("cold", "warm"):
            started = perf_counter()
            made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            wall = perf_counter() - started
            require(made.returncode == 0, f"the fresh process failed: {made.stderr.strip()}", CompileError)
            phases = json.loads(made.stdout)["runs"][0]["phases"]
            runs.append({"cache": cache, "phases": phases | {"process": wall}})
    return runs


def given(ctx: typer.Context) -> list[str]:
    """The arguments of the command as they were given."""
    found: list[str] = []
    for parameter in ctx.command.params:
        name = parameter.name or ""
        value = ctx.params.get(name)
        if value is None or value is False or name in HERE:
            continue
        found += [str(value)] if parameter.param_type_name == "argument" else [parameter.opts[0], str(value)]
    return found


def startup_report(runs: list[dict[str, Any]]) -> str:
    """The phases as a table, a column a run."""
    names = list(dict.fromkeys(name for run in runs for name in run["phases"]))
    lines = [["phase", *(f"{run['cache']} cache" for run in runs)]]
    lines += [[name.replace("_", " "), *(f"{run['phases'].get(name, 0.0):.2f} s" for run in runs)] for name in names]
    return columns(lines)
