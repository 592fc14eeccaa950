"""Choose the connections to cut off so that QEMU can finish its other disks. Pure.

`query-yank` lists every connection that can be cut off, even healthy ones. If a healthy connection
is cut off, the data that QEMU still holds for it is lost. But a healthy NBD server without requests
looks like a dead one. So only one set of connections is cut off, the first that is not empty:

- A reply is certainly missing: bytes are unacknowledged or unread, there is no connection or no
  server, or a request had no reply before SIGTERM and nothing has moved since.
- A request had no reply before SIGTERM, but the connection has moved since, perhaps by the reply.
- A reply is certainly missing for some nodes of a group (node_groups.py), but it is unknown for
  which.
- The server waits for its own storage, perhaps on behalf of another disk of the guest.
- The connection does not move.
- Only doubtful signs of the connection move, so perhaps the server replies.

If QEMU certainly waits for a local disk, too, only the first three of these are cut off. A wrong
choice loses less than the next rung, SIGKILL, would.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qkilld.decision.node_groups import NODE_WAIT, NodeGroup, groups_of
from qkilld.decision.open_wait import OpenWait
from qkilld.decision.server_signs import works
from qkilld.decision.verdict import Assessment
from qkilld.decision.waits import WaitKind, owes_reply
from qkilld.model.block_state import NetworkDisk, NetworkStorage, YankInstance
from qkilld.model.dataclass import dataclass

_SOCKET = "socket:"


@dataclass(frozen=True, slots=True)
class CutOff:
    instance: YankInstance
    disks: tuple[str, ...]
    """The printable names of the disks behind the connection, or the connection's name if they are
    unknown."""
    why: str
    """A printable description of the wait."""


def choose(
    instances: Sequence[YankInstance],
    evidence: Assessment,
    *,
    known: NetworkStorage,
    cut_off: Collection[str] = (),
    still_since: int,
) -> tuple[CutOff, ...]:
    """Return the connections to cut off now; () if none would help.

    known        what was known before SIGTERM
    cut_off      names of connections that were cut off already
    still_since  do not cut off connections that have moved since this time; CLOCK_MONOTONIC, µs
    """
    known_waits = (*evidence.hidden, *evidence.waits)
    waits = {wait.key: wait for wait in known_waits if wait.kind is WaitKind.STORAGE}
    sample = evidence.seen
    groups = {node.name: group for group in groups_of(sample).values() for node in group.nodes}
    accepted = {f"{_SOCKET}{one.inode}" for one in sample.sockets or () if one.accepted}
    unknown = [w for key, w in waits.items() if key.startswith(_SOCKET) and key not in accepted]
    candidates = []
    for instance in instances:
        if instance.kind in ("block-node", "chardev") and instance.name not in cut_off:
            titles = _titles(instance, known.disks)
            names = [name for name in groups if _is_of(name, instance, titles)]
            candidates.append((instance, titles, names))
    open_nodes = {name for _, _, names in candidates for name in names}
    suspects, moved, shared, working, others, doubtful = [], [], [], [], [], []
    for instance, titles, names in candidates:
        own = [groups[name] for name in names]
        node_waits = [waits[group.wait_key] for group in own if group.wait_key in waits]
        # If it was added through a monitor, any connection of unknown use may belong to it.
        is_unnamed = instance.kind == "block-node" and not names
        if is_unnamed and unknown and all(_is_after(still_since, one.moved_at) for one in unknown):
            continue
        if any(_is_after(still_since, wait.moved_at) for wait in node_waits):
            continue
        candidate = CutOff(instance, titles or (instance.name,), _why(node_waits))
        owes = sample.sockets is not None and any(map(_owes, own))
        is_stuck = instance.name in known.stuck
        its_waits = unknown if is_unnamed else node_waits
        if owes or (is_stuck and all(wait.moved_at is None for wait in its_waits)):
            suspects.append(candidate)
        elif is_stuck:
            moved.append(candidate)
        elif sample.sockets is not None and any(_may_owe(group, open_nodes) for group in own):
            shared.append(candidate)
        elif any(works(socket.peer) for group in own for socket in group.sockets):
            working.append(candidate)
        elif any(_is_after(still_since, wait.doubted_at) for wait in node_waits):
            doubtful.append(candidate)
        elif node_waits or is_unnamed:
            others.append((candidate, bool(node_waits)))
    if suspects or moved or shared:
        return tuple(suspects or moved or shared)
    elsewhere = [wait for key, wait in waits.items() if not key.startswith((NODE_WAIT, _SOCKET))]
    if any(wait.certain for wait in elsewhere):
        return ()
    if working:
        return tuple(working)
    connections = [wait for key, wait in waits.items() if key.startswith((NODE_WAIT, _SOCKET))]
    all_still = not any(_is_after(still_since, wait.moved_at) for wait in connections)
    still = [candidate for candidate, known in others if known or all_still]
    return tuple(still or doubtful)


def _titles(instance: YankInstance, disks: Sequence[NetworkDisk]) -> tuple[str, ...]:
    return tuple(disk.title for disk in disks if instance.name in disk.connections)


def _is_of(name: str, instance: YankInstance, titles: Sequence[str]) -> bool:
    """Return whether this instance belongs to the node `name` of the command line."""
    if instance.kind == "chardev":
        return name.startswith(f"{instance.name} (vhost-user")
    return name == instance.name or name in titles


def _is_after(since: int, at: int | None) -> bool:
    return at is not None and at > since


def _owes(group: NodeGroup) -> bool:
    """Return whether each node of the group certainly lacks a reply: there is no connection or no
    server, or all connections have unacknowledged or unread data."""
    if len(group.nodes) > 1:
        return all(map(owes_reply, group.sockets))
    return group.has_lost or group.nodes[0].served is False or any(map(owes_reply, group.sockets))


def _may_owe(group: NodeGroup, open_nodes: Collection[str]) -> bool:
    """Return whether some of a group's nodes certainly lack a reply. `open_nodes`: the names of the
    nodes that QEMU uses and that were not cut off."""
    users = sum(node.name in open_nodes for node in group.nodes)
    return len(group.sockets) < users or any(map(owes_reply, group.sockets))


def _why(waits: Sequence[OpenWait]) -> str:
    return next(_texts(waits), "it does not move")


def _texts(waits: Sequence[OpenWait]) -> Iterator[str]:
    return (wait.text for wait in waits)
