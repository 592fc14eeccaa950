"""Execute one run: boot a throwaway system, start the agent in it, and cause failures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from tests.chaos import late, rules
from tests.chaos.agent import Event
from tests.chaos.plan import CONFIG, Fault, Guest, Incident, Kind, Plan
from tests.lab import needs
from tests.lab.container import CHECKOUT, PYTHON, Container
from tests.lab.journald import fill_journald
from tests.lab.scratch import scratch
from tests.safety.contained import ContainerPolicy

STAND_IN: Final = "/usr/local/bin/qemu-system-x86_64"
HOME: Final = "/var/lib/chaos"
CLOCK: Final = f"{HOME}/clock"
"""The file that sets the daemon's time of day, for faketime(1)."""
RUN_BYTES: Final = "64M"
_FILL: Final = "/run/filled"
END_S: Final = 150.0
"""How long the agent may take to exit after it has waited for the last job."""


@dataclass
class Report:
    plan: Plan
    records: Sequence[rules.Record]
    incidents: Sequence[rules.Lasted]
    seconds: float
    restarts: int
    """How often systemd restarted the daemon."""
    events: Sequence[Event]
    kills: int
    """How often the daemon got SIGKILL. A planned SIGKILL may find no daemon."""
    ends: Sequence[str]
    """How each daemon ended, according to systemd."""
    journal: Sequence[dict[str, Any]]
    """The daemon's journal entries, if the plan delays journald."""

    def outcomes(self) -> Counter[str]:
        return Counter(rules.outcome(one, self.incidents) or "MISSING" for one in self.records)

    def late(self) -> late.Figures | None:
        """Return the figures of a run in which only journald failed, and only once; None for other
        runs."""
        incidents = [one for one in self.incidents if one[0].fills]
        return late.figures(self.records, incidents[0], self.journal) if incidents else None

    def broken(self) -> list[str]:
        """Return the broken rules."""
        missed = sum(one.retry_s > 0 for one in self.plan.incidents) - self.kills
        figures = self.late()
        only_kills = all(one.retry_s > 0 for one in self.plan.incidents)
        others = [end for end in self.ends if "status=9/KILL" not in end] if only_kills else []
        return [
            *([f"{missed} SIGKILLs found no daemon"] if missed > 0 else []),
            *others,
            *(figures.broken() if figures is not None else []),
            *self._broken_rules(),
        ]

    def _broken_rules(self) -> list[str]:
        return [
            f"guest {record.guest.number} ({record.guest.kind}): {text}"
            for record in self.records
            for text in rules.broken(record, self.incidents)
        ]


def run(system: Container, plan: Plan) -> Report:
    """Run a plan in a system in which the daemon is installed. The system cannot be used again.

    Raises needs.Missing.
    """
    with scratch("h") as home:
        return _run(system, plan, home)


def _run(system: Container, plan: Plan, home: Path) -> Report:
    """Run a plan. Guests write to `home`, which is on a disk, because writes to files in memory do
    not count as progress."""
    _prepare(system, plan)
    began = time.monotonic()
    with system.spawn(
        *(PYTHON, "-m", "tests.chaos.agent", str(home), STAND_IN, str(plan.seconds)),
        str(plan.patience_s),
        stdin=subprocess.PIPE,
        stderr=None,
    ) as agent:
        assert agent.stdin is not None and agent.stdout is not None
        for guest in plan.guests:
            agent.stdin.write(json.dumps(dataclasses.asdict(guest)).encode() + b"\n")
        agent.stdin.write(b"\n")
        agent.stdin.flush()
        assert agent.stdout.readline() == b'{"ready": true}\n', "the agent did not start"
        agent.stdin.write(b"\n")
        agent.stdin.flush()
        events: list[Event] = []
        reading = threading.Thread(target=_read, args=(agent.stdout, events))
        reading.start()
        try:
            incidents, kills = _happen(system, plan.incidents)
            reading.join(plan.patience_s + END_S)
            assert not reading.is_alive(), "the agent has not ended"
        finally:
            if reading.is_alive():
                agent.kill()
                reading.join()
        assert agent.wait(30) == 0, "the agent failed, see the messages above"
    took = time.monotonic() - began
    logs = {guest: _log(home, guest) for guest in plan.guests}
    records = [
        rules.record_of(guest, [one for one in events if one.guest == guest.number], logs[guest])
        for guest in plan.guests
    ]
    reads = any(incident.fills for incident in plan.incidents)
    return Report(
        plan=plan,
        records=records,
        incidents=incidents,
        seconds=took,
        restarts=int(system.property("qkilld.service", "NRestarts")),
        events=events,
        kills=kills,
        ends=[
            entry["MESSAGE"]
            for entry in system.journal("_PID=1", "UNIT=qkilld.service")
            if "Main process exited" in entry["MESSAGE"]
        ],
        journal=system.journal("SYSLOG_IDENTIFIER=qkilld") if reads else [],
    )


def _prepare(system: Container, plan: Plan) -> None:
    ContainerPolicy(system).show_storage()
    system.run("mkdir", "-p", HOME)
    system.run("gcc", "-O2", "-Wall", "-o", STAND_IN, f"{CHECKOUT}/tests/chaos/stand_in.c")
    system.write("/etc/qkilld/qkilld.conf", CONFIG)
    lines = ["[Service]"]
    if any(incident.fault is Fault.CLOCK for incident in plan.incidents):
        # Load the library only for a plan that changes the clock, because it makes the daemon slow.
        system.write(CLOCK, "+0\n")
        lines += [
            f"Environment=LD_PRELOAD={_faketime()} FAKETIME_TIMESTAMP_FILE={CLOCK}",
            "Environment=FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1",
        ]
    if plan.realtime:
        lines.append("CPUSchedulingPolicy=rr")
    system.write("/etc/systemd/system/qkilld.service.d/chaos.conf", "\n".join([*lines, ""]))
    system.run("mount", "-o", f"remount,size={RUN_BYTES}", "/run")
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "restart", "qkilld.service")


def _faketime() -> str:
    """Return the library that changes the clock of one program."""
    for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1"):
        return str(path)
    raise needs.Missing("libfaketime is not installed: apt-get install libfaketime")


def _read(output: IO[bytes], events: list[Event]) -> None:
    for line in output:
        text = line.decode(errors="replace")
        try:
            events.append(Event(**json.loads(text)))
        except (ValueError, TypeError):
            events.append(Event(-1, "said", time.monotonic(), {"text": text}))


def _happen(system: Container, incidents: Sequence[Incident]) -> tuple[list[rules.Lasted], int]:
    """Cause all incidents at their times, and undo them.

    Return the incidents with their times, and how often the daemon was killed.
    """
    kills = 0
    began = time.monotonic()
    ends: list[tuple[float, int]] = []
    lasted: list[rules.Lasted] = []
    todo = sorted(range(len(incidents)), key=lambda i: incidents[i].at)
    begins: dict[int, float] = {}
    try:
        while todo or ends:
            first = incidents[todo[0]].at if todo else float("inf")
            last = min(ends, default=(float("inf"), -1))
            time.sleep(max(0.0, began + min(first, last[0]) - time.monotonic()))
            if first <= last[0]:
                number = todo.pop(0)
                begins[number] = time.monotonic()
                happened = _begin(system, incidents[number])
                kills += happened and incidents[number].fault is Fault.KILL
                if incidents[number].retry_s:
                    # If this SIGKILL was late, delay the later incidents, too, because systemd
                    # limits how often the daemon may start in a minute.
                    planned = incidents[number].at + (incidents[number].ready_s or 0.0)
                    began = max(began, time.monotonic() - planned)
                ends.append((incidents[number].at + incidents[number].lasts, number))
            else:
                ends.remove(last)
                number = last[1]
                _end(system, incidents[number])
                lasted.append((incidents[number], begins[number], time.monotonic()))
    finally:
        for _, number in ends:
            _end(system, incidents[number])
        for unit in ("dbus.service", "systemd-journald.service"):
            system.run("systemctl", "start", unit, check=False)
    return lasted, kills


def _begin(system: Container, incident: Incident) -> bool:
    """Begin an incident. Return False if there was no daemon to kill."""
    match incident.fault:
        case Fault.KILL:
            deadline = time.monotonic() + incident.retry_s
            if incident.ready_s is not None:
                while system.property("qkilld.service", "ActiveState") != "active":
                    if time.monotonic() >= deadline:
                        return False
                time.sleep(incident.ready_s)
            while not _signal(system, "KILL", "qkilld.service"):
                if time.monotonic() >= deadline:
                    return False
        case Fault.STOP:
            _signal(system, "STOP", "qkilld.service")
        case Fault.BUS:
            system.run("systemctl", "restart", "--no-block", "dbus.service", check=False)
        case Fault.JOURNALD:
            _signal(system, "STOP", "systemd-journald.service")
            if incident.fills:
                fill_journald(system)
        case Fault.FULL:
            system.run("dd", "if=/dev/zero", f"of={_FILL}", "bs=1M", check=False)
        case Fault.REEXEC:
            system.run("systemctl", "daemon-reexec", check=False)
        case Fault.CLOCK:
            system.write(f"{CLOCK}.new", f"{incident.shift:+d}\n")
            system.run("mv", f"{CLOCK}.new", CLOCK)
    return True


def _end(system: Container, incident: Incident) -> None:
    match incident.fault:
        case Fault.STOP:
            _signal(system, "CONT", "qkilld.service")
        case Fault.JOURNALD:
            _signal(system, "CONT", "systemd-journald.service")
        case Fault.FULL:
            system.run("rm", "-f", _FILL)


def _signal(system: Container, name: str, unit: str) -> bool:
    """Send a signal to the main process of a unit; return whether there is one. systemctl is not
    used, because it could block on a service that got SIGSTOP."""
    return system.run("pkill", f"-{name}", "-f", _MAIN[unit], check=False).returncode == 0


_MAIN: Final = {
    "qkilld.service": r"/usr/bin/qkilld( |$)",
    "systemd-journald.service": r"^/(usr/)?lib/systemd/systemd-journald",
}
"""Patterns for the command lines of the units' main processes."""


def _log(home: Path, guest: Guest) -> str:
    return "" if guest.kind is Kind.QEMU else (home / f"{guest.number}.log").read_text()


@contextlib.contextmanager
def prepared() -> Iterator[Container]:
    """Boot a system in which the daemon is installed. Raises needs.Missing."""
    from tests.lab import container

    with container.boot() as system:
        container.install(system)
        yield system
