"""The tree of all errors that the project raises on purpose.

An error's text is for the caller: it says what happened, to what, and what to do next. It contains
no internal names, and only those facts about a process that the caller is allowed to know.

    QkilldError
    ├── InvalidArgs          a wrong argument, flag or option
    ├── NoSuchProcess        no process has that id (any more)
    │   └── ExitInProgress   the process is exiting: its executable can no longer be read
    ├── NotQemu              the process is not, or cannot be shown to be, QEMU
    ├── ProcessChanged       the id now belongs to another process, program or user
    ├── NoSuchUnit
    ├── NoSuchJob
    ├── Busy                 a limit is reached, or the job cannot do that now
    ├── Failed               anything else that the daemon could not do
    │   └── UnknownIdentity  the executable of a process cannot be read at the moment
    ├── AccessDenied         the caller may not do this
    │   ├── RefusedByBus     the policy of the bus forbids a call, or our own name
    │   └── InteractiveAuthorizationRequired
    ├── MonitorError         a guest's monitor or agent cannot be used
    │   ├── MonitorUnreachable   there is no monitor, or it is not the guest's own
    │   ├── MonitorBusy          it serves another client, or is silent
    │   ├── MonitorTimeout       a command was not answered in time
    │   │   └── CommandUnsent    it was not even sent
    │   ├── MonitorClosed        the other end closed the connection
    │   ├── MonitorProtocolError the other end broke the protocol, or sent too much
    │   └── CommandRefused       the other end answered with an error
    ├── ConfigError          a wrong configuration or installation (never reaches the bus)
    └── BusError             the bus, or a service on it, cannot be reached
        └── NameRefused      the bus does not give us our name
"""

from __future__ import annotations

from typing import ClassVar, Final

from qkilld.model.constants import ExitCode

ERROR_PREFIX: Final = "org.qkilld1.Error."


class QkilldError(Exception):
    """The base of all errors. `bus_name`: the D-Bus error name. `exit_code`: the exit code of
    qkillctl and qkilld-stop after this error."""

    bus_name: ClassVar[str] = ERROR_PREFIX + "Failed"
    exit_code: ClassVar[ExitCode] = ExitCode.FAILURE


class InvalidArgs(QkilldError):
    bus_name = ERROR_PREFIX + "InvalidArgs"
    exit_code = ExitCode.USAGE


class NoSuchProcess(QkilldError):
    bus_name = ERROR_PREFIX + "NoSuchProcess"
    exit_code = ExitCode.NOT_FOUND


class ExitInProgress(NoSuchProcess):
    """The process is exiting. On the bus, this is a plain NoSuchProcess."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"Process {pid} is exiting: no signal reaches it any more")


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


class UnknownIdentity(Failed):
    """The executable is unreadable, so no signal was sent. On the bus, this is a plain Failed."""

    def __init__(self, text: str, *, exiting: bool = False) -> None:
        super().__init__(text)
        self.exiting = exiting
        """Whether the process is exiting. If so, its executable will stay unreadable."""

    @classmethod
    def blocked(cls, pid: int, why: str | None) -> UnknownIdentity:
        """Return the error for a process that blocks the reading of its identity."""
        return cls(f"Cannot identify process {pid} at the moment: {why}. Try again later")


class AccessDenied(QkilldError):
    bus_name = "org.freedesktop.DBus.Error.AccessDenied"
    exit_code = ExitCode.NOT_PERMITTED


class RefusedByBus(AccessDenied):
    """The policy of the bus forbids a message, to qkilld or to another service."""


class InteractiveAuthorizationRequired(AccessDenied):
    bus_name = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"


class MonitorError(QkilldError):
    """A guest's monitor or agent cannot be used. Texts from the monitor or agent are made
    printable."""


class MonitorUnreachable(MonitorError):
    pass


class MonitorBusy(MonitorError):
    pass


class MonitorTimeout(MonitorError):
    pass


class CommandUnsent(MonitorTimeout):
    pass


class MonitorClosed(MonitorError):
    pass


class MonitorProtocolError(MonitorError):
    pass


class CommandRefused(MonitorError):
    """`error_class` is QEMU's name for the error, such as CommandNotFound."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command} was refused: {description}")
        self.error_class = error_class


class ConfigError(QkilldError):
    """For a configuration file, the text has one line for each mistake. Each line begins with
    FILE:LINE:, and says what is wrong and what was expected."""

    exit_code = ExitCode.USAGE

    def __init__(self, text: str, *, place: str = "") -> None:
        super().__init__(text)
        self.place = place
        """FILE:LINE of the first mistake, for users who cannot read the file, and so must not
        see the text."""


class BusError(QkilldError):
    """The bus, or a service on it, cannot be reached."""


class NameRefused(BusError):
    """The bus denies the daemon its name: the policy forbids it, or the name has another owner."""


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
"""The class for each D-Bus error name. Clients use it."""
