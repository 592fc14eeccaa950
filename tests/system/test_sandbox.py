"""What the unit's sandbox allows and forbids, tested in the sandbox on a real systemd."""

from __future__ import annotations

import json
import platform
import re
from typing import Any, Final

import pytest

from tests.lab.container import PYTHON, Container
from tests.lab.process import OTHER_UID

UNIT = "qkilld-probe.service"
EXPOSED: Final = {
    "UserOrDynamicUser": "journald and the bus policy want root",
    "CapabilityBoundingSet_CAP_KILL": "signals to others' guests",
    "CapabilityBoundingSet_CAP_DAC_FOWNER_IPC_OWNER": "/proc/PID/io, sockets of monitors",
    "CapabilityBoundingSet_CAP_SYS_PTRACE": "/proc/PID",
    "RestrictAddressFamilies_AF_UNIX": "the bus, Varlink, the journal, monitors",
    "ProcSubset": "/proc/meminfo, the boot id",
    "PrivateUsers": "the kernel would refuse signals",
    "DeviceAllow": "ProtectClock= adds char-rtc, and without it the mean is 0.1 higher",
    "PrivateTmp": "it requires tmp.mount, which a shutdown stops",
    "RootDirectoryOrRootImage": "qkilld runs the programs of the host",
}
"""The settings of the service that systemd-analyze rates as unsafe, and why they are needed."""


_PROBE = """
import ctypes, errno, json, os, socket, sys

victim, path = int(sys.argv[1]), sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
names = sys.argv[3:]

class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

maps = open(f"/proc/{victim}/maps").readline()
remote = Iovec(int(maps.split("-")[0], 16), 16)
buffer = ctypes.create_string_buffer(16)
local = Iovec(ctypes.addressof(buffer), 16)
pidfd = os.pidfd_open(victim)

def call(number, *arguments):
    result = libc.syscall(number, *(ctypes.c_long(one) for one in arguments))
    return "allowed" if result >= 0 else errno.errorcode[ctypes.get_errno()]

vectors = (ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
found = {
    "process_vm_readv": call(310, victim, *vectors),
    "process_vm_writev": call(311, victim, *vectors),
    "kcmp": call(312, victim, victim, 2, 0, 0),
    "process_madvise": call(440, pidfd, ctypes.addressof(remote), 1, 20, 0),
    "ptrace": call(101, 16, victim, 0, 0),
    "pidfd_getfd": call(438, pidfd, 0, 0),
}
try:
    found["io"] = "read_bytes" in open(f"/proc/{victim}/io").read()
    monitor = socket.socket(socket.AF_UNIX)
    monitor.connect(f"/proc/{victim}/root{path}")
    found["connect"] = True
except OSError as error:
    found["error"] = str(error)
print(json.dumps(found), flush=True)
"""

_GUEST = """
import os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o600)
listener.listen()
time.sleep(1000)
"""


def probe(system: Container) -> dict[str, Any]:
    """Run PROBE in the sandbox of the installed unit, on a process of another user."""
    system.run("sh", "-c", f"mkdir -p /run/probe && chown {OTHER_UID} /run/probe")
    socket = "/run/probe/monitor"
    system.run("rm", "-f", socket)
    with system.spawn(PYTHON, "-c", _GUEST, socket, uid=OTHER_UID):
        until = f"until test -S {socket}; do sleep 0.05; done; pgrep -u {OTHER_UID} -nf {socket}"
        victim = system.run("sh", "-c", until).stdout.strip()
        text = system.run("systemctl", "cat", "qkilld.service").stdout
        text = re.sub(
            r"^(Type|BusName|Restart|Sockets|Wants|After|Runtime\w+)=.*$", "", text, flags=re.M
        )
        text = re.sub(
            r"^ExecStart=.*$",
            f"ExecStart={PYTHON} /etc/probe.py {victim} {socket}",
            text,
            flags=re.M,
        )
        system.write("/etc/probe.py", _PROBE)
        system.write(
            f"/run/systemd/system/{UNIT}", text.replace("[Service]", "[Service]\nType=oneshot")
        )
        system.run("systemctl", "daemon-reload")
        system.run("systemctl", "start", UNIT)
    *_, entry = system.journal(f"_SYSTEMD_UNIT={UNIT}")
    found: dict[str, Any] = json.loads(entry["MESSAGE"])
    return found


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the numbers of system calls are x86-64's"
)
def test_it_reads_of_others_what_it_needs_and_cannot_touch_their_memory(
    installed: Container,
) -> None:
    assert probe(installed) == {
        "process_vm_readv": "EPERM",
        "process_vm_writev": "EPERM",
        "kcmp": "EPERM",
        "process_madvise": "EPERM",
        "ptrace": "EPERM",
        "pidfd_getfd": "EPERM",
        "io": True,
        "connect": True,
    }


def test_it_is_limited(installed: Container) -> None:
    assert installed.property("qkilld.service", "MemoryMax") == str(1536 << 20)
    assert installed.property("qkilld.service", "MemorySwapMax") == "0"
    assert installed.property("qkilld.service", "MemoryHigh") == "infinity"
    assert installed.property("qkilld.service", "TasksMax") == "512"


def test_it_is_hardened(installed: Container) -> None:
    text = installed.run("systemd-analyze", "security", "--no-pager", "qkilld.service").stdout
    found = re.search(r"Overall exposure level for qkilld.service: ([0-9.]+)", text)
    assert found is not None
    print(f"exposure {found[1]}")
    # With default dependencies, the exposure would be 1.2. Without them, systemd 252 leaves
    # PrivateTmp=, ProtectHome=, ProtectSystem= and RootDirectory= out of the mean, so the other
    # settings have more weight.
    assert float(found[1]) <= 1.3


def test_nothing_else_is_left_to_harden(installed: Container) -> None:
    """If one setting was lost and another added, the mean might be the same, so check each
    setting."""
    options = ("--no-pager", "--json=short", "qkilld.service")
    rows = json.loads(installed.run("systemd-analyze", "security", *options).stdout)
    exposed = {row["json_field"] for row in rows if float(row["exposure"] or 0) > 0}
    assert exposed
    assert exposed <= set(EXPOSED)
