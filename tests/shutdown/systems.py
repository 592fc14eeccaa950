"""The rows whose guest runs an operating system: Debian with systemd, or busybox on aarch64.

The guest has eight files that it has not yet written to its disk (tests.lab.debian).
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qkilld.model.guest_state import GuestOrder
from tests.lab.agents import ANSWERING, SILENT
from tests.lab.arm import arm_guest
from tests.lab.debian import FILES, Shell, boot_debian, continued, kept_files, write_files
from tests.lab.log import wait_for_path
from tests.lab.nbd import NbdStore, nbd_store
from tests.lab.process import run
from tests.lab.qmp import Qmp
from tests.shutdown.scene import (
    GuestHandle,
    Launcher,
    Make,
    ProcessLauncher,
    RecordCount,
    Row,
    Scene,
)

WORKS_S: Final = 20
"""How long a shutdown of Debian keeps a processor busy under TCG."""
STOP_JOB_S: Final = 75
_MIB: Final = 1 << 20
_PAUSED_S: Final = 60
_UNIT: Final = "/run/systemd/system/lab-late.service"
_LATE_STOP: Final = (
    f"printf '%s\\n' '[Service]' Type=oneshot RemainAfterExit=yes TimeoutStopSec=infinity"
    f' "ExecStop=/bin/sh -c \\"for i in \\$(seq {STOP_JOB_S * 2}); do'
    ' head -c 65536 /dev/urandom >/data/late; sync /data/late; sleep 0.5; done\\""'
    f" >{_UNIT}; systemctl daemon-reload; systemctl start lab-late"
)
"""The command that starts a service. Stopping this service takes STOP_JOB_S seconds, and it writes
meanwhile."""
_IGNORE: Final = (
    "mkdir -p /run/systemd/logind.conf.d; printf '[Login]\\nHandlePowerKey=ignore\\n'"
    " >/run/systemd/logind.conf.d/lab.conf; systemctl restart systemd-logind"
)
_NO_AGENT: Final = "systemctl stop qemu-guest-agent"


@dataclass
class _Debian:
    shell: Shell
    qmp: Path
    target: GuestHandle


def _files(data: Path) -> RecordCount:
    whole, clean = kept_files(data)
    return RecordCount(whole, FILES, ("file system clean" if clean else "needs recovery",))


def _with_data(words: list[str], drive: str) -> list[str]:
    """Replace the guest's second disk with `drive`."""
    return [f"{drive},if=none,id=data" if "id=data," in word else word for word in words]


@contextlib.contextmanager
def _running(
    directory: Path,
    launcher: Launcher,
    words: Sequence[str],
    *prepare: str,
    monitor: str = "qmp",
) -> Iterator[_Debian]:
    qmp = directory / "qmp"
    words = [*words, f"-{monitor}", f"unix:{qmp},server=on,wait=off"]
    with launcher.start(directory, words) as target:
        wait_for_path(directory / "shell", 60, pidfd=target.pidfd)
        shell = _connect(directory / "shell")
        try:
            shell.wait_until_there()
            for command in prepare:
                shell.run(command)
            write_files(shell)
            # Wait until the guest has finished the work of the commands above, so that it is idle
            # when it is asked.
            time.sleep(3)
            yield _Debian(shell, qmp, target)
        finally:
            shell.close()


def _connect(path: Path) -> Shell:
    deadline = time.monotonic() + 60
    while True:
        try:
            return Shell(path)
        except ConnectionRefusedError:  # QEMU has bound the socket, but does not listen yet.
            assert time.monotonic() < deadline, "the guest does not listen"
            time.sleep(0.02)


def _debian(
    *prepare: str,
    more: Sequence[str] = (),
    agent: bool = False,
    monitor: str = "qmp",
    strike: Callable[[_Debian], None] | None = None,
) -> Make:
    """Make a guest in which the commands `prepare` have run. `monitor`: "qmp", or "monitor" for a
    human monitor."""

    @contextlib.contextmanager
    def make(directory: Path, launcher: Launcher) -> Iterator[Scene]:
        commands = prepare if agent else (_NO_AGENT, *prepare)
        words = [*continued(directory), *more]
        with _running(directory, launcher, words, *commands, monitor=monitor) as debian:
            if strike is not None:
                strike(debian)
            data = directory / "data.qcow2"
            scene = Scene(debian.target, debian.qmp, lambda: _files(data))
            scene.agent = directory / "agent" if agent else None
            yield scene

    return make


def _wait_for_runstate(path: Path, wanted: str) -> None:
    deadline = time.monotonic() + _PAUSED_S
    while True:
        with Qmp(path) as qmp:
            if qmp.call("query-status")["status"] == wanted:
                return
        assert time.monotonic() < deadline, f"the guest does not become {wanted}"
        time.sleep(0.2)


def _pause(debian: _Debian) -> None:
    with Qmp(debian.qmp) as qmp:
        qmp.call("stop")


def _stop(debian: _Debian) -> None:
    debian.target.signal(signal.SIGSTOP)


def _suspend(debian: _Debian) -> None:
    debian.shell.tell("echo mem >/sys/power/state")
    _wait_for_runstate(debian.qmp, "suspended")


def _panic(debian: _Debian) -> None:
    commands = ("sysctl -q kernel.panic=0 kernel.sysrq=1", "echo c >/proc/sysrq-trigger")
    debian.shell.tell("; ".join(commands))
    time.sleep(3)


def _load(debian: _Debian) -> None:
    debian.shell.tell("while :; do head -c 65536 /dev/urandom >/data/load; sync /data/load; done &")
    time.sleep(3)


@contextlib.contextmanager
def _full_disk(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    place = directory / "full"
    place.mkdir()
    data = place / "data.qcow2"
    words = _with_data(continued(directory), f"file={data},format=qcow2")
    run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", place], check=True)
    try:
        data.write_bytes((directory / "data.qcow2").read_bytes())
        with _running(directory, launcher, words, _NO_AGENT) as debian:
            debian.shell.tell("head -c 4M /dev/urandom >/data/more; sync /data/more")
            _wait_for_runstate(debian.qmp, "io-error")
            yield Scene(debian.target, debian.qmp, lambda: _files(data))
    finally:
        run(["umount", "--lazy", place], check=True)


@contextlib.contextmanager
def _on_nbd(
    directory: Path, launcher: Launcher, *prepare: str
) -> Iterator[tuple[_Debian, NbdStore, Scene]]:
    words = continued(directory)
    data = directory / "data.qcow2"
    with data.open("r+b") as image:
        image.truncate(data.stat().st_size + 32 * _MIB)
    with nbd_store(data) as store:
        place = f"file.server.type=unix,file.server.path={store.server()['path']}"
        words = _with_data(words, f"driver=qcow2,file.driver=nbd,{place}")
        with _running(directory, launcher, words, _NO_AGENT, *prepare) as debian:
            yield debian, store, Scene(debian.target, debian.qmp, lambda: _files(data))


@contextlib.contextmanager
def _storage_freezes(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    """One second after the request, freeze the storage for 30 s."""
    with _on_nbd(directory, launcher) as (_, store, scene):
        scene.recover = store.thaw
        scene.later = [(1, store.freeze), (31, store.thaw)]
        yield scene


@contextlib.contextmanager
def _storage_becomes_slow(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    """20 s after the request, make the storage of a busy guest slow."""
    with _on_nbd(directory, launcher, _IGNORE) as (debian, store, scene):
        _load(debian)
        scene.recover = store.fast
        scene.later = [(20, lambda: store.slow("400K"))]
        yield scene


@contextlib.contextmanager
def _held(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    """Let another program use the only monitor."""
    with _debian()(directory, launcher) as scene, Qmp(scene.qmp):
        yield scene


def _booting(seconds: float) -> Make:
    """Make a guest that is stopped this long after its start. Its boot takes at least 30 s."""

    @contextlib.contextmanager
    def make(directory: Path, launcher: Launcher) -> Iterator[Scene]:
        with boot_debian(state=False, wait=False) as debian:
            guest = debian.guest
            time.sleep(seconds)
            root = debian.data.with_name("root.qcow2")

            def count() -> RecordCount:
                return RecordCount(0, 0, (_files(root).notes[0],))

            assert guest.qmp is not None
            yield Scene(GuestHandle(guest.pid, guest.pidfd), guest.qmp, count)

    return make


@contextlib.contextmanager
def _aarch64(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    assert isinstance(launcher, ProcessLauncher)
    with arm_guest(directory) as (pid, pidfd, data, qmp):
        yield Scene(GuestHandle(pid, pidfd), qmp, lambda: RecordCount(_count_blocks(data), FILES))


def _count_blocks(data: Path) -> int:
    """Count the blocks that the aarch64 guest wrote to a raw disk, one after another."""
    content = data.read_bytes()
    return sum(
        content[n * 65536 : (n + 1) * 65536] == str(n + 1).encode() * 65536 for n in range(FILES)
    )


_CLEAN: Final = "file system clean"
_ALONE: Final = ("qkilld",)
_WITHOUT_LIBVIRT: Final = ("qkilld", "sigterm", "proxmox", "press")


def _row(title: str, make: Make, kept: int = FILES, **more: object) -> Row:
    fixed = {"asked": "shut-down", "note": _CLEAN if kept else "", "works_s": WORKS_S}
    return Row(title, make, kept, **{**fixed, **more})  # type: ignore[arg-type]


ROWS: Final = {
    "agent": _row("Debian with its agent", _debian(agent=True)),
    "button": _row("Debian without an agent", _debian()),
    "hmp": _row(
        "Debian with a human monitor alone",
        _debian(monitor="monitor"),
        columns=("qkilld", "sigterm"),
    ),
    "agent-answers": _row(
        "Debian, its agent answers and does nothing", _debian(ANSWERING, agent=True)
    ),
    "agent-silent": _row("Debian, its agent does not answer", _debian(SILENT, agent=True)),
    "held": _row(
        "Debian, another program uses its monitor",
        _held,
        kept=0,
        asked="unreachable",
        columns=_WITHOUT_LIBVIRT,
    ),
    "libvirt": _row(
        "a guest of libvirt's: Debian",
        _debian(),
        by_libvirt=True,
        columns=("qkilld", "virsh", "sigterm"),
    ),
    "stop-job": _row(f"Debian, a service needs {STOP_JOB_S} s to stop", _debian(_LATE_STOP)),
    "freezes": _row("Debian, its storage freezes in the shutdown, for 30 s", _storage_freezes),
    "no-shutdown": _row("Debian, -no-shutdown", _debian(more=["-no-shutdown"])),
    "aarch64": _row(
        "busybox on aarch64 virt",
        _aarch64,
        note="",
        columns=_WITHOUT_LIBVIRT,
    ),
    **{
        f"booting-{seconds}": _row(
            f"Debian, {seconds} s after its start",
            _booting(seconds),
            kept=0,
            columns=_WITHOUT_LIBVIRT,
            note=_CLEAN,
        )
        for seconds in (0.5, 2, 15)
    },
    "ignores": _row("Debian ignores the button, idle", _debian(_IGNORE), kept=0, asked="ignored"),
    "loaded": _row(
        "Debian ignores the button, at full load",
        _debian(_IGNORE, strike=_load),
        kept=0,
        asked="ignored",
    ),
    "loaded-slow": _row(
        "Debian ignores the button, at full load, its storage becomes slow after 20 s",
        _storage_becomes_slow,
        kept=0,
        asked="ignored",
    ),
    "loaded-stops": _row(
        f"Debian at full load, a service needs {STOP_JOB_S} s to stop",
        _debian(_LATE_STOP, strike=_load),
    ),
    "deaf": _row("Debian does not listen to the button", _debian("rmmod button"), 0, asked="deaf"),
    "panic": _row(
        "Debian's kernel has panicked, nobody is told", _debian(strike=_panic), 0, asked="ignored"
    ),
    "stopped": _row("Debian, paused", _debian(strike=_pause), 0, asked="not-running"),
    "resumed": _row(
        "Debian, paused; with option resume",
        _debian(strike=_pause),
        help=(GuestOrder.RESUME,),
        columns=_ALONE,
    ),
    "halted": _row(
        "Debian, its process is stopped (SIGSTOP)",
        _debian(strike=_stop),
        kept=0,
        asked="not-running",
        columns=_ALONE,
    ),
    "continued": _row(
        "Debian, its process is stopped (SIGSTOP); with option resume",
        _debian(strike=_stop),
        help=(GuestOrder.RESUME,),
        columns=_ALONE,
    ),
    # Linux writes its files before it suspends.
    "suspended": _row(
        "Debian, suspended", _debian(strike=_suspend), asked="not-running", note="needs recovery"
    ),
    "woken": _row(
        "Debian, suspended; with option wake",
        _debian(strike=_suspend),
        help=(GuestOrder.WAKE,),
        columns=_ALONE,
    ),
    "full": _row(
        "Debian, paused by a full disk",
        _full_disk,
        kept=0,
        asked="not-running",
        at_risk=("io-error",),
    ),
}
