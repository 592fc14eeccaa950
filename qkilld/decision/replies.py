"""Recognise the replies of NBD servers on connections that do not count bytes. Pure.

The kernel does not count the bytes on unix sockets. But NBD has no keepalives, so a QEMU that waits
for an NBD server sleeps until a reply arrives. If the server and QEMU have both run, the server has
replied, even if it has other clients. If only the server has run, it may have worked for another
client, or may repeat a request that fails.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qkilld.decision.node_groups import NodeGroup, groups_of
from qkilld.decision.server_signs import KEEPALIVE_PROTOCOLS, SERVES, runs_sign
from qkilld.decision.signs import Sign
from qkilld.model.sample import Peer, Sample, Socket

_IDLE_WITHOUT_CONNECTION: Final = frozenset({"http", "https", "ftp", "ftps", "vhost-user"})
"""Protocols whose nodes do not make QEMU run while they have no connection. QEMU connects to a web
or FTP server only for a request. A vhost-user device is connected again only by QEMU's main loop,
which does not run while QEMU finishes its disks."""


def reply_signs(
    runs: Sign, peer: Peer | None, switches: int | None, *, sure: bool
) -> tuple[Sign, ...]:
    """Return the signs that a server has replied.

    `runs`: the sign that the server runs. `peer`: the server. `switches`: Sample.switches. `sure`:
    whether the process runs only if a server has replied.
    """
    reply = replace(runs, switches=switches, sure=sure and switches is not None)
    if peer is None or peer.shared is not False:
        return (reply,)
    # Perhaps the server works on a request for which QEMU has no reply yet.
    return reply, replace(runs, name=f"{runs.name} alone", least=SERVES, sure=False)


def possible_replies(socket: Socket, switches: int | None) -> tuple[Sign, ...]:
    """Return the signs of replies on a unix socket of unknown use: its server may be an NBD server
    that was added later. TCP counts the bytes of replies. `switches`: Sample.switches."""
    peer = socket.peer
    if (
        socket.family != "unix"
        or peer is None
        or socket.accepted
        or not (peer.devices or peer.behind)
    ):
        return ()
    runs = runs_sign(peer)
    return () if runs is None else reply_signs(runs, peer, switches, sure=False)


def runs_without_replies(sample: Sample) -> bool:
    """Return whether the process may run although no server replies: to keep a connection alive, to
    connect to a lost server again, or for a connection of unknown use, such as that of a client or
    of storage that was added later."""
    sockets, nodes = sample.sockets or (), sample.nodes or ()
    return (
        any(socket.role == "unknown" and not _is_pair(socket) for socket in sockets)
        or any(node.protocol in KEEPALIVE_PROTOCOLS for node in nodes)
        or any(map(_connects_again, groups_of(sample).values()))
    )


def _is_pair(socket: Socket) -> bool:
    """Return whether the connection comes from socketpair(2), as that to an emulated TPM or the
    second one to a vhost-user backend. A client of an export, or storage that sends keepalives,
    does not have such a connection."""
    return socket.family == "unix" and not socket.client and not socket.accepted


def _connects_again(group: NodeGroup) -> bool:
    """Return whether QEMU may be trying to connect to the server of one of the nodes."""
    kept = sum(node.protocol not in _IDLE_WITHOUT_CONNECTION for node in group.nodes)
    return len(group.sockets) < kept
