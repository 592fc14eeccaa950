"""Start the guests of a plan inside the throwaway system, and act as the client of every job.

    python -m tests.chaos.agent DIRECTORY STAND-IN SECONDS PATIENCE

The agent reads guests as JSON from its input, one on each line, until an empty line. It prints
{"ready": true}, waits for a line, and then requests each stop at its time. Each further line of
output is an event as JSON, see Event. When every job has a result, or SECONDS and PATIENCE are
over, the agent ends the remaining guests and exits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.chaos.plan import GRACE_S, STALL_S, Act, Guest, Kind
from tests.lab.bus import CallError, Client, plain
from tests.lab.process import end, spawn

BUS: Final = "unix:path=/run/dbus/system_bus_socket"
QEMU: Final = "/usr/bin/qemu-system-x86_64"
JOB: Final = "org.qkilld1.Job"
RETRY_S: Final = 0.2
LINGER_S: Final = GRACE_S + STALL_S + 1
"""How long to record signals of guests after the last job."""
_PASSING: Final = frozenset(
    f"org.freedesktop.DBus.Error.{name}"
    for name in (
        *("NoReply", "Disconnected", "ServiceUnknown", "NameHasNoOwner", "TimedOut", "Timeout"),
        *("Spawn.ExecFailed", "Spawn.ChildExited", "Spawn.ChildSignaled", "Failed"),
    )
) | {"org.freedesktop.systemd1.TransactionIsDestructive"}
"""Transient errors of the bus and of systemd, after which a call is repeated."""


@dataclass(frozen=True)
class Event:
    """An event of a guest. Times are seconds of CLOCK_MONOTONIC."""

    guest: int
    what: str
    """started, asked (a call is sent), answered, refused, looked (the job's properties were read),
    result, lost, gone, alive."""
    at: float
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


_events: queue.SimpleQueue[Event] = queue.SimpleQueue()


def note(guest: int, what: str, at: float | None = None, **detail: Any) -> None:
    _events.put(Event(guest, what, time.monotonic() if at is None else at, detail))


class JobClient:
    """Stops one guest, and follows the job despite all failures. Runs in its own thread."""

    def __init__(self, guest: Guest, pid: int, began: float, until: float) -> None:
        """`began`: the start of the run; `until`: when to stop waiting for the job."""
        self._guest = guest
        self._pid = pid
        self._until = until
        self._began = began

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:
            note(self._guest.number, "fault", error=repr(error))

    def _run(self) -> None:
        time.sleep(max(0.0, self._began + self._guest.start - time.monotonic()))
        body = self._terminate()
        if body is None:
            return
        path = str(body[0])
        answered = time.monotonic()
        acts = threading.Thread(target=self._act, args=(path, answered))
        acts.start()
        ended = threading.Event()
        looks = threading.Thread(target=self._look, args=(path, ended))
        looks.start()
        while (body := self._call("Wait", path=path, interface=JOB)) == ():
            pass
        if body is not None:
            rungs = [(action, usec / 1e6) for _, action, usec in plain(body[1])["rungs"]]
            note(self._guest.number, "result", result=body[0], path=path, rungs=rungs)
        acts.join()
        ended.set()
        looks.join()

    def _terminate(self) -> tuple[Any, ...] | None:
        guest = self._guest
        if not guest.grace_s:
            return self._call("Terminate", "ut", self._pid, guest.flags)
        options = {"grace-usec": ("t", int(guest.grace_s * 1e6))}
        return self._call("TerminateWithOptions", "uta{sv}", self._pid, guest.flags, options)

    def _act(self, path: str, answered: float) -> None:
        for act in self._guest.acts:
            time.sleep(max(0.0, answered + act.after - time.monotonic()))
            arguments = () if act.usec is None else ("t", act.usec)
            if self._call(act.member, *arguments, path=path, interface=JOB) is None:
                return

    def _look(self, path: str, ended: threading.Event) -> None:
        """Read the properties of the job again and again, until the job has ended."""
        if not self._guest.look_s:
            return
        number = self._guest.number
        try:
            with Client(BUS) as client:
                while not ended.is_set():
                    began = time.monotonic()
                    job = client.properties(path, JOB)
                    took = time.monotonic() - began
                    due = job["DeadlineUSec"] / 1e6 if job["NextRung"] == "SIGKILL" else 0.0
                    started = job["StartedUSec"] / 1e6
                    note(number, "looked", took=took, due=due, started=started)
                    ended.wait(self._guest.look_s)
        except (CallError, OSError, EOFError, TimeoutError) as error:
            note(number, "fault", error=f"its properties: {error!r}")

    def _call(self, member: str, *arguments: Any, **where: str) -> tuple[Any, ...] | None:
        """Call a method, again and again until it is answered. Return the body of the reply; None
        if the daemon refuses."""
        number = self._guest.number
        noted = member.removesuffix("WithOptions")
        while True:
            began = time.monotonic()
            if began > self._until:
                note(number, "lost", member=noted, error="no answer")
                return None
            note(number, "asked", began, member=noted)
            try:
                with Client(BUS) as client:
                    body = client.call(member, *arguments, timeout=self._until - began, **where)
                note(number, "answered", member=noted, asked=began, path=str(body[:1]))
                return body
            except CallError as error:
                if error.name not in _PASSING:
                    note(number, "refused", member=noted, name=error.name, text=error.text)
                    return None
            except (OSError, EOFError, TimeoutError, ValueError):
                pass  # There is no bus, or it disappeared during the call.
            time.sleep(RETRY_S)


def _start(guest: Guest, directory: Path, stand_in: str, stack: contextlib.ExitStack) -> int:
    """Start a guest; return its pidfd."""
    name = f"chaos{guest.number}"
    if guest.kind is Kind.QEMU:
        words = [QEMU, "-M", "none", "-nodefaults", "-display", "none", "-name", name]
    else:
        log = str(directory / f"{guest.number}.log")
        words = [stand_in, log, guest.mode, str(guest.milliseconds), "-name", name]
    process = spawn(words)
    stack.callback(end, process)
    pidfd = os.pidfd_open(process.pid)
    stack.callback(os.close, pidfd)
    note(guest.number, "started", pid=process.pid)
    return pidfd


def _exits(pidfds: dict[int, int], stop: threading.Event) -> None:
    """Record when each guest exits. `pidfds`: a pidfd for each guest."""
    remaining = dict(pidfds)
    while remaining and not stop.is_set():
        for pidfd in select.select(list(remaining), [], [], 0.2)[0]:
            at = time.monotonic()
            # Do not reap the guest, because its Popen reaps it.
            status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
            assert status is not None
            number = remaining.pop(pidfd)
            killed = status.si_code != os.CLD_EXITED
            note(number, "gone", at, signal=killed, status=status.si_status)
    for number in remaining.values():
        note(number, "alive")


def _guests() -> Iterator[Guest]:
    while line := sys.stdin.readline().strip():
        fields = json.loads(line)
        acts = tuple(Act(**act) for act in fields.pop("acts"))
        yield Guest(**fields | {"kind": Kind(fields["kind"]), "acts": acts})


def main() -> None:
    directory, stand_in = Path(sys.argv[1]), sys.argv[2]
    waits = sum(map(float, sys.argv[3:]))
    with contextlib.ExitStack() as stack:
        guests = list(_guests())
        pidfds = {_start(guest, directory, stand_in, stack): guest for guest in guests}
        numbers = {pidfd: guest.number for pidfd, guest in pidfds.items()}
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        note(-1, "began", began)
        until = began + waits
        stop = threading.Event()
        watching = threading.Thread(target=_exits, args=(numbers, stop))
        watching.start()
        clients = []
        pids = {event.guest: event.detail["pid"] for event in _take() if event.what == "started"}
        for guest in guests:
            if guest.kind is not Kind.BYSTANDER:
                client = JobClient(guest, pids[guest.number], began, until)
                clients.append(threading.Thread(target=client.run))
                clients[-1].start()
        for thread in clients:
            while thread.is_alive():
                thread.join(0.1)
                _take()
        # If the daemon wrongly sends a signal, it does so within this time.
        linger = time.monotonic() + LINGER_S
        while time.monotonic() < linger:
            time.sleep(0.1)
            _take()
        stop.set()
        watching.join()
        _take()


def _take() -> list[Event]:
    """Return the events recorded since the last call."""
    taken = []
    with contextlib.suppress(queue.Empty):
        while True:
            taken.append(_events.get_nowait())
    for event in taken:
        print(json.dumps(dataclasses.asdict(event)), flush=True)
    return taken


if __name__ == "__main__":
    main()
