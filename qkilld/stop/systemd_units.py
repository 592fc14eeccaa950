"""Ask systemd over D-Bus about the helper's own unit (if the daemon does not know it) and about the
units of other guests."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final, TypeVar

from qkilld.debug_log import ignore, note
from qkilld.decision.unit_limits import being_stopped
from qkilld.model.bus_address import SESSION_BUS, SYSTEM_BUS
from qkilld.model.errors import BusError, QkilldError
from qkilld.model.text import MAX_TEXT, printable
from qkilld.model.unit import Command, UnitFacts, is_user_manager
from qkilld.stop.log import say
from qkilld.stop.process import ProcessHandle

if TYPE_CHECKING:
    from qkilld.bus.connection import Connection
    from qkilld.stop.finder import OutsideGuest

CONNECT_TIMEOUT_S: Final = 2.0
TIMEOUT_S: Final = 2.0

T = TypeVar("T")


def on_bus(what: Callable[[Connection | str], Awaitable[T]], *, user: bool) -> T:
    """Run `what` with a connection to systemd's bus, or with the reason why there is none.

    Blocks. `user`: use the bus of the user manager.
    """

    async def work() -> T:
        bus = SESSION_BUS if user else SYSTEM_BUS
        connection: Connection | str
        try:
            _find_packages()
            # dbus_next may be missing, or too old for this Python.
            from qkilld.bus.connection import connect

            connection = await connect(bus, timeout_s=CONNECT_TIMEOUT_S)
        except BusError as error:
            connection = str(error)
        except Exception as error:
            fault = printable(f"{type(error).__name__}: {error}", MAX_TEXT)
            connection = f"the bus cannot be used: {fault}"
        try:
            return await what(connection)
        finally:
            if not isinstance(connection, str):
                connection.close()

    return asyncio.run(work())


def _find_packages() -> None:
    """Make packages outside the standard library importable. qkilld-stop is run with `python -S`,
    which saves 3 ms of the 10 ms that Python takes to start."""
    if sys.flags.no_site:
        import site

        site.main()


async def own_facts(connection: Connection | str) -> UnitFacts | None:
    """Return the settings of our own unit; None if systemd cannot be asked, or is not stopping the
    unit."""
    facts = await _facts(connection)
    return facts if facts is not None and being_stopped(facts) else None


def later_line_stops(facts: UnitFacts, *, fails: bool) -> bool:
    """Return whether it is certain that a later line of ExecStop= stops the other guests of the
    unit. `fails`: the running line fails. systemd then runs no later line, unless the running line
    has the prefix `-`."""
    from qkilld.unitcheck.command import runs_alike
    from qkilld.unitcheck.helper_usage import stops_own_unit

    lines = _running_line(facts)
    if not lines or (fails and not lines[0].ignores_failure):
        return False
    for line in lines[1:]:
        # Another program may not exist, and another prefix may hide the bus or the guests.
        if runs_alike(line, lines[0]) and stops_own_unit(line):
            return True
        # After a failure, systemd runs no later line.
        if not (line.ignores_failure and _ignores_guests(line)):
            return False
    return False


def _ignores_guests(line: Command) -> bool:
    """Return whether it is certain that the line does nothing to a guest, and does not wait."""
    from qkilld.unitcheck.stop_act import ActKind
    from qkilld.unitcheck.stop_line import read_line

    return all(act.kind is ActKind.NOTHING for act in read_line(line).acts)


def is_only_line(facts: UnitFacts) -> bool:
    """Return whether the unit has a single line of ExecStop=, which runs this program directly."""
    return len(facts.exec_stop) == 1 and _running_line(facts) == facts.exec_stop


def _running_line(facts: UnitFacts) -> tuple[Command, ...]:
    """Return the line that runs this program directly, and the lines after it; nothing if that is
    unknown."""
    from qkilld.unitcheck.command import helper_words, is_helper

    after = tuple(each for name, each in facts.other_commands if name == "ExecStopPost=")
    lines = [each[n:] for each in (facts.exec_stop, after) for n in range(len(each))]
    for line in lines:
        if line[0].pid and line[0].pid == facts.control_pid:
            return line if is_helper(line[0]) else ()
    if facts.control_pid != os.getpid():
        return ()
    # After a daemon-reload, systemd does not know which line is running.
    like = [line for line in lines if is_helper(line[0]) and _may_be_ours(helper_words(line[0]))]
    return like[0] if len(like) == 1 else ()


def _may_be_ours(words: Iterable[str]) -> bool:
    """Return whether our command line may be these words of a unit file. A variable may stand for
    anything."""
    fixed = re.split(r"\0?\$[^\0]*", "".join(f"\0{word}" for word in words))
    ours = "".join(f"\0{word}" for word in sys.argv[1:])
    return re.fullmatch(".*".join(map(re.escape, fixed)), ours, re.DOTALL) is not None


def started_as_qemu(facts: UnitFacts, globs: Iterable[str]) -> bool:
    """Return whether the main process is, or was, the QEMU in ExecStart=. A service of another
    type, such as forking, may have no main process, or one that only starts QEMU."""
    from qkilld.unitcheck.context import runs_qemu

    starts = facts.exec_start
    simple = facts.type in ("simple", "exec", "idle", "notify", "notify-reload", "dbus")
    if not simple or len(starts) != 1 or not runs_qemu(starts[0], globs):
        return False
    return {"-daemonize", "--daemonize"}.isdisjoint(starts[0].arguments)


async def limiting_units(
    connection: Connection | str, pids: Iterable[int]
) -> tuple[UnitFacts, dict[int, UnitFacts]] | None:
    """Return the settings of our own unit, and of the unit of each process if that unit is known.
    Return None if own_facts() returns None."""
    own = await own_facts(connection)
    if own is None or isinstance(connection, str):
        return None
    from qkilld.bus.systemd import Systemd

    systemd = Systemd(connection, timeout_s=TIMEOUT_S)
    units: dict[int, UnitFacts] = {}
    for pid in pids:
        with ignore(f"asking systemd for the unit of process {pid}", QkilldError):
            units[pid] = await systemd.unit_of(pid)
    return own, units


async def guest_of_own_unit(
    connection: Connection | str, guests: Iterable[OutsideGuest]
) -> OutsideGuest | None:
    """Return the guest that the ExecStart= of our own unit starts; None if it is not among `guests`
    or if systemd cannot be asked."""
    from qkilld.unitcheck.context import is_guest_of

    facts = await _facts(connection)
    if facts is None:
        return None
    return next((each for each in guests if is_guest_of(facts, each.name, each.words)), None)


async def _facts(connection: Connection | str) -> UnitFacts | None:
    if isinstance(connection, str):
        return None
    from qkilld.bus.systemd import Systemd

    try:
        return await Systemd(connection, timeout_s=TIMEOUT_S).unit_of(0)
    except QkilldError as error:
        note("asking systemd for the unit of this process", error)
        return None


async def check_unit(connection: Connection | str, name: str) -> None:
    """Raise NoSuchUnit if systemd does not know the unit."""
    if not isinstance(connection, str):
        from qkilld.bus.systemd import Systemd

        with ignore(f"asking systemd for {name}", BusError):
            await Systemd(connection).unit(name)


async def unattended(
    guests: Iterable[tuple[ProcessHandle, str | None]], connection: Connection | str
) -> list[ProcessHandle]:
    """Return the guests whose units are known not to stop them. Close the handles of the others.

    `guests`: each with its unit, "" for none, None if unknown. `connection`: a connection to the
    bus of the units' manager, or the reason why there is none.
    """
    attended: dict[str, bool] = {}
    processes = []
    for process, unit in guests:
        if unit is None:
            say(f"process {process.pid} is not stopped, because its unit cannot be read")
            process.close()
            continue
        if unit not in attended:
            attended[unit] = await _is_attended(unit, connection)
        if attended[unit]:
            process.close()
        else:
            processes.append(process)
    return processes


async def _is_attended(unit: str, connection: Connection | str) -> bool:
    """Return True if the unit's own ExecStop= stops its guests, or if that is unknown."""
    # Scopes and user managers do not stop guests, so systemd need not be asked.
    if not unit.endswith(".service") or is_user_manager(unit):
        return False
    why = connection
    if not isinstance(connection, str):
        from qkilld.bus.systemd import Systemd

        try:
            return (await Systemd(connection, timeout_s=TIMEOUT_S).unit(unit)).cares_for_guests
        except QkilldError as error:
            why = str(error)
    # Do not stop the guests here: a signal could interrupt an orderly shutdown by the unit's
    # ExecStop=.
    say(f"the guests in {unit} are left to that unit, because its settings are unknown: {why}")
    return True
