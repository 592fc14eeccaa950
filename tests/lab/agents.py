"""Agents in a Debian guest (tests.lab.debian) that are of no use."""

from __future__ import annotations

from typing import Final

SILENT: Final = "kill -STOP $(pidof qemu-ga)"
"""Leaves the agent running and has it answer nothing."""
ANSWERING: Final = r"""systemctl stop qemu-guest-agent; nohup perl -e '
open(P, "+<", "/dev/virtio-ports/org.qemu.guest_agent.0") or die;
while (1) {
    # While no program of the host is there, nothing is read.
    sysread(P, $asked, 4096) or select(undef, undef, undef, 0.1), next;
    syswrite(P, "\xff{\"return\": $1}\n") if $asked =~ /sync-delimited.*"id": *([0-9]+)/s;
    syswrite(P, "{\"return\": {}}\n") if $asked =~ /guest-ping/;
}' >/dev/null 2>&1 &"""
"""Starts an agent that answers, and does nothing it is told."""
