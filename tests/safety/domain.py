"""A program, run as `python -m tests.safety.domain XML NAME`: start a guest of libvirt, and stop
it.

Run it only in a throwaway system (tests.lab.container). It starts libvirtd and the guest, and
prints a line of JSON. Then it reads a line of JSON with the options of `virsh destroy`, stops the
guest, and prints {"seconds", "said", "status"}. "status" is the guest's exit code: -N for signal N,
null if the guest still exists. The program exits at the end of its input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final

from tests.bench import peer
from tests.lab import needs
from tests.lab.image import guest_image
from tests.lab.process import become_subreaper, run
from tests.lab.scratch import remove_run_directory
from tests.safety.machine import Machine

_TIMEOUT_S: Final = 120
_ARGUMENTS: Final = "http://libvirt.org/schemas/domain/qemu/1.0"


def description(machine: Machine) -> str:
    """Return libvirt's XML of the machine. libvirt passes the arguments for the disks to QEMU
    unchanged."""
    ET.register_namespace("qemu", _ARGUMENTS)
    image = guest_image()
    top = ET.Element("domain", type="qemu")
    ET.SubElement(top, "name").text = machine.name
    ET.SubElement(top, "uuid").text = machine.uuid
    ET.SubElement(top, "memory", unit="MiB").text = str(machine.memory)
    ET.SubElement(top, "vcpu").text = "1"
    system = ET.SubElement(top, "os")
    ET.SubElement(system, "type", arch="x86_64", machine="pc").text = "hvm"
    ET.SubElement(system, "kernel").text = str(image.kernel)
    ET.SubElement(system, "initrd").text = str(image.initramfs)
    ET.SubElement(system, "cmdline").text = machine.command_line
    devices = ET.SubElement(top, "devices")
    ET.SubElement(devices, "emulator").text = "/usr/bin/qemu-system-x86_64"
    ET.SubElement(devices, "controller", type="usb", model="none")
    port = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(port, "source", path=str(machine.serial))
    ET.SubElement(devices, "memballoon", model="none")
    arguments = ET.SubElement(top, f"{{{_ARGUMENTS}}}commandline")
    for argument in machine.disks():
        ET.SubElement(arguments, f"{{{_ARGUMENTS}}}arg", value=argument)
    return ET.tostring(top, encoding="unicode")


def main() -> int:
    xml, name = sys.argv[1:]
    # Become the guest's parent, so that the guest is reaped at once: libvirt takes a zombie for a
    # running process.
    become_subreaper()
    try:
        with peer.libvirtd():
            peer.virsh("create", xml)
            _stop(name, int(Path(f"/run/libvirt/qemu/{name}.pid").read_text()))
    finally:
        remove_run_directory()
    return 0


def _stop(name: str, pid: int) -> None:
    status: list[int] = []
    ended = threading.Event()

    def collect() -> None:
        status.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        ended.set()

    threading.Thread(target=collect, daemon=True).start()
    _say(up=pid)
    options = json.loads(sys.stdin.readline())
    virsh = needs.program("virsh", peer.PACKAGES)
    began = time.monotonic()
    try:
        done = run([virsh, f"--connect={peer.URI}", "destroy", *options, name], timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        said = "virsh does not return"
    else:
        said = f"virsh exits with {done.returncode}: {done.stderr}" if done.returncode else ""
    seconds = time.monotonic() - began
    ended.wait(0.5 if said else 5)
    _say(seconds=seconds, said=said, status=status[0] if status else None)
    sys.stdin.read()


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(main())
