"""How commands print: JSON objects with a version, and text that fits a terminal and is whole in a pipe."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any

JSON_VERSION = 1
"""Of the objects that ``--json`` prints; it changes when a field goes or means something else."""


def print_json(kind: str, fields: Mapping[str, Any]) -> None:
    """One line with a JSON object that says what it is."""
    print(json.dumps({"format": f"deltaloom.{kind}", "version": JSON_VERSION, **fields}))


def on_terminal() -> bool:
    """Whether a person reads the output as it comes."""
    return sys.stdout.isatty()


def coloured() -> bool:
    """Whether output may have colours: on a terminal that has them, unless NO_COLOR says otherwise."""
    return on_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def fitted(text: str) -> str:
    """``text`` with lines cut at the width of the terminal; whole in a pipe."""
    if not on_terminal():
        return text
    width = max(20, shutil.get_terminal_size().columns)
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in text.splitlines())


def amount(number: float) -> str:
    """A number in thousands, with its letter: ``38.6 G``."""
    for power, prefix in ((5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if abs(number) >= 1000**power:
            return f"{number / 1000**power:.3g} {prefix}"
    return f"{number:.3g}"


def quantity(number: float, unit: str) -> str:
    """``38.6 GFLOP``, ``640 FLOP``."""
    found = amount(number)
    return f"{found}{unit}" if found[-1].isalpha() else f"{found} {unit}"


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
