"""Put the nodes whose connections cannot be told apart into groups (Node.group). Pure.

The samples give all connections of a group to one of its nodes. So only a group shows whether its
nodes are connected: if a group has fewer connections than nodes, some nodes have lost their
servers, but it is unknown which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Final

from qkilld.decision.server_signs import KEEPALIVE_PROTOCOLS
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import Node, Sample, Socket

NODE_WAIT: Final = "node:"
"""The keys of the waits for the servers of nodes begin with this."""
_MAX_NAMES: Final = 4


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """The nodes of a group, or a single node without a group."""

    name: str
    nodes: list[Node] = field(default_factory=list)
    sockets: list[Socket] = field(default_factory=list)
    """The connections of all nodes."""

    @property
    def wait_key(self) -> str:
        """The key of the wait for the group's servers (waits.py)."""
        return f"{NODE_WAIT}{self.name}"

    @property
    def title(self) -> str:
        return title_of(self.nodes)

    @property
    def protocol(self) -> str:
        """The protocol of the nodes. If they have several, prefer one without keepalives, so that
        any movement counts as progress."""
        return min((node.protocol for node in self.nodes), key=KEEPALIVE_PROTOCOLS.__contains__)

    @property
    def has_lost(self) -> bool:
        """Whether a node has no connection, if the connections are readable."""
        return len(self.sockets) < len(self.nodes)


def title_of(nodes: Sequence[Node]) -> str:
    """Return a printable title for a node, or for an unknown one of several nodes."""
    protocol = nodes[0].protocol
    if len(nodes) == 1:
        return f"{protocol} node {nodes[0].name}"
    names = [node.name for node in nodes[:_MAX_NAMES]]
    more = " and others" if len(nodes) > _MAX_NAMES else ""
    kind = f"{protocol} nodes" if all(node.protocol == protocol for node in nodes) else "nodes"
    return f"one of the {kind} {', '.join(names)}{more}"


def group_name(node: Node) -> str:
    """Return the name of the node's group. A node without a group forms its own."""
    return node.group or node.name


def groups_of(sample: Sample) -> dict[str, NodeGroup]:
    """Return the groups of a sample, keyed by their names."""
    groups: dict[str, NodeGroup] = {}
    by_node: dict[str, NodeGroup] = {}
    for node in sample.nodes or ():
        name = group_name(node)
        group = groups.setdefault(name, NodeGroup(name))
        group.nodes.append(node)
        by_node[node.name] = group
    for socket in sample.sockets or ():
        if socket.node in by_node:
            by_node[socket.node].sockets.append(socket)
    return groups
