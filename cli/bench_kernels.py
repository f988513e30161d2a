"""How ``deltaloom bench kernels`` shows what it found."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deltaloom.cli.output import quantity
from deltaloom.cli.roofline import duration
from deltaloom.cli.table import columns

if TYPE_CHECKING:
    from deltaloom.runtime.step_kernels import KernelTime


def kernel_object(row: "KernelTime") -> dict[str, Any]:
    """A kernel as JSON; seconds and bytes of one call, ``total`` of all calls of a step."""
    return asdict(row) | {"work": asdict(row.work), "total": row.total}


def kernel_report(batch: int, context: int, rows: "list[KernelTime]") -> str:
    """The kernels of one step as a table."""
    whole = sum(row.total for row in rows)
    lines = [("body", "node", "kernel", "calls", "bytes", "a call", "of floor", "together", "share", "timed by")]
    for row in rows:
        floor = "" if row.floor is None else f"{100 * row.floor / row.seconds:.0f} %"
        work = quantity(row.work.bytes, "B") if row.work.bytes else ""
        start = (row.body, row.node, row.kernel, f"{row.calls}", work)
        lines.append((*start, duration(row.seconds), floor, duration(row.total), f"{row.total / whole:.1%}", row.timed))
    title = f"batch {batch:,} at {context:,} tokens: {sum(row.calls for row in rows):,} kernels, {duration(whole)} one by one"
    return f"{title}\n{columns(lines, indent='  ')}"
