"""A process to stop, opened as a pidfd. Imports little, to start fast: see stop.main."""

from __future__ import annotations

import os
import select
import time

from qkilld.adapters import blockable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from qkilld.model.errors import QkilldError


IDENTITY_TIMEOUT_S = 3.0
"""How long to wait for a process that blocks the reading of its start time. Shorter than
limits.FIRST, so that systemd's timeout does not expire first."""
IDENTITY_RETRY_S = 0.1
MAX_COMMAND_LINE = 1 << 20
READ_TIMEOUT_S = 0.2


class ProcessHandle:
    """An open process. If the pid is reused, the handle still refers to the old process."""

    def __init__(self, pid: int, pidfd: int, start_time: int | None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.start_time = start_time
        """In clock ticks since boot; None if /proc hides the process (ProtectProc=)."""

    def exited(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def open_process(pid: int, start_time: int | None = None) -> ProcessHandle:
    """Open a process by its pid.

    Raises NoSuchProcess if the process is gone, is a zombie, or was not started at `start_time`.
    Raises Failed if the process cannot be opened, or if its start time is needed but unreadable.
    Raises UnknownIdentity if the process blocks the reading of its start time.
    """
    return _open(pid, start_time, timeout_s=0)


def open_named(pid: int, start_time: int | None = None) -> ProcessHandle:
    """Open a process as `open_process` does. If the process blocks the reading of its start time,
    retry for IDENTITY_TIMEOUT_S."""
    return _open(pid, start_time, timeout_s=IDENTITY_TIMEOUT_S)


def _open(pid: int, start_time: int | None, timeout_s: float) -> ProcessHandle:
    try:
        process = ProcessHandle(pid, os.pidfd_open(pid), None)
    except (ProcessLookupError, OverflowError):
        raise _no_such_process(f"process {pid} is gone") from None
    except OSError as error:
        raise _failed(f"cannot open process {pid}: {error.strerror}") from None
    try:
        process.start_time = _read_start_time(pid, time.monotonic() + timeout_s)
        # The start time is None if the process is hidden or gone. The pidfd shows which of the two
        # is the case.
        if process.exited() or (
            start_time is not None and process.start_time not in (None, start_time)
        ):
            raise _no_such_process(f"process {pid} is gone")
        if start_time is not None and process.start_time is None:
            raise _failed(f"cannot tell when process {pid} was started: /proc does not show it")
    except BaseException:
        process.close()
        raise
    return process


def _read_start_time(pid: int, until: float) -> int | None:
    """Retry until that time (CLOCK_MONOTONIC, s) if the process blocks the reading; then raise
    UnknownIdentity."""
    while True:
        try:
            return blockable.shared.one(f"/proc/{pid}", _start_time)
        except blockable.Unanswered as error:
            if time.monotonic() >= until:
                from qkilld.model.errors import UnknownIdentity

                raise UnknownIdentity.blocked(pid, error.strerror) from None
        time.sleep(IDENTITY_RETRY_S)


def open_main_process(text: str) -> ProcessHandle:
    """Open the process in $MAINPID. Raises what `open_named` raises, and InvalidArgs."""
    if not (text.isascii() and text.isdecimal() and len(text) < 11 and int(text) > 0):
        from qkilld.model.errors import InvalidArgs

        raise InvalidArgs("$MAINPID is not the id of a process")
    process = open_named(int(text))
    # systemd knew the main process when it started us, so a younger process has reused the pid.
    own = read_own_start_time()
    if process.start_time is not None and own is not None and process.start_time > own:
        process.close()
        raise _no_such_process("the main process is gone")
    return process


def check_pid_namespace() -> None:
    """Raise Failed if we are in a PID namespace of our own (PrivatePIDs=). In such a namespace, a
    process id such as $MAINPID means another process or none, and no guest of the unit is visible.

    Process 1 of such a namespace is this program, or belongs to the same service. In other
    namespaces, process 1 is a service manager, which never runs in a service.
    """
    if os.getpid() != 1 and not _shares_service_with_init():
        return
    from qkilld.model.errors import Failed

    raise Failed(
        "qkilld-stop runs in a PID namespace of its own (PrivatePIDs=), where it sees no guest:"
        " write + before the path in ExecStop="
    )


def _shares_service_with_init() -> bool:
    if "INVOCATION_ID" not in os.environ:  # systemd has not started us.
        return False
    cgroups = []
    for name in ("self", "1"):
        try:
            with open(f"/proc/{name}/cgroup", "rb") as file:  # noqa: PTH123
                cgroups.append(file.read())
        except OSError:  # Process 1 is hidden (ProtectProc=), so it belongs to another user.
            return False
    # With Delegate=, there may be control groups below that of the service.
    in_service = any(end in cgroups[0] for end in (b".service\n", b".service/"))
    return in_service and cgroups[0] == cgroups[1]


def has_others(pids: Collection[int], proc: str = "/proc", sys: str = "/sys/fs/cgroup") -> bool:
    """Return whether our unit may have processes besides `pids` and this one. Takes 0.1 ms."""
    try:
        with open(f"{proc}/self/cgroup") as file:  # noqa: PTH123
            groups = dict(line.rstrip("\n").split(":", 2)[1:] for line in file)
        # The hierarchies in which systemd may keep its units: v2, v2 in hybrid mode, and v1.
        for hierarchy, place in (("", ""), ("", "/unified"), ("name=systemd", "/systemd")):
            directory = f"{sys}{place}{groups.get(hierarchy, '')}"
            if directory.endswith(".service") and os.path.isdir(directory):  # noqa: PTH112
                with os.scandir(directory) as entries:
                    if any(entry.is_dir() for entry in entries):  # Delegate=
                        return True
                with open(f"{directory}/cgroup.procs") as file:  # noqa: PTH123
                    return not {*pids, os.getpid()}.issuperset(map(int, file))
    except (OSError, ValueError):
        pass  # Unknown.
    return True


def stops_unit(environment: Mapping[str, str]) -> bool:
    """Return whether a systemd manager started this program to stop our own unit (ExecStop= or
    ExecStopPost=), directly or through a shell.

    It is not enough to run in a unit, because a user's interactive shell runs in a unit, too. A
    program of ExecStart= may also run qkilld-stop, for one of several guests. Source:
    $SYSTEMD_EXEC_PID and $SERVICE_RESULT in systemd.exec(5).
    """
    started_us = environment.get("SYSTEMD_EXEC_PID") in (str(os.getpid()), str(os.getppid()))
    return started_us and "SERVICE_RESULT" in environment


def may_pass_monitor(pid: int) -> bool:
    """Return whether the command line suggests that the monitor is on TCP or an abstract socket.
    The daemon cannot connect to such a monitor. Takes 0.1 ms.

    If a hostile process blocks the reading of its command line, return False after READ_TIMEOUT_S.
    If no thread can be started for the reading (TasksMax=), return False at once.
    """
    import _thread

    words: list[bytes] = []
    finished = _thread.allocate_lock()
    finished.acquire()

    def read() -> None:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
                words.extend(file.read(MAX_COMMAND_LINE).split(b"\0"))
        except OSError:
            pass
        finished.release()

    try:
        _thread.start_new_thread(read, ())
    except RuntimeError:
        return False
    return finished.acquire(timeout=READ_TIMEOUT_S) and any(map(_may_name_place, words))


def _may_name_place(word: bytes) -> bool:
    """Match the values of -qmp tcp:…, -monitor telnet:… and -chardev socket,…,port=…, their JSON
    forms, and -readconfig."""
    if word.startswith((b"tcp:", b"telnet:", b"-readconfig", b"--readconfig")):
        return True
    named = b"port=" in word or b"abstract=" in word or b"fd=" in word
    return (named and word.startswith((b"socket,", b"unix:"))) or b'"inet"' in word


def ran_for_s() -> float:
    """Return the seconds since this program was started, with a resolution of 10 ms; 0 if
    unknown."""
    started = read_own_start_time()
    if started is None:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def read_own_start_time() -> int | None:
    """Return the start time of this program in clock ticks since boot; None if unreadable."""
    return _start_time("/proc/self")


def _start_time(directory: str) -> int | None:
    """Return field 22 of /proc/PID/stat; None if unreadable. May block."""
    try:
        fd = os.open(f"{directory}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.read(fd, 4096)
        finally:
            os.close(fd)
        return int(stat[stat.rindex(b")") + 2 :].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _no_such_process(text: str) -> QkilldError:
    from qkilld.model.errors import NoSuchProcess

    return NoSuchProcess(text)


def _failed(text: str) -> QkilldError:
    from qkilld.model.errors import Failed

    return Failed(text)


def has_libvirt(environment: Mapping[str, str]) -> bool:
    """Return whether libvirt has run on this host, for the system or this user."""
    session = f"{environment.get('XDG_RUNTIME_DIR', '')}/libvirt/qemu/run"
    return os.access("/run/libvirt/qemu", os.F_OK) or os.access(session, os.F_OK)
