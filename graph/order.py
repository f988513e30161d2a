"""Orders of nodes: definitions before uses."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Node, Value


def topological(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """``nodes`` so that each comes after the nodes that make its inputs: always the earliest that can come next, so
    an order that is right already stays. Raises ``GraphError`` that shows a cycle."""
    producer: dict[Value, int] = {value: index for index, node in enumerate(nodes) for value in node.outputs}
    waits = [{producer[value] for value in node.inputs if value in producer} for node in nodes]
    users: list[list[int]] = [[] for _ in nodes]
    for index, needed in enumerate(waits):
        for earlier in needed:
            users[earlier].append(index)
    missing = [len(needed) for needed in waits]
    ready = [index for index, count in enumerate(missing) if count == 0]
    order: list[Node] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(nodes[index])
        for user in users[index]:
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(nodes):
        path = [next(index for index, count in enumerate(missing) if count)]
        while (before := min(i for i in waits[path[-1]] if missing[i])) not in path:
            path.append(before)
        names = " <- ".join(f"%{nodes[i].name}" for i in [*path[path.index(before) :], before])
        raise GraphError(f"the nodes form a cycle, so they have no order: {names}")
    return tuple(order)
