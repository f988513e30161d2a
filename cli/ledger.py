"""The ledger as text: nodes of each body before and after every pass, its time, and what the rewrite rules did."""

import resource
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from time import process_time
from typing import TYPE_CHECKING, Any

from deltaloom.cli.table import columns

if TYPE_CHECKING:
    from deltaloom.passes.pipeline import Event, LedgerRow

Ledger = Mapping[str, Sequence["LedgerRow"]]


def ledger_text(ledger: Ledger) -> str:
    """A table for the shared part and for each program, then the rules and what this process took."""
    tables = [f"{title}:\n{table(rows)}" for title, rows in ledger.items()]
    events = [event for rows in ledger.values() for row in rows for event in row.events]
    return "\n\n".join([*tables, *rules(events), effort()])


def ledger_summary(ledger: Ledger) -> str:
    """One line a pass: nodes of all bodies before and after, how many rewrites, and how long it took."""
    lines = [["pass", "nodes", "rewrites", "refused", "near misses", "ms"]]
    for title, rows in ledger.items():
        for row in rows:
            kinds = Counter(event.kind for event in row.events)
            name = row.name if title == "shared" else f"{title.partition(' ')[0]}.{row.name}"
            nodes = change(sum(row.before.values()), sum(row.after.values()))
            counts = [str(kinds[kind] or "") for kind in ("hit", "refused", "near miss")]
            lines.append([name, nodes, *counts, f"{1000 * row.seconds:.0f}"])
    return columns(lines)


def table(rows: Sequence["LedgerRow"]) -> str:
    """One line a pass."""
    bodies = list(dict.fromkeys(body for row in rows for body in (*row.before, *row.after)))
    lines = [["", *bodies, "ms"]]
    for row in rows:
        cells = (change(row.before.get(body), row.after.get(body)) for body in bodies)
        lines.append([row.name, *cells, f"{1000 * row.seconds:.0f}"])
    if rows:
        ends = (change(rows[0].before.get(body), rows[-1].after.get(body)) for body in bodies)
        lines.append(["in all", *ends, f"{1000 * sum(row.seconds for row in rows):.0f}"])
    return columns(lines, indent="  ")


def change(before: int | None, after: int | None) -> str:
    """``30 -> 8``, or the one number where nothing changes."""
    shown = ["-" if count is None else str(count) for count in (before, after)]
    return shown[0] if shown[0] == shown[1] else " -> ".join(shown)


def rules(events: Iterable["Event"]) -> list[str]:
    """How often each rule applied, and where one did not and why, as paragraphs; none where no rule ran."""
    seen = list(events)
    hits = Counter((event.rule, event.graph) for event in seen if event.kind == "hit")
    others = Counter((event.kind, event.rule, event.graph, event.reason) for event in seen if event.kind != "hit")
    found = []
    if hits:
        found.append("rewrites:\n" + columns([(rule, graph, f"{n} times") for (rule, graph), n in hits.items()], indent="  "))
    if others:
        found.append("did not apply:\n" + columns([(rule, graph, kind, why) for kind, rule, graph, why in others], indent="  "))
    return found


def effort() -> str:
    """CPU time and peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"this process: {process_time():.2f} s of CPU, {peak / 2**20:.0f} MiB at most"


def ledger_object(ledger: Ledger) -> dict[str, Any]:
    """The ledger as a JSON object: rows by part."""
    return {title: [asdict(row) for row in rows] for title, rows in ledger.items()}
