"""The command line: commands are put together here, and every error leaves here as a sentence and an exit code.

Exit codes: 0 fine, 1 a check failed, 2 a user's mistake or an unusable file, 130 interrupted, 141 the reader went away.
"""

import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

import typer

from deltaloom import __version__
from deltaloom.cli.bench import bench
from deltaloom.cli.bisect import bisect
from deltaloom.cli.chat import chat
from deltaloom.cli.compare import compare
from deltaloom.cli.diff import diff
from deltaloom.cli.doctor import doctor
from deltaloom.cli.explain import explain
from deltaloom.cli.export import export
from deltaloom.cli.generate import generate
from deltaloom.cli.inspect import inspect
from deltaloom.cli.memory import memory
from deltaloom.cli.ops import ops
from deltaloom.cli.plugins import plugins
from deltaloom.cli.repro import repro
from deltaloom.cli.roofline import roofline
from deltaloom.cli.source import source
from deltaloom.graph.errors import DeltaloomError

USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports only this subclass of what its parser raises

app = typer.Typer(
    name="deltaloom",
    help="A compute-graph compiler and runtime for hybrid delta-rule language models.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 120},
)
for function in (generate, chat, inspect, explain, diff, source, ops, doctor, roofline, memory, compare, bisect, repro, export):
    app.command()(function)
app.add_typer(bench)
app.add_typer(plugins)


@app.callback(epilog="Flags are spelled with dashes or underscores. Every command has --help.")
def top(version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True)) -> None:
    """A compute-graph compiler and runtime for hybrid delta-rule language models."""
    if version:
        print(f"deltaloom {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line given to this process; always raises SystemExit with the code."""
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code."""
    open_streams()
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        return run_command(arguments)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; every failure that is a user's to mend becomes a sentence and an exit code."""
    try:
        command = typer.main.get_command(app)
        with command.make_context("deltaloom", list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except DeltaloomError as error:
        return fail("\n".join([str(error), *getattr(error, "__notes__", ())]))
    except UsageError as error:
        return usage_failure(error)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        discard_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
        discard_output()
        return fail(f"standard output cannot be written: {error.strerror}")
    except MemoryError:
        return fail("there is not enough memory; a shorter prompt or a smaller max_batch (--config) needs less")


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """One line on standard error for a warning of deltaloom's, the usual form for any other."""
    own = category.__module__.split(".")[0] == "deltaloom"
    text = f"deltaloom: {message}\n" if own else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def fail(message: str, code: int = USAGE) -> int:
    """Show an error on standard error."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
    print(f"deltaloom: {message}", file=sys.stderr)
    return code


def open_streams() -> None:
    """Standard streams that the caller closed read as empty and write to nowhere; letters that one cannot write become ``?``."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")


def discard_output() -> None:
    """What the interpreter still has to write to standard output at its exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage_failure(error: Exception) -> int:
    """Say what the parser found wrong and where help is; without any command, show that help."""
    message = str(getattr(error, "message", error))
    if "Usage:" in message:
        print(message, file=sys.stderr)
        return USAGE
    shown = error.format_message() if hasattr(error, "format_message") else message
    where = getattr(getattr(error, "ctx", None), "command_path", "deltaloom")
    return fail(f"{shown} (see {where} --help)")
