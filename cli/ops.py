"""``deltaloom ops``: the registry of ops, their rules, and the kernels that each backend has for them."""

import inspect as introspection
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from deltaloom.cli.table import columns
from deltaloom.graph.errors import DeltaloomError

if TYPE_CHECKING:
    from deltaloom.graph.op import Op
    from deltaloom.passes.kernel import Kernel

RULES = ("reference", "decompose", "torch", "onnx", "cases")


def ops(name: Annotated[str | None, typer.Argument(help="One op in full; all of them if not given.")] = None) -> None:
    """List the ops, their rules and their kernels, or show one op in full."""
    import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
    from deltaloom.graph.registry import ops as registry

    chosen = list(registry) if name is None else [registry.get(name)]
    kernels, missing = kernels_by_backend()
    print(overview(chosen, kernels) if name is None else details(chosen[0], kernels))
    for problem in missing:
        print(f"\n{problem}")


def kernels_by_backend() -> tuple[dict[str, Sequence["Kernel"]], list[str]]:
    """Backend -> its kernels, and a sentence for each backend that cannot be used here."""
    from deltaloom.backends import TABLE, backend

    found: dict[str, Sequence[Kernel]] = {}
    missing: list[str] = []
    for name in TABLE:
        try:
            found[name] = backend(name).kernels()
        except DeltaloomError as error:
            missing.append(str(error))
    return found, missing


def rules(op: type["Op"]) -> list[str]:
    """The optional and needed rules that the op has."""
    from deltaloom.graph.op import Op

    has = [rule for rule in RULES if getattr(op, rule) is not None]
    has += ["cost"] if op.cost is not Op.cost else []
    return has + (["sharding"] if op.sharding is not None or op.factors is not Op.factors else [])


def overview(chosen: Sequence[type["Op"]], kernels: Mapping[str, Sequence["Kernel"]]) -> str:
    """One line an op: rules as marks, kernels as counts (``1+ref``: one accelerated, and the reference)."""
    names = (*RULES, "cost", "sharding")
    rows: list[list[str]] = [["op", *names, *kernels]]
    for op in chosen:
        has = rules(op)
        counts = [kernel_count(op.name, table) for table in kernels.values()]
        rows.append([op.name, *("x" if rule in has else "-" for rule in names), *counts])
    return columns(rows)


def kernel_count(op: str, table: Sequence["Kernel"]) -> str:
    titles = [kernel.name.partition(".")[2] for kernel in table if kernel.op == op]
    own = sum(title not in ("reference", "portable") for title in titles)
    return "+".join([*([str(own)] if own else []), *(title for title in titles if title in ("reference", "portable"))]) or "-"


def details(op: type["Op"], kernels: Mapping[str, Sequence["Kernel"]]) -> str:
    """Everything about one op."""
    low, high = op.arity()
    inputs = ", ".join(op.input_names()) + (" ..." if high > len(op.input_names()) else "")
    optional = f" ({low} needed)" if low < len(op.input_names()) else ""
    facts = [
        ("op", f"{op.name}, version {op.version}"),
        ("inputs", inputs + optional),
        ("attributes", ", ".join(f"{field.name}: {field.type}" for field in fields(op)) or "none"),  # type: ignore[arg-type]
        ("outputs", ", ".join(op.outputs)),
        ("rules", ", ".join(rules(op))),
        ("sharding", op.sharding or ("by its attributes" if "sharding" in rules(op) else "replicate")),
        ("laws", ", ".join(type(law).__name__ for law in op.laws) or "none"),
    ]
    for backend, table in kernels.items():
        found = [kernel.name for kernel in table if kernel.op == op.name]
        facts.append((f"on {backend}", ", ".join(found) or "none"))
    return f"{columns(facts)}\n\n{introspection.getdoc(op) or ''}".rstrip()
