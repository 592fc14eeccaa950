"""Shell commands for a Debian guest (tests.lab.debian) that break its guest agent."""

from __future__ import annotations

from typing import Final

SILENT: Final = "kill -STOP $(pidof qemu-ga)"
"""Stops the agent's process with SIGSTOP, so that it exists but never answers."""
ANSWERING: Final = r"""systemctl stop qemu-guest-agent; nohup perl -e '
open(P, "+<", "/dev/virtio-ports/org.qemu.guest_agent.0") or die;
while (1) {
    # Reads return nothing while no program on the host is connected.
    sysread(P, $asked, 4096) or select(undef, undef, undef, 0.1), next;
    syswrite(P, "\xff{\"return\": $1}\n") if $asked =~ /sync-delimited.*"id": *([0-9]+)/s;
    syswrite(P, "{\"return\": {}}\n") if $asked =~ /guest-ping/;
}' >/dev/null 2>&1 &"""
"""Replaces the agent by a program that answers commands, but does not execute them."""
