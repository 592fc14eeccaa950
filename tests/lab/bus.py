"""A private bus, a daemon on this bus, and three clients: busctl, gdbus and jeepney.

The host's own buses are never used: every program gets the private address for both the system bus
and the session bus.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from jeepney import (  # type: ignore[import-untyped]
    DBusAddress,
    HeaderFields,
    Message,
    MessageFlag,
    MessageType,
    new_method_call,
)
from jeepney.io.blocking import open_dbus_connection  # type: ignore[import-untyped]

from qkilld.model.constants import BUS_NAME, JOB_INTERFACE, MANAGER_INTERFACE, MANAGER_PATH
from tests.lab import library, needs
from tests.lab.guest import own_qemus
from tests.lab.log import Log
from tests.lab.notify import NotifySocket
from tests.lab.process import end, run, spawn, wait_gone
from tests.lab.scratch import scratch

_CONFIG: Final = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>custom</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  {limits}
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    {policy}
  </policy>
</busconfig>
"""


def environment(address: str) -> dict[str, str]:
    """Return this process's environment with `address` as its only bus."""
    variables = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("DBUS_") and key not in ("NOTIFY_SOCKET", "JOURNAL_STREAM")
    }
    return variables | {
        "DBUS_SYSTEM_BUS_ADDRESS": address,
        "DBUS_SESSION_BUS_ADDRESS": address,
        "DBUS_STARTER_ADDRESS": address,
        "PYTHONPATH": library.python_path(),
    }


@dataclass
class Bus:
    """A running dbus-daemon. Any user may connect, own a name, and send."""

    address: str
    process: subprocess.Popen[bytes]

    def busctl(
        self, *args: str, uid: int | None = None, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run systemd's client, e.g. `busctl("call", NAME, PATH, INTERFACE, "Inspect", "u", "17")`.

        With `check`, an error raises AssertionError with busctl's message.
        """
        busctl = needs.program("busctl", "systemd")
        return run(
            [busctl, f"--address={self.address}", "--no-pager", *args],
            uid=uid,
            timeout=timeout,
            check=check,
            env=environment(self.address),
        )

    def gdbus(
        self, *args: str, uid: int | None = None, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run GLib's client, e.g. `gdbus("call", "-d", NAME, "-o", PATH, "-m", MEMBER, "17")`."""
        gdbus = needs.program("gdbus", "libglib2.0-bin")
        return run(
            [gdbus, args[0], "--address", self.address, *args[1:]],
            uid=uid,
            timeout=timeout,
            check=check,
            env=environment(self.address),
        )

    def client(self, uid: int | None = None) -> Client:
        """Open another connection; a context manager."""
        return Client(self.address, uid)

    def stop(self) -> None:
        """Kill the bus, which ends all its connections."""
        end(self.process)


@contextlib.contextmanager
def private_bus(limits: Mapping[str, int] | None = None, policy: str = "") -> Iterator[Bus]:
    """Within the context, run a dbus-daemon. It is ready at entry.

    The bus allows everything, unless a rule in `policy` denies it. `limits` replace defaults of
    dbus-daemon, which are those of a system bus.
    """
    program = needs.program("dbus-daemon", "dbus-daemon")
    with scratch("b") as directory:
        socket, config = directory / "bus", directory / "conf"
        named = [f'<limit name="{key}">{value}</limit>' for key, value in (limits or {}).items()]
        rules = "\n  ".join(named)
        config.write_text(_CONFIG.format(socket=socket, limits=rules, policy=policy))
        read, write = os.pipe()
        try:
            argv = [str(program), f"--config-file={config}", f"--print-address={write}"]
            argv += ["--nofork", "--nopidfile", "--nosyslog"]
            with (directory / "stderr").open("wb") as stderr:
                process = spawn(argv, pass_fds=(write,), stderr=stderr)
        finally:
            os.close(write)
        try:
            with os.fdopen(read) as announced:  # The input ends if dbus-daemon exits.
                address = announced.readline().strip()
            assert address, f"dbus-daemon: {(directory / 'stderr').read_text()}"
            yield Bus(address, process)
        finally:
            end(process)


@dataclass
class Daemon:
    """A running qkilld."""

    bus: Bus
    root: Path
    process: subprocess.Popen[bytes]
    pidfd: int
    stderr: Log
    notify: NotifySocket = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """Wait for a match of `pattern` (re.MULTILINE) in the daemon's stderr; return the first
        one."""
        return self.stderr.wait_for(pattern, timeout, pidfd=self.pidfd)

    def wait_ready(self, timeout: float = 30) -> None:
        """Wait until qkilld has sent READY=1."""
        try:
            self.notify.wait_for("READY", timeout, pidfd=self.pidfd)
        except AssertionError as error:
            raise AssertionError(f"qkilld: {error}; it says:\n{self.stderr.text()}") from None

    def wait_gone(self, timeout: float = 30) -> int:
        """Wait until qkilld has exited; return its exit code."""
        assert wait_gone(self.pidfd, timeout), f"qkilld is still there after {timeout} s"
        return self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal, and wait for the end; return the exit code."""
        signal.pidfd_send_signal(self.pidfd, number)
        return self.wait_gone(timeout)


def write_config(root: Path, text: str, name: str = "etc/qkilld/qkilld.conf") -> Path:
    """Write a configuration file below a daemon's --root."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def lab_config(policy: str = "") -> str:
    """Return a qkilld.conf that covers every QEMU and fake_qemu of this process.

    With it, idle guests are killed as soon as their grace period is over. `policy`: more lines of
    [Policy].
    """
    return f"[Target]\nExecutables={own_qemus()}\n[Policy]\nStallSec=0\n{policy}\n"


@contextlib.contextmanager
def daemon(
    bus: Bus,
    *arguments: str,
    config: str | None = None,
    root: Path | None = None,
    uid: int | None = None,
    before: Callable[[], None] | None = None,
    env: Mapping[str, str] | None = None,
    ready: bool = True,
    system_bus: bool = False,
    program: Sequence[str | Path] = (sys.executable, "-m", "qkilld"),
) -> Iterator[Daemon]:
    """Run `python -m qkilld --bus ADDRESS --root ROOT ARGUMENTS`. With `ready`, wait until the
    daemon is ready.

    `config` is the daemon's qkilld.conf (default: lab_config()). `root` is a directory with
    configuration files to use instead. With `system_bus`, the daemon uses `bus` as the system bus.
    The daemon is killed at the end. stop() ends it earlier and returns its exit code.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("d"))
        if root is None:
            root = directory / "root"
            write_config(root, lab_config() if config is None else config)
        stderr = Log(directory / "stderr")
        notify = stack.enter_context(NotifySocket(directory))
        where = [] if system_bus else ["--bus", bus.address]
        with stderr.path.open("wb") as written:
            process = spawn(
                [*program, *where, "--root", root, *arguments],
                stdout=written,
                stderr=written,
                cwd=directory,
                uid=uid,
                before=before,
                env=environment(bus.address)
                | {"NOTIFY_SOCKET": str(notify.path)}
                | dict(env or {}),
            )
        stack.callback(end, process)
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        running = Daemon(bus, root, process, pidfd, stderr, notify)
        if ready:
            running.wait_ready()
        yield running


class CallError(Exception):
    """An error reply. `name` is its D-Bus name; the text is the message."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
        self.text = text


class Client:
    """A blocking client that uses jeepney, a D-Bus library that the daemon does not use.

    In bodies, a variant is a pair (signature, value). plain() replaces such a pair by its value.
    """

    def __init__(self, address: str, uid: int | None = None) -> None:
        """`uid`: connect as this user (OTHER_UID, or a user in /etc/passwd); needs root."""
        self.calls: list[Message] = []
        """The method calls that others have sent to this client. It answers none of them."""
        self._replies: dict[int, Message] = {}
        self._signals: list[Message] = []
        with _effective_uid(uid):  # The bus uses the credentials at the time of connect().
            self._connection = open_dbus_connection(address, auth_timeout=30)

    @property
    def unique_name(self) -> str:
        return str(self._connection.unique_name)

    def send(
        self,
        member: str,
        signature: str = "",
        *body: Any,
        path: str = MANAGER_PATH,
        interface: str = MANAGER_INTERFACE,
        destination: str = BUS_NAME,
        no_reply: bool = False,
    ) -> int:
        """Send a call; return its serial, for reply()."""
        address = DBusAddress(path, destination, interface)
        serial: int = next(self._connection.outgoing_serial)
        message = new_method_call(address, member, signature or None, body)
        if no_reply:
            message.header.flags |= MessageFlag.no_reply_expected
        self._connection.send(message, serial=serial)
        return serial

    def reply(self, serial: int, timeout: float = 60) -> tuple[Any, ...]:
        """Return the body of the reply to the call with this serial. Other messages are kept.

        Raises CallError for an error reply, TimeoutError, and ConnectionResetError if the bus ends.
        """
        deadline = time.monotonic() + timeout
        while serial not in self._replies:
            self._receive(deadline)
        message = self._replies.pop(serial)
        if message.header.message_type is MessageType.error:
            name = message.header.fields[HeaderFields.error_name]
            raise CallError(str(name), " ".join(map(str, message.body)))
        return tuple(message.body)

    def call(
        self,
        member: str,
        signature: str = "",
        *body: Any,
        path: str = MANAGER_PATH,
        interface: str = MANAGER_INTERFACE,
        destination: str = BUS_NAME,
        timeout: float = 60,
    ) -> tuple[Any, ...]:
        """Send a call and wait for its reply. A variant argument is a pair (signature, value)."""
        serial = self.send(
            member, signature, *body, path=path, interface=interface, destination=destination
        )
        return self.reply(serial, timeout)

    def terminate(self, pid: int, flags: int = 0, **options: tuple[str, Any]) -> str:
        """Return the path of the job. In names of options, write _ instead of -: start_time=("t",
        17)."""
        if not options:
            return str(self.call("Terminate", "ut", pid, flags)[0])
        named = {name.replace("_", "-"): value for name, value in options.items()}
        return str(self.call("TerminateWithOptions", "uta{sv}", pid, flags, named)[0])

    def wait(self, job: str, timeout: float = 60) -> tuple[str, dict[str, Any]]:
        """Wait for the end of a job; return (result, receipt)."""
        result, receipt = self.call("Wait", path=job, interface=JOB_INTERFACE, timeout=timeout)
        return result, plain(receipt)

    def cancel(self, job: str) -> None:
        self.call("Cancel", path=job, interface=JOB_INTERFACE)

    def properties(
        self, path: str = MANAGER_PATH, interface: str = MANAGER_INTERFACE
    ) -> dict[str, Any]:
        """Call GetAll; return plain values."""
        (values,) = self.call(
            "GetAll", "s", interface, path=path, interface="org.freedesktop.DBus.Properties"
        )
        return dict(plain(values))

    def subscribe(self, rule: str = f"type='signal',sender='{BUS_NAME}'") -> None:
        """Keep signals that match the rule, for signal()."""
        self.call(
            "AddMatch",
            "s",
            rule,
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
            destination="org.freedesktop.DBus",
        )

    def signal(
        self, member: str, timeout: float = 60, *, path: str | None = None
    ) -> tuple[str, tuple[Any, ...]]:
        """Wait for a signal of this name. Return (path, body) of the oldest such signal that was
        not returned yet.

        Call subscribe() first. Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            for message in self._signals[seen:]:
                fields = message.header.fields
                where = str(fields[HeaderFields.path])
                if fields[HeaderFields.member] == member and path in (None, where):
                    self._signals.remove(message)
                    return where, tuple(message.body)
            seen = len(self._signals)
            self._receive(deadline)

    def _receive(self, deadline: float) -> None:
        message = self._connection.receive(timeout=max(0.0, deadline - time.monotonic()))
        reply_to = message.header.fields.get(HeaderFields.reply_serial)
        if reply_to is not None:
            self._replies[reply_to] = message
        elif message.header.message_type is MessageType.signal:
            self._signals.append(message)
        else:
            self.calls.append(message)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def plain(value: Any) -> Any:
    """Remove the signatures of variants from a value of jeepney."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return plain(value[1])
    return value


@contextlib.contextmanager
def _effective_uid(uid: int | None) -> Iterator[None]:
    if uid is None:
        yield
        return
    needs.root("to connect as another user")
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
