"""Use virsh to ask libvirt's guests to shut down, because libvirt occupies their monitors.

Only qkilld-stop and qkillctl do this, because the daemon starts no programs. libvirt's pid files
show which process runs a domain. These files are in a directory that only libvirt's user can write
to. The command line of a process proves nothing, because its owner chooses it. `virsh
qemu-monitor-command` is never used, because it taints a domain.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qkilld.debug_log import ignore
from qkilld.model.dataclass import dataclass
from qkilld.model.text import MAX_TEXT, printable

SYSTEM: Final = Path("/run/libvirt/qemu")
TIMEOUT_S: Final = 10.0
"""Timeout of virsh. virsh does not wait for the shutdown, and normally returns after some
milliseconds, so this is enough for a busy host."""
MAX_DOMAINS: Final = 10_000
_AMBIGUOUS: Final = re.compile(r"[0-9]+|[0-9a-fA-F-]{32,36}")
"""Names that virsh takes for an id or a UUID."""


@dataclass(frozen=True, slots=True)
class Domain:
    """A running guest of libvirt."""

    name: str
    uri: str
    """The URI for a connection to the libvirt daemon that manages the guest."""


def domain_of(
    pid: int, environment: Mapping[str, str] = os.environ, system: Path = SYSTEM
) -> Domain | None:
    """Return the domain that runs as this process; None if there is none, or if virsh could mistake
    its name for an id."""
    places = [(system, "qemu:///system")]
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        places.append((Path(runtime) / "libvirt/qemu/run", "qemu:///session"))
    for directory, uri in places:
        with ignore(f"looking for the domains of {uri}", OSError), os.scandir(directory) as entries:
            for _, entry in zip(range(MAX_DOMAINS), entries, strict=False):
                name, dot, suffix = entry.name.rpartition(".")
                if dot and suffix == "pid" and _read_pid(entry.path) == pid:
                    return None if _AMBIGUOUS.fullmatch(name) else Domain(name, uri)
    return None


def shut_down(domain: Domain) -> str:
    """Make libvirt ask the guest, by its agent or power button. Return "", or the reason for a
    failure.

    Blocks for at most TIMEOUT_S.
    """
    if (virsh := shutil.which("virsh")) is None:
        return "libvirt holds its monitor, and virsh is not installed"
    command = [virsh, f"--connect={domain.uri}", "--quiet", "shutdown"]
    command += ["--mode", "agent,acpi", f"--domain={domain.name}"]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        return f"virsh cannot be started: {error.strerror}"
    try:
        _, said = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        # Do not wait for its end here: it may be waiting in the kernel for a dead disk.
        threading.Thread(target=process.communicate, daemon=True).start()
        return f"virsh does not return within {TIMEOUT_S:g} s"
    if process.returncode == 0:
        return ""
    message = said.decode(errors="replace").strip()
    return printable(message, MAX_TEXT) or "virsh failed"


def _read_pid(path: str) -> int | None:
    """Return the pid in the file; None if it cannot be read."""
    with ignore(f"reading {path}", OSError, ValueError), Path(path).open("rb") as file:
        return int(file.read(16))
    return None
