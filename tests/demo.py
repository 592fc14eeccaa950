"""`make demo`: boot a real guest, start the daemon on a private bus, stop the guest.

The demo does not use the host's own bus or units, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from tests.lab import bus as lab_bus
from tests.lab import debian, needs, process, scratch
from tests.lab import guest as lab_guest
from tests.lab.process import spawn

MANAGER = "org.qkilld1 /org/qkilld1 org.qkilld1.Manager"


def main() -> int:
    process.become_subreaper()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(scratch.remove_run_directory)
            _play(stack)
    except needs.Missing as missing:
        print(f"\nThe demo needs something that is not here: {missing}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; everything is taken down.", file=sys.stderr)
        return 130
    return 0


def _play(stack: contextlib.ExitStack) -> None:
    _say("1. A real guest: QEMU boots Linux, which says so on its serial line.")
    began = time.monotonic()
    web = stack.enter_context(lab_guest.boot_guest(name="web", uuid=_uuid(1)))
    print(f'   guest "web" is up after {time.monotonic() - began:.1f} s: process {web.pid}')

    _say("2. A private bus, and the daemon on it.")
    bus = stack.enter_context(lab_bus.private_bus())
    daemon = stack.enter_context(
        lab_bus.daemon(bus, config=f"[Target]\nExecutables={lab_guest.own_qemus()}\n")
    )
    print(f"   qkilld is process {daemon.pid}; `busctl` below talks to it through that bus")
    _busctl(bus, f"call {MANAGER} ListGuests")

    _say("3. The guest is stopped over D-Bus: Terminate replies at once, Wait at the end.")
    _busctl(bus, f"call {MANAGER} Terminate ut {web.pid} 0")
    _busctl(bus, "call org.qkilld1 /org/qkilld1/job/1 org.qkilld1.Job Wait")
    print(f"   QEMU's own exit code: {web.wait_gone()}")

    _say("4. One that cannot take its SIGTERM, for it is stopped: the evidence says what to do.")
    stopped = stack.enter_context(lab_guest.start_qemu(name="stopped", uuid=_uuid(2)))
    stopped.signal(signal.SIGSTOP)
    _qkillctl(bus, "terminate --force --wait stopped")
    print(f"   QEMU's own exit code: {stopped.wait_gone()}")

    _say("   Another one by the clock of 2012, which does not look: SIGKILL after 10 s.")
    other = stack.enter_context(lab_guest.start_qemu(name="other", uuid=_uuid(3)))
    other.signal(signal.SIGSTOP)
    _qkillctl(bus, "terminate --force --fixed --wait other")
    print(f"   QEMU was ended by signal {-(other.wait_gone() or 0)}")

    _say(
        "5. Eight files that a Debian guest has yet to write: stopped by SIGTERM, then asked first."
    )
    try:
        for option in ("", " --powerdown"):
            _stop_debian(bus, option)
    except needs.Missing as missing:
        print(f"   left out: {missing}")

    _say("6. What is no QEMU is not touched, whoever asks.")
    with _sleeper() as pid:
        _busctl(bus, f"call {MANAGER} Terminate ut {pid} 1")

    _say("7. What the daemon wrote meanwhile (under systemd: to the journal, with every field).")
    daemon.wait_for("was killed")
    print("   " + daemon.stderr.text().rstrip().replace("\n", "\n   "))

    _say("That was all: the guests, the bus and the daemon are taken down now.")


def _stop_debian(bus: lab_bus.Bus, option: str) -> None:
    """Stop a Debian guest that has some files only in memory, and count which of them are on its
    disk afterwards."""
    with debian.boot_debian() as guest:
        guest.write_files()
        _qkillctl(bus, f"terminate{option} --wait debian")
        guest.guest.wait_gone(60)
        kept, clean = guest.kept()
    state = "clean" if clean else "in need of recovery"
    print(f"   {kept} of {debian.FILES} files are on its disk, and its file system is {state}")


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _busctl(bus: lab_bus.Bus, arguments: str) -> None:
    print(f"   $ busctl {arguments}")
    began = time.monotonic()
    done = bus.busctl(*shlex.split(arguments), check=False)
    took = time.monotonic() - began
    print(f"   {(done.stdout or done.stderr).strip()}   [{took * 1000:.0f} ms]", flush=True)


def _qkillctl(bus: lab_bus.Bus, arguments: str) -> None:
    """Run qkillctl on our own terminal, so that it shows its live line."""
    print(f"   $ qkillctl {arguments}", flush=True)
    argv = [sys.executable, "-m", "qkilld.ctl", "--bus", bus.address, *shlex.split(arguments)]
    client = spawn(argv, env=lab_bus.environment(bus.address))
    try:
        print(f"   qkillctl's exit code: {client.wait()}", flush=True)
    finally:
        process.end(client)


@contextlib.contextmanager
def _sleeper() -> Iterator[int]:
    sleeper = spawn(["sleep", "infinity"])
    try:
        yield sleeper.pid
    finally:
        process.end(sleeper)


def _uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    os.chdir(process.TOP)
    sys.exit(main())
