"""``deltaloom doctor``: whether this installation can work, and with what."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter

import typer

from deltaloom import __version__
from deltaloom.cli.table import columns
from deltaloom.graph.errors import DeltaloomError

LIBRARIES = ("numpy", "torch", "networkx", "tokenizers", "ml_dtypes", "jinja2", "typer")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def doctor() -> None:
    """Check the installation: versions, backends, the CPU and its BLAS, and whether the bundled model answers."""
    parts = {"versions": versions, "plugins": plugins, "backends": backends, "CPU": cpu, "compile cache": compile_cache}
    for title, rows in parts.items():
        print(f"{title}\n{columns(list(rows()), indent='  ')}\n")
    fine, text = bundled_model()
    print(f"bundled model\n  {text}")
    if not fine:
        raise typer.Exit(1)


def versions() -> Iterator[tuple[str, str]]:
    """deltaloom, Python and the libraries."""
    yield "deltaloom", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def plugins() -> Iterator[tuple[str, str]]:
    """Each plugin, and why it cannot be used where it cannot."""
    from deltaloom.graph.plugins import attempt, records

    for record in records():
        attempt(record)
        offers = ", ".join(record.plugin.kinds) if record.plugin else ""
        yield record.name, f"{record.state}, {record.origin}: {record.reason or offers}"
    if not records():
        yield "none", "no plugin is installed"


def backends() -> Iterator[tuple[str, str]]:
    """Each backend, and why it cannot be used where it cannot."""
    from deltaloom.backends import backend, names

    for name in names():
        try:
            made = backend(name)
        except DeltaloomError as error:
            yield name, f"not available: {error}"
        else:
            yield name, f"ok, on {made.device}, {len(made.kernels())} kernels"


def cpu() -> Iterator[tuple[str, str]]:
    """Cores, threads and the BLAS that NumPy was built with."""
    import numpy as np

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{usable} usable of {os.cpu_count()}"
    for name in THREAD_VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]
    built = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {}) if isinstance(built, dict) else {}
    yield "BLAS", f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def compile_cache() -> Iterator[tuple[str, str]]:
    """The default folder of compiled graphs, what is in it, and whether it can be used."""
    from deltaloom.passes.cache import CompileCache, default_folder

    folder = default_folder()
    try:
        entries = list(CompileCache(folder).entries())
    except DeltaloomError as error:
        yield "cannot be used", str(error)
        return
    yield "folder", f"{folder}{'' if folder.exists() else ', not there yet'}; off by default, --cache default uses it"
    yield "entries", f"{len(entries)}, {sum(entry.bytes for entry in entries) / 2**20:.1f} MiB"


def bundled_model() -> tuple[bool, str]:
    """Whether the bundled model loads and answers on NumPy, and a line that says so."""
    from deltaloom.runtime.llm import LLM
    from deltaloom.runtime.params import SamplingParams

    started = perf_counter()
    try:
        llm = LLM("tiny-next")
        loaded = perf_counter()
        question = [{"role": "user", "content": "What is the opposite of hot?"}]
        result = llm.chat(question, params=SamplingParams(max_tokens=32, temperature=0))
    except DeltaloomError as error:
        return False, f"fails: {error}"
    answer = result.outputs[0].text
    times = f"loaded in {loaded - started:.2f} s, answered in {perf_counter() - loaded:.2f} s"
    return "cold" in answer, f"{'ok' if 'cold' in answer else 'wrong answer'}: {answer!r}, {times}"
