"""Recognise the replies of NBD servers on connections that do not count bytes. Pure.

The kernel does not count the bytes on unix sockets. But NBD has no keepalives, so a QEMU that waits
for an NBD server sleeps until a reply arrives. If the server and QEMU have both run, the server has
replied, even if it has other clients. If only the server has run, it may have worked for another
client, or may repeat a request that fails.
"""

from __future__ import annotations

from dataclasses import replace

from qkilld.decision.signs import KEEPALIVE_PROTOCOLS, SERVES, Sign
from qkilld.model.sample import Peer, Sample


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


def runs_without_replies(sample: Sample) -> bool:
    """Return whether the process may run although no server replies: to keep a connection alive, to
    connect to a lost server again, or for a connection of unknown use, such as that of a client."""
    sockets, nodes = sample.sockets or (), sample.nodes or ()
    connected = {socket.node for socket in sockets}
    # It is unknown which node of a group a connection belongs to.
    connected |= {node.group for node in nodes if node.group and node.name in connected}
    return any(socket.role == "unknown" for socket in sockets) or any(
        node.protocol in KEEPALIVE_PROTOCOLS or connected.isdisjoint((node.name, node.group))
        for node in nodes
    )
