"""Plain aligned columns, the same on a terminal and in a pipe."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """The rows as lines, each column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(indent + line.rstrip() for line in lines)
