"""Every error that the project raises on purpose, in one tree.

An error's text is written for the caller who gets to read it: it says what happened, to what, and
what to do. It never holds a path, a name from inside the program, or anything about a process that
the caller may not know.

    QkilldError
    ├── InvalidArgs          a wrong argument, flag or option
    ├── NoSuchProcess        no process has that id (any more)
    │   └── Exiting          it has begun to end: what it ran cannot be told any more
    ├── NotQemu              the process is not, or cannot be shown to be, a QEMU
    ├── ProcessChanged       the process id belongs to another process by now
    ├── NoSuchUnit
    ├── NoSuchJob
    ├── Busy                 a limit of the daemon is reached for this caller
    ├── Failed               anything else that the daemon could not do
    ├── AccessDenied         the caller may not do this
    ├── InteractiveAuthorizationRequired
    ├── ConfigError          a wrong line in a configuration file (never reaches the bus)
    └── BusError             the bus, or the daemon on it, cannot be reached (client side)
"""

from __future__ import annotations

from typing import ClassVar, Final

from qkilld.model.words import ExitCode

ERROR_PREFIX: Final = "org.qkilld1.Error."


class QkilldError(Exception):
    """The root. `bus_name` is the D-Bus error name, `exit_code` what a client exits with."""

    bus_name: ClassVar[str] = ERROR_PREFIX + "Failed"
    exit_code: ClassVar[ExitCode] = ExitCode.FAILURE


class InvalidArgs(QkilldError):
    bus_name = ERROR_PREFIX + "InvalidArgs"
    exit_code = ExitCode.USAGE


class NoSuchProcess(QkilldError):
    bus_name = ERROR_PREFIX + "NoSuchProcess"
    exit_code = ExitCode.NOT_FOUND


class Exiting(NoSuchProcess):
    """On the bus a NoSuchProcess as any other. `key` is (pid, start time)."""

    def __init__(self, key: tuple[int, int]) -> None:
        super().__init__(f"Process {key[0]} is exiting: no signal reaches it any more")
        self.key = key


class NotQemu(QkilldError):
    bus_name = ERROR_PREFIX + "NotQemu"
    exit_code = ExitCode.NOT_QEMU


class ProcessChanged(QkilldError):
    bus_name = ERROR_PREFIX + "ProcessChanged"
    exit_code = ExitCode.NOT_QEMU


class NoSuchUnit(QkilldError):
    bus_name = ERROR_PREFIX + "NoSuchUnit"
    exit_code = ExitCode.NOT_FOUND


class NoSuchJob(QkilldError):
    bus_name = ERROR_PREFIX + "NoSuchJob"
    exit_code = ExitCode.NOT_FOUND


class Busy(QkilldError):
    bus_name = ERROR_PREFIX + "Busy"


class Failed(QkilldError):
    bus_name = ERROR_PREFIX + "Failed"


class AccessDenied(QkilldError):
    bus_name = "org.freedesktop.DBus.Error.AccessDenied"
    exit_code = ExitCode.NOT_PERMITTED


class InteractiveAuthorizationRequired(AccessDenied):
    bus_name = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"


class ConfigError(QkilldError):
    """`text` is one line: FILE:LINE: what is wrong and what was expected."""

    exit_code = ExitCode.USAGE


class BusError(QkilldError):
    """The bus or the daemon cannot be reached."""


BY_BUS_NAME: Final[dict[str, type[QkilldError]]] = {
    cls.bus_name: cls
    for cls in (
        InvalidArgs,
        NoSuchProcess,
        NotQemu,
        ProcessChanged,
        NoSuchUnit,
        NoSuchJob,
        Busy,
        Failed,
        AccessDenied,
        InteractiveAuthorizationRequired,
    )
}
"""For a client: the class of an error that came over the bus."""
