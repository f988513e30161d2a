"""The built-in passes by name, each imported when it is first asked for, and the standard order in which they run.

A pipeline is data: a sequence of steps, each the name of a pass or a table of its name (under ``pass``) and its options.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from deltaloom.graph import plugins
from deltaloom.graph.errors import CompileError, ConfigError, PluginError, require
from deltaloom.graph.versions import fits

if TYPE_CHECKING:
    from deltaloom.passes.pipeline import Pass

Step = str | Mapping[str, Any]
"""A pass of a pipeline: ``"canonicalise"`` or ``{"pass": "canonicalise", option: value, …}``."""

TABLE: dict[str, str] = {
    "canonicalise": "deltaloom.passes.canonicalise:Canonicalise",
    "shard": "deltaloom.passes.shard.partition:Shard",
    "fold": "deltaloom.passes.fuse.passes:Fold",
    "pack_siblings": "deltaloom.passes.pack_siblings:PackSiblings",
    "fuse": "deltaloom.passes.fuse.passes:Fuse",
    "border_fusion": "deltaloom.passes.border_fusion:BorderFusion",
    "quantise": "deltaloom.passes.quantise:Quantise",
    "lift_weights": "deltaloom.passes.lift_weights:LiftWeights",
    "select_outputs": "deltaloom.passes.specialise:SelectOutputs",
    "assume_unpadded": "deltaloom.passes.specialise:AssumeUnpadded",
    "specialise": "deltaloom.passes.specialise:Specialise",
    "serving_layout": "deltaloom.passes.serving_layout:ServingLayout",
    "assign": "deltaloom.passes.assign:Assign",
    "transfers": "deltaloom.passes.segment:Transfers",
}
"""Name -> "module:Class"."""

SHARED: tuple[Step, ...] = (
    "canonicalise",
    "shard",
    "fold",
    "pack_siblings",
    "canonicalise",
    "fuse",
    "border_fusion",
    "quantise",
    "lift_weights",
)
"""What changes the layout of a weight or a state happens here, once, before the programs fork."""

PROGRAM: tuple[Step, ...] = ("select_outputs", "assume_unpadded", "specialise", "assign", "transfers")
"""What makes one program of the shared graph."""

SERVING: tuple[Step, ...] = ("select_outputs", "serving_layout", "assign", "transfers")
"""What makes one serving program of the shared graph: packed sequences over pools of slots and blocks."""

PROGRAM_NEEDS = ("selected", "padding_decided", "assigned", "segmented")
"""Properties without which a program cannot be emitted and called."""


def near(name: str, known: Collection[str]) -> str:
    """``; did you mean 'x'?``, or what is known where nothing is near."""
    close = get_close_matches(name, known, 1)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(dict.fromkeys(known))}"


def step_name(step: Step) -> str:
    """The name of the pass of a step."""
    return step if isinstance(step, str) else str(step["pass"])


def pass_class(name: str) -> type[Pass]:
    """The pass called ``name``; dotted names are those of plugins. ``ConfigError`` if there is none, ``PluginError`` for one whose
    plugin cannot give it."""
    if "." in name:
        return _of_plugin(plugins.offer(name.partition(".")[0], "passes", name))
    require(name in TABLE, f"there is no pass '{name}'{near(name, TABLE)}", ConfigError)
    module, _, attribute = TABLE[name].partition(":")
    found: type[Pass] = getattr(import_module(module), attribute)
    return found


def _of_plugin(offer: plugins.Offer) -> type[Pass]:
    from deltaloom.passes.pipeline import Pass  # which imports this file for the order of passes

    def fault(found: object) -> str:
        if not isinstance(found, type) or not issubclass(found, Pass) or not is_dataclass(found):
            return f"it is {found!r}, expected a frozen dataclass that is a subclass of deltaloom.passes.pipeline.Pass"
        return "" if found.name == offer.name else f"the class calls itself '{found.name}'; its name has to be '{offer.name}'"

    made = offer.load(fault)
    assert isinstance(made, type) and issubclass(made, Pass)
    return made


def make_pass(step: Step) -> Pass:
    """The pass of a step with its options. ``ConfigError`` for an unknown pass or option, an option that is of a wrong type or
    that the compiler gives."""
    if isinstance(step, str):
        return pass_class(step)()
    require("pass" in step, f"the step {dict(step)} of the pipeline has no 'pass', which names the pass", ConfigError)
    cls = pass_class(step_name(step))
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls) if field.name not in cls.given]
    options = {key: _tuples(value) for key, value in step.items() if key != "pass"}
    for key, value in options.items():
        instead = near(key, known) if known else "; it has none"
        hint = f"; the compiler gives '{key}' to it" if key in cls.given else instead
        require(key in known, f"pass '{cls.name}' has no option '{key}'{hint}", ConfigError)
        wanted = hints[key]
        text = wanted.__name__ if isinstance(wanted, type) else str(wanted)
        require(fits(value, wanted), f"option '{key}' of pass '{cls.name}' is {value!r}, expected {text}", ConfigError)
    return cls(**options)


def without(steps: Sequence[Step], names: Collection[str]) -> tuple[Step, ...]:
    """``steps`` less the passes called ``names``."""
    return tuple(step for step in steps if step_name(step) not in names)


def check_order(passes: Sequence[Pass], properties: Collection[str] = ()) -> frozenset[str]:
    """The properties after ``passes``, of a graph that has ``properties``. ``CompileError`` for an order in which a pass runs
    before what it requires, or after what it has to precede."""
    made = dict.fromkeys(properties, "")
    for position, step in enumerate(passes):
        missing = [name for name in step.requires if name not in made]
        if missing:
            ran = ", ".join(p.name for p in passes[:position]) or "none"
            makers = [p.name for p in passes if missing[0] in p.establishes] or makers_of(missing[0])
            hint = f"; run {makers[0]} before it" if makers else ""
            found = f"pass '{step.name}' requires '{missing[0]}', which no earlier pass establishes (ran: {ran})"
            raise CompileError(found + hint)
        late = [name for name in step.excludes if name in made]
        if late:
            maker = made[late[0]]
            hint = f"put '{step.name}' before '{maker}'" if maker else "it belongs into the shared part, before that"
            raise CompileError(f"pass '{step.name}' cannot work on a graph that is '{late[0]}' already; {hint}")
        made.update(dict.fromkeys(step.establishes, step.name))
    return frozenset(made)


def check_pipelines(shared: Sequence[Step], program: Sequence[Step]) -> None:
    """Refuse pipelines that cannot work, before any graph is there: ``ConfigError`` or ``CompileError`` with a sentence."""
    passes = [make_pass(step) for step in shared]
    for step in passes:
        of_program = [name for name in step.given if name in PROGRAM_FACTS]
        wants = f"pass '{step.name}' takes '{', '.join(of_program)}', which only single programs have"
        require(not of_program, f"{wants}; put it into the program part of the pipeline", ConfigError)
    parts = [make_pass(step) for step in program]
    for step in parts:
        serving = [name for name in step.given if name in SERVING_FACTS]
        wants = f"pass '{step.name}' takes '{', '.join(serving)}', which only serving programs have"
        require(not serving, f"{wants}; those have a pipeline of their own, so leave it out here", ConfigError)
    known = check_order(parts, check_order(passes))
    for name in PROGRAM_NEEDS:
        makers = [maker for maker in makers_of(name) if maker not in SERVING or maker in PROGRAM]
        message = f"the program part of the pipeline ends in a graph that is not '{name}'; put {' or '.join(makers)} into it"
        require(name in known, message, ConfigError)


SERVING_FACTS = ("tokens_each", "block_size")
PROGRAM_FACTS = ("outputs", "padded", "seq", "layouts", *SERVING_FACTS)
"""Options that differ from program to program (see ``Pass.given``)."""


def makers_of(goal: str) -> list[str]:
    """The names of the passes that establish ``goal``: built-in ones, then those of plugins that are loaded."""
    makers = [name for name in TABLE if goal in pass_class(name).establishes]
    for offer in plugins.offers_of_loaded("passes"):
        try:
            makers += [offer.name] if goal in _of_plugin(offer).establishes else []
        except PluginError as error:
            plugins.complain(offer.record, error)
    return makers


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
