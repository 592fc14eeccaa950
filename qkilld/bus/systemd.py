"""Client of systemd's bus interface: org.freedesktop.systemd1(5).

The system manager answers on the system bus, a user manager on its session bus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from qkilld.bus.connection import CallFailed, Connection
from qkilld.model.constants import INFINITY
from qkilld.model.errors import InvalidArgs, NoSuchUnit
from qkilld.model.text import printable
from qkilld.model.unit import HELPER_CALLS, Command, UnitFacts

NAME: Final = "org.freedesktop.systemd1"
TIMEOUT_S: Final = 5.0
"""systemd answers in milliseconds; if it does not answer within this time, it is unreachable."""
KINDS: Final = {".service": "Service", ".scope": "Scope"}
"""The kinds of units in which guests can run. Maps the name suffix to the D-Bus interface."""

_PATH: Final = "/org/freedesktop/systemd1"
_MANAGER: Final = "org.freedesktop.systemd1.Manager"
_UNIT: Final = "org.freedesktop.systemd1.Unit"
_PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_GIVES: Final = {
    "GetUnitByPID": "o",
    "ListUnitsByPatterns": "a(ssssssouso)",
    "LoadUnit": "o",
    "StartUnit": "o",
    "StopUnit": "o",
}
_NO_SUCH_UNIT: Final = frozenset(
    f"{NAME}.{name}" for name in ("NoSuchUnit", "NoUnitForPID", "LoadFailed", "UnitMasked")
)


class Systemd:
    """A systemd manager. Every method raises BusError if the manager cannot be reached, Failed if
    it refuses."""

    def __init__(self, connection: Connection, *, timeout_s: float = TIMEOUT_S) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    async def unit(self, name: str) -> UnitFacts:
        """Read all properties of one unit. If the unit does not run, systemd reads its file.

        Raises InvalidArgs if the name is not that of a service or scope, NoSuchUnit if systemd
        knows no such unit.
        """
        if not name.endswith(tuple(KINDS)):
            raise InvalidArgs(f'"{printable(name)}" is neither a .service nor a .scope')
        try:
            path = await self._manager("LoadUnit", "s", name)
        except CallFailed as error:
            if error.name in _NO_SUCH_UNIT:
                raise _no_such(name) from None
            if error.name == "org.freedesktop.DBus.Error.InvalidArgs":
                raise InvalidArgs(f'"{printable(name)}" cannot be the name of a unit') from None
            raise
        facts = await self._facts(path)
        if facts.load_state == "not-found":
            raise _no_such(name)
        return facts

    async def units_after(self, target: str) -> tuple[str, ...]:
        """List the units that are ordered after a target."""
        path = await self._manager("LoadUnit", "s", target)
        return (await self._facts(path)).before

    async def is_before(self, name: str, other: str) -> bool | None:
        """Return whether a unit of any kind is ordered before another one; None if systemd knows no
        such unit."""
        facts = await self._facts(await self._manager("LoadUnit", "s", name))
        return other in facts.before if facts.exists else None

    async def unit_of(self, pid: int) -> UnitFacts:
        """Read the unit of a process. Pid 0 means our own. Raises NoSuchUnit."""
        try:
            path = await self._manager("GetUnitByPID", "u", pid)
        except CallFailed as error:
            if error.name in _NO_SUCH_UNIT:
                raise NoSuchUnit(f"Process {pid} is in no unit of systemd") from None
            raise
        return await self._facts(path)

    async def list_units(
        self,
        *patterns: str,
        states: Sequence[str] = ("active", "activating", "deactivating", "reloading"),
    ) -> list[str]:
        """List the loaded units that match one of the globs and are in one of these states."""
        rows = await self._manager("ListUnitsByPatterns", "asas", list(states), list(patterns))
        return [str(unit[0]) for unit in rows]

    async def own_job(self) -> str:
        """Return the type of systemd's job for the unit of this process: stop, restart, …; "" for
        none. Raises NoSuchUnit."""
        try:
            path = await self._manager("GetUnitByPID", "u", 0)
        except CallFailed as error:
            if error.name in _NO_SUCH_UNIT:
                raise NoSuchUnit("This process is in no unit of systemd") from None
            raise
        return await self._job_type(path)

    async def job_type(self, name: str) -> str:
        """Return the type of systemd's job for a unit: stop, restart, …; "" for none."""
        return await self._job_type(await self._manager("LoadUnit", "s", name))

    async def start(self, name: str) -> None:
        """Enqueue a start of a unit, without waiting for it. Raises NoSuchUnit."""
        await self._act("StartUnit", name)

    async def stop(self, name: str) -> None:
        """Enqueue a stop of a unit, without waiting for it. Raises NoSuchUnit."""
        await self._act("StopUnit", name)

    async def reload(self) -> None:
        """Reload the unit files, as `systemctl daemon-reload` does."""
        # Allow more time: systemd replies after the reload, and with many units, the reload takes
        # long.
        await self._connection.request(NAME, _PATH, _MANAGER, "Reload", timeout_s=90)

    async def search_path(self) -> list[str]:
        """List the directories of unit files and drop-ins, by precedence."""
        properties = await self._properties(_PATH, _MANAGER)
        return [str(path) for path in properties["UnitPath"]]

    async def _act(self, member: str, name: str) -> None:
        try:
            await self._manager(member, "ss", name, "replace")
        except CallFailed as error:
            if error.name in _NO_SUCH_UNIT:
                raise _no_such(name) from None
            raise

    async def _manager(self, member: str, signature: str, *body: Any) -> Any:
        (answer,) = await self._connection.request(
            NAME,
            _PATH,
            _MANAGER,
            member,
            signature,
            list(body),
            timeout_s=self._timeout_s,
            gives=_GIVES[member],
        )
        return answer

    async def _job_type(self, path: str) -> str:
        number, job = (await self._properties(path, _UNIT))["Job"]
        if not number:
            return ""
        return str((await self._properties(job, f"{NAME}.Job"))["JobType"])

    async def _facts(self, path: str) -> UnitFacts:
        unit = await self._properties(path, _UNIT)
        name = str(unit["Id"])
        interface = next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)
        # For units of other kinds (mounts, for example), read only the general properties.
        specific = await self._properties(path, f"{NAME}.{interface}") if interface else {}
        return _facts(unit, specific)

    async def _properties(self, path: str, interface: str) -> dict[str, Any]:
        (properties,) = await self._connection.request(
            NAME,
            path,
            _PROPERTIES,
            "GetAll",
            "s",
            [interface],
            timeout_s=self._timeout_s,
            gives="a{sv}",
        )
        return {key: variant.value for key, variant in properties.items()}


def _facts(unit: dict[str, Any], own: dict[str, Any]) -> UnitFacts:
    return UnitFacts(
        id=str(unit["Id"]),
        names=tuple(unit.get("Names", ())),
        load_state=str(unit["LoadState"]),
        active_state=str(unit["ActiveState"]),
        job=int(unit.get("Job", (0, "/"))[0]),
        fragment=str(unit.get("FragmentPath", "")),
        drop_ins=tuple(unit.get("DropInPaths", ())),
        transient=bool(unit.get("Transient", False)),
        after=tuple(unit.get("After", ())),
        before=tuple(unit.get("Before", ())),
        default_dependencies=bool(unit.get("DefaultDependencies", True)),
        job_timeout=min(
            int(unit.get("JobTimeoutUSec", INFINITY)),
            int(unit.get("JobRunningTimeoutUSec", INFINITY)),
        ),
        control_group=str(own.get("ControlGroup", "")),
        kill_mode=str(own.get("KillMode", "control-group")),
        kill_signal=int(own.get("KillSignal", 15)),
        restart_kill_signal=_restart_signal(own),
        sends_sigkill=bool(own.get("SendSIGKILL", True)),
        final_kill_signal=int(own.get("FinalKillSignal", 9)),
        timeout_stop=int(own.get("TimeoutStopUSec", INFINITY)),
        type=str(own.get("Type", "")),
        timeout_failure_mode=str(own.get("TimeoutStopFailureMode", "terminate")),
        restart=str(own.get("Restart", "no")),
        remain_after_exit=bool(own.get("RemainAfterExit", False)),
        pid_file=str(own.get("PIDFile", "")),
        root=str(own.get("RootDirectory", "") or own.get("RootImage", "")),
        main_pid=int(own.get("MainPID", 0)),
        control_pid=int(own.get("ControlPID", 0)),
        notify_access=str(own.get("NotifyAccess", "none")),
        user=str(own.get("User", "")),
        environment_files=tuple(str(path) for path, _ in own.get("EnvironmentFiles", ())),
        environment=tuple(own.get("Environment", ())),
        address_families=_families(*own.get("RestrictAddressFamilies", (False, []))),
        hidden_paths=(
            *(path.removeprefix("-") for path in own.get("InaccessiblePaths", ())),
            *(path for path, _ in own.get("TemporaryFileSystem", ())),
        ),
        noexec_paths=tuple(path.lstrip("-+") for path in own.get("NoExecPaths", ())),
        exec_paths=tuple(path.lstrip("-+") for path in own.get("ExecPaths", ())),
        private_pids=own.get("PrivatePIDs", "no") not in ("no", False),
        private_users=own.get("PrivateUsersEx", own.get("PrivateUsers", False))
        not in ("no", False),
        denied_calls=_denied_calls(*own.get("SystemCallFilter", (False, []))),
        exec_start=_commands(own.get("ExecStartEx", ())),
        exec_stop=_commands(own.get("ExecStopEx", ())),
        other_commands=tuple(
            (f"{setting}=", command)
            for setting in ("ExecStartPre", "ExecStartPost", "ExecStopPost")
            for command in _commands(own.get(f"{setting}Ex", ()))
        ),
        runtime_max=int(own.get("RuntimeMaxUSec", INFINITY)),
    )


def _restart_signal(own: dict[str, Any]) -> int:
    """Return RestartKillSignal=; 0 if it is the same as KillSignal= (the default)."""
    number = int(own.get("RestartKillSignal", 0))
    return 0 if number == int(own.get("KillSignal", 15)) else number


def _families(allowed: bool, names: list[str]) -> tuple[str, ...] | None:
    """Parse RestrictAddressFamilies, which lists either the allowed families or the denied ones."""
    if allowed:
        return tuple(names)
    # Callers look only for AF_UNIX in the result. So if AF_UNIX is denied, any list of allowed
    # families without AF_UNIX will do.
    return ("AF_INET", "AF_INET6", "AF_NETLINK") if "AF_UNIX" in names else None


def _denied_calls(allowed: bool, names: list[str]) -> tuple[str, ...]:
    """Parse SystemCallFilter, which lists either the allowed calls or the denied ones. A call
    listed with an errno, such as pidfd_open:EPERM, is denied even if it is in a list of allowed
    calls."""
    denied = {name.partition(":")[0] for name in names if not allowed or ":" in name}
    return tuple(call for call in HELPER_CALLS if call in denied or (allowed and call not in names))


def _commands(lines: Any) -> tuple[Command, ...]:
    """Parse a(sasasttttuii): path, argv, flags of the prefixes, four timestamps of the last run,
    its process, and its result."""
    return tuple(
        Command(
            path,
            tuple(arguments),
            "ignore-failure" in flags,
            tuple(flag for flag in flags if flag != "ignore-failure"),
            pid,
        )
        for path, arguments, flags, _, _, _, _, pid, *_ in lines
    )


def _no_such(name: str) -> NoSuchUnit:
    return NoSuchUnit(f'systemd knows no unit "{printable(name)}"')
