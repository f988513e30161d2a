"""``deltaloom plugins``: what is installed for deltaloom, what it offers, and why something of it cannot be used."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli.output import fitted, print_json
from deltaloom.cli.plugins_check import check
from deltaloom.cli.plugins_new import new
from deltaloom.cli.table import columns
from deltaloom.graph.errors import PluginError

if TYPE_CHECKING:
    from deltaloom.graph.plugins import Offer, Record

plugins = typer.Typer(
    name="plugins",
    help="Show the installed plugins; check one, or begin a new one.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 120},
)
plugins.command()(check)
plugins.command()(new)

Load = Annotated[bool, typer.Option("--load", help="Import the plugins, to see whether they can be and what they offer.")]
LoadOne = Annotated[bool, typer.Option("--load", help="Import all that it offers too, to see whether it can be.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@plugins.command("list")
def list_all(load: Load = False, as_json: AsJson = False) -> None:
    """List the installed plugins with their state. Reads metadata; nothing of a plugin is imported unless --load is given."""
    from deltaloom.graph import plugins as process
    from deltaloom.graph.plugin_discovery import strict

    records = process.records()
    for record in records if load else ():
        process.attempt(record)
    if as_json:
        print_json("plugins", {"api": list(process.API), "plugins": [described(record) for record in records]})
    elif records:
        print(fitted(columns([["plugin", "distribution", "API", "offers", "state", "reason"], *map(row, records)])))
    else:
        print(f"no plugin is installed (no distribution has an entry point of the group {process.GROUP})")
    failed = [record for record in records if record.state == "failed"]
    if failed and strict():
        raise failed[0].error()


@plugins.command()
def info(
    name: Annotated[str, typer.Argument(help="The plugin, as the list shows it.")], load: LoadOne = False, as_json: AsJson = False
) -> None:
    """Show one plugin in full: what it offers, and where each offer is. Imports the plugin; ends with 1 if something is broken."""
    from deltaloom.graph import plugins as process

    record = process.record(name)
    process.attempt(record)
    offers = [offer for kind in process.KINDS for offer in process.offers_of_loaded(kind) if offer.record is record]
    tried = {(offer.kind, offer.name): attempted(offer) if load else "" for offer in offers}
    if as_json:
        print_json("plugin", {**described(record), "offers": [as_object(offer, tried, load) for offer in offers]})
    else:
        print(fitted(details(record, offers, tried, load)))
    if record.state == "failed" or any(tried.values()):
        raise typer.Exit(1)


def row(record: "Record") -> list[str]:
    """A line of the list."""
    plugin = record.plugin
    kinds = ", ".join(plugin.kinds) if plugin else ""
    api = ".".join(map(str, plugin.api)) if plugin else ""
    return [record.name, record.origin, api or "-", kinds or "-", record.state, " ".join((record.reason or remark(record)).split())]


def described(record: "Record") -> dict[str, Any]:
    """A plugin as JSON; what only the import would say is null before it."""
    plugin = record.plugin
    return {
        "name": record.name,
        "state": record.state,
        "reason": record.reason or None,
        "distribution": record.distribution or None,
        "distribution_version": record.version or None,
        "target": record.target or None,
        "api": list(plugin.api) if plugin else None,
        "kinds": list(plugin.kinds) if plugin else None,
        "description": plugin.description if plugin else None,
        "url": plugin.url if plugin else None,
        "remark": remark(record) or None,
    }


def remark(record: "Record") -> str:
    """Names of this plugin that others have too: another plugin, or deltaloom itself."""
    from deltaloom.backends import TABLE
    from deltaloom.graph.plugins import offers_of_loaded
    from deltaloom.models.families import FAMILIES

    said = []
    for kind, built_in in (("backends", set(TABLE)), ("models", set(FAMILIES))):
        everyone = offers_of_loaded("backends" if kind == "backends" else "models")
        for own in (offer for offer in everyone if offer.record is record):
            others = [offer.record.title for offer in everyone if offer.name == own.name and offer.record is not record]
            rivals = [*(["deltaloom"] if own.name in built_in else []), *others]
            if rivals:
                said.append(f"{kind}.{own.name} is offered by {' and '.join(rivals)} too; `use` in the configuration says whose")
    return "; ".join(said)


def attempted(offer: "Offer") -> str:
    """Why an offer cannot be used; nothing if it can."""
    try:
        LOADERS[offer.kind](offer)
    except PluginError as error:
        return offer.record.problems.get((offer.kind, offer.name)) or str(error)
    return ""


def details(record: "Record", offers: list["Offer"], tried: dict[Any, str], load: bool) -> str:
    """Everything about one plugin."""
    plugin = record.plugin
    facts = [("plugin", record.name), ("distribution", record.origin), ("target", record.target or "-"), ("state", record.state)]
    facts += [("reason", record.reason)] if record.reason else []
    if plugin is not None:
        about = {"API": ".".join(map(str, plugin.api)), "description": plugin.description, "url": plugin.url}
        facts += [(title, text) for title, text in about.items() if text]
    facts += [("remark", remark(record))] if remark(record) else []
    rows = [[offer.kind, offer.name, place(offer), *([tried[offer.kind, offer.name] or "ok"] if load else [])] for offer in offers]
    return columns(facts) + (f"\n\n{columns(rows)}" if rows else "")


def as_object(offer: "Offer", tried: dict[Any, str], load: bool) -> dict[str, Any]:
    """An offer as JSON; ``usable`` is null where that was not tried."""
    problem = tried[offer.kind, offer.name]
    usable = (not problem) if load else None
    return {"kind": offer.kind, "name": offer.name, "target": place(offer), "usable": usable, "problem": problem or None}


def place(offer: "Offer") -> str:
    """The path of an offer, or the object in its place."""
    target = offer.target
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', type(target).__module__)}:{getattr(target, '__qualname__', type(target).__qualname__)}"


def _op(offer: "Offer") -> None:
    import deltaloom.ops  # noqa: F401 - a plugin's ops may be made of built-in ones
    from deltaloom.graph.registry import ops

    ops.get(offer.name)


def _rule(offer: "Offer") -> None:
    import deltaloom.passes.fuse  # noqa: F401 - puts the built-in rules into the registry
    from deltaloom.passes.rewrite.rule import rules

    rules.get(offer.name)


def _kernels(offer: "Offer") -> None:
    from deltaloom.passes.kernel import table_of

    table_of(offer)


def _pass(offer: "Offer") -> None:
    from deltaloom.passes.table import pass_class

    pass_class(offer.name)


def _model(offer: "Offer") -> None:
    from deltaloom.models.families import family_named

    family_named(offer.name, {f"models.{offer.name}": offer.plugin.name})


def _backend(offer: "Offer") -> None:
    from deltaloom.backends import backend_class

    backend_class(offer)


LOADERS: dict[str, Callable[["Offer"], None]] = {
    "ops": _op,
    "kernels": _kernels,
    "rules": _rule,
    "passes": _pass,
    "models": _model,
    "backends": _backend,
}
