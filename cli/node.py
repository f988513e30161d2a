"""One node as text and as JSON, for ``inspect --node`` and ``explain --node``."""

from typing import TYPE_CHECKING, Any

from deltaloom.cli.output import listed
from deltaloom.cli.table import columns

if TYPE_CHECKING:
    from deltaloom.graph.ir import Node
    from deltaloom.runtime.node_facts import NodeFacts


def node_text(facts: "NodeFacts", stage: str) -> str:
    """Everything about a node."""
    from deltaloom.graph.text import declaration

    node = facts.node
    attributes = ", ".join(f"{name}={value!r}" for name, value in node.op.attributes().items())
    rows = [("node", f"%{node.name} of {facts.body}, at {stage}"), ("op", f"{node.op.name} {attributes}".rstrip())]
    rows += [("input" if position == 0 else "", declaration(value)) for position, value in enumerate(node.inputs)]
    rows += [("output" if position == 0 else "", declaration(value)) for position, value in enumerate(node.outputs)]
    calls = [prefix for prefix in facts.prefixes if prefix]
    rows += [("runs", f"{len(calls)} times: {listed(calls)}")] if calls else []
    rows += [("scope", node.scope)] if node.scope else []
    rows += [("built at", node.source)] if node.source else []
    if facts.cost is not None:
        rows += [("FLOP", str(facts.cost.flops)), ("bytes", str(facts.cost.bytes))]
    if node.placement is not None:
        rows.append(("kernel", node.placement.kernel))
        rows += [("stored", f"{node.inputs[position]} as {axes}") for position, axes in node.placement.layouts]
        rows += [("refused", str(refusal)) for refusal in node.placement.refusals]
    rows += [("origins", ", ".join(node.origins))] if node.origins else []
    parts = [columns(rows)]
    if facts.made_from:
        history = [(stage, listed((short(one) for one in nodes), 12)) for stage, nodes in facts.made_from]
        parts.append("made from\n" + columns(history, indent="  "))
    return "\n\n".join(parts)


def short(node: "Node") -> str:
    """``%name = op``."""
    return f"%{node.name} = {node.op.name}"


def node_object(facts: "NodeFacts") -> dict[str, Any]:
    """The same as JSON; sizes that are not numbers as text."""
    node, place, cost = facts.node, facts.node.placement, facts.cost
    return {
        "node": node.name,
        "body": facts.body,
        "prefixes": list(facts.prefixes),
        "op": node.op.name,
        "op_version": node.op.version,
        "attributes": node.op.attributes(),
        "inputs": [{"name": str(value), "type": str(value.type)} for value in node.inputs],
        "outputs": [{"name": str(value), "type": str(value.type)} for value in node.outputs],
        "scope": node.scope,
        "source": node.source,
        "origins": list(node.origins),
        "cost": None if cost is None else {"flops": str(cost.flops), "bytes": str(cost.bytes)},
        "placement": None
        if place is None
        else {
            "backend": place.backend,
            "kernel": place.kernel,
            "refusals": [vars(refusal) for refusal in place.refusals],
            "layouts": {str(node.inputs[position]): list(axes) for position, axes in place.layouts},
        },
        "made_from": [
            {"stage": stage, "nodes": [{"node": one.name, "op": one.op.name, "source": one.source} for one in nodes]}
            for stage, nodes in facts.made_from
        ],
    }
