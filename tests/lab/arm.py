"""A guest on aarch64 `virt`, with Debian's kernel and busybox.

Nothing outside the guest shows whether it noticed a press of its power button. The guest keeps
eight blocks of 64 KiB in memory, and writes them to its disk only when the button is pressed.
packaging/setup (step aarch64) fetches the kernel and busybox.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.image import CACHE
from tests.lab.log import Log
from tests.lab.process import end, run, spawn

QEMU: Final = "qemu-system-aarch64"
BOOT_S: Final = 300
_HOME: Final = CACHE / "aarch64"
_MODULES: Final = (
    *("virtio/virtio_mmio", "block/virtio_blk", "input/evdev", "input/keyboard/gpio_keys"),
)
_INIT: Final = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /etc/acpi/PWRF
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in virtio_mmio virtio_blk evdev gpio_keys; do
    /bin/busybox insmod /lib/$module.ko || echo "GUEST ERROR there is no $module"
done
for key in expire writeback; do echo 360000 >/proc/sys/vm/dirty_${key}_centisecs; done
echo '#!/bin/busybox sh' >/etc/acpi/PWRF/00000080
echo '/bin/busybox sync; /bin/busybox poweroff -f' >>/etc/acpi/PWRF/00000080
/bin/busybox chmod +x /etc/acpi/PWRF/00000080
/bin/busybox acpid -f -c /etc/acpi -l /dev/null &
until /bin/busybox ls -l /proc/$!/fd | /bin/busybox grep -q /dev/input/event; do
    /bin/busybox sleep 0.05
done
# The last close of the disk writes it, so keep it open.
exec 3</dev/vda
for number in 1 2 3 4 5 6 7 8; do
    /bin/busybox head -c 65536 /dev/zero | /bin/busybox tr '\\0' $number
done >/dev/vda
echo "GUEST READY files"
while :; do /bin/busybox sleep 86400; done
"""


@contextlib.contextmanager
def arm_guest(directory: Path) -> Iterator[tuple[int, int, Path, Path]]:
    """Run the guest; yield its pid, its pidfd, its raw disk and its QMP socket. Raises
    needs.Missing."""
    program = needs.program(QEMU, "qemu-system-arm").resolve()
    kernels = sorted(_HOME.glob("boot/vmlinuz-*"))
    if not kernels:
        raise needs.Missing("there is no kernel in .lab/aarch64: run packaging/setup aarch64")
    data, qmp, serial = directory / "data.raw", directory / "qmp", Log(directory / "serial")
    data.touch()
    os.truncate(data, 16 << 20)
    argv: list[str | Path] = [
        program,
        "-name",
        "guest=arm",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]
    argv += ["-M", "virt", "-cpu", "cortex-a53", "-accel", "tcg", "-m", "256"]
    argv += ["-kernel", kernels[-1], "-initrd", _initramfs(directory)]
    argv += ["-append", "console=ttyAMA0 quiet panic=-1", "-serial", f"file:{serial.path}"]
    argv += ["-drive", f"file={data},if=none,id=data,format=raw"]
    argv += ["-device", "virtio-blk-device,drive=data"]
    argv += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    with (directory / "stderr").open("wb") as said:
        process = spawn(argv, stdout=said, stderr=said)
    pidfd = os.pidfd_open(process.pid)
    try:
        found = serial.wait_for(r"^GUEST (READY|ERROR).*$", BOOT_S, pidfd=pidfd)[0]
        assert found.startswith("GUEST READY"), found
        yield process.pid, pidfd, data, qmp
    finally:
        end(process)
        os.close(pidfd)


def _initramfs(directory: Path) -> Path:
    root, archive = directory / "initramfs", directory / "cpio"
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    shutil.copy(_HOME / "bin/busybox", root / "bin")
    for name in _MODULES:
        for module in _HOME.glob(f"lib/modules/*/kernel/drivers/{name}.ko"):
            shutil.copy(module, root / "lib")
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    pack = 'cd "$1" && find . | "$2" -o -H newc -R 0:0 --quiet >"$3"'
    run(["sh", "-c", pack, "sh", root, needs.program("cpio", "cpio"), archive], check=True)
    return archive
