"""Stop guests through the daemon, over Varlink. Implements stopper.Stopper. Imports little, to
start fast: see stop.main.

One call starts the jobs, and its replies report the jobs' states and results.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any

    from qkilld.stop.guest_stop import GuestStop
    from qkilld.stop.options import Options
    from qkilld.stop.stopper import StopListener

SYSTEM_SOCKET = "/run/qkilld/org.qkilld1"
USER_SOCKET = "qkilld/org.qkilld1"
"""The socket of a user's own daemon, in $XDG_RUNTIME_DIR."""
MAX_AT_ONCE = 300
"""The maximum number of processes in one call. Each process takes up to 45 bytes, and the daemon
accepts calls up to 16 KiB (64 KiB from root)."""
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 3.0
"""Timeout of a reply. The daemon replies within milliseconds, or within a second if systemd has to
start it first."""
BUSY_TIMEOUT_S = 12.0
"""The additional time for a reply if the daemon has read the call. Such a daemon is busy, but stops
the guests sooner than the helper could by itself."""
RETURN_TIMEOUT_S = 3.0
"""If the daemon is gone, how long to wait for it to return. systemd restarts a crashed daemon
within a second."""
RETRY_S = 0.05
SILENCE_S = 5.0
"""After this time without a message, check that the daemon is alive. (The daemon sends the state of
a running job only when it changes.)"""
CHECK_TIMEOUT_S = 2.0
EXIT_TIMEOUT_S = 1.0
"""How long our pidfd may take to confirm an exit that the daemon has reported. Normally our pidfd
becomes readable at the same time as the daemon's."""
ENDING_S = 1.0
"""After a job was cancelled, wait this long for the daemon to close the connection, as it does when
it exits."""
_NEVER = float("inf")
_SIOCOUTQ = 0x5411
"""The ioctl that returns how many sent bytes the peer has not read: Linux, unix(7)."""
_SPANS = {
    "grace": "graceUSec",
    "stall": "stallUSec",
    "storage_stall": "storageStallUSec",
    "max": "maxUSec",
    "powerdown": "powerdownUSec",
}
"""The field in Options (org.qkilld1.varlink) for each field of Policy."""
_NEVER_USEC = 2**62
"""The value for an infinite time span in a call."""


def socket_paths(options: Options) -> list[str]:
    """Return the sockets of the system's daemon and, for a user's guests, of the user's own
    daemon."""
    if options.socket is not None:
        return [options.socket]
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    return [SYSTEM_SOCKET, f"{directory}/{USER_SOCKET}"] if directory else [SYSTEM_SOCKET]


class DaemonCall:
    """One call on a connection of its own."""

    def __init__(
        self,
        path: str,
        method: str,
        parameters: dict[str, Any],
        *,
        more: bool,
        descriptor: int = -1,
    ) -> None:
        """`descriptor` is sent with the call; -1 means none. Raises OSError unless root or our own
        user listens at `path`."""
        self.path = path
        self.method = method
        self._parameters = parameters
        self._more = more
        self._descriptor = descriptor
        self.answered = False
        self._incoming = b""
        self.sock = self._connect()

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.connect(self.path)
            _, uid, _ = struct.unpack(
                "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            if uid not in (0, os.geteuid()):
                raise PermissionError(0, f"uid {uid} serves {self.path}")
            message = {"method": f"org.qkilld1.{self.method}", "parameters": self._parameters}
            text = json.dumps(message | {"more": True} if self._more else message)
            data = text.encode() + b"\0"
            if self._descriptor >= 0:
                data = data[socket.send_fds(sock, [data], [self._descriptor]) :]
            sock.sendall(data)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    @property
    def was_read(self) -> bool:
        import fcntl

        unread = fcntl.ioctl(self.sock, _SIOCOUTQ, b"\0" * 4)
        return not any(unread)

    def replies(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the replies received, and whether the connection is closed or unusable."""
        closed = False
        try:
            while data := self.sock.recv(1 << 16):
                self._incoming += data
            closed = True
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        *texts, self._incoming = self._incoming.split(b"\0")
        try:
            replies = [json.loads(text) for text in texts]
        except ValueError:
            return [], True
        return [reply for reply in replies if isinstance(reply, dict)], closed

    def close(self) -> None:
        self.sock.close()


class _PendingCall:
    def __init__(self, call: DaemonCall, stops: Sequence[GuestStop], deadline: float) -> None:
        self.call = call
        self.stops = {stop.process.pid: stop for stop in stops}
        self.deadline = deadline
        """When the next reply is due."""
        self.after_restart = False
        self.was_extended = False
        """Whether the deadline was extended because the daemon is busy."""


class DaemonStopper:
    def __init__(
        self,
        path: str,
        options: Options,
        listener: StopListener,
        *,
        stops_unit: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stops_unit`: see process.stops_unit()."""
        self._path = path
        self._options = options
        self._listener = listener
        self._stops_unit = stops_unit
        self._clock = clock
        self._calls: list[_PendingCall] = []
        self._check: tuple[DaemonCall, float] | None = None
        """The call that checks whether a silent daemon is alive, and its deadline."""
        self._exits: dict[GuestStop, tuple[str, float]] = {}
        """For stops whose process has exited according to the daemon: the result, and the deadline
        for our pidfd to confirm the exit."""
        self._check_deadlines: dict[GuestStop, float] = {}
        """For stops whose process has exited according to our pidfd: the deadline for the daemon to
        report the result."""
        self._cancellations: dict[GuestStop, tuple[_PendingCall, float]] = {}
        """For stops whose job was cancelled: the call, and a deadline. A daemon that is stopped
        cancels its jobs, and closes the connection before the deadline. If the connection is still
        open at the deadline, a caller has cancelled the job."""
        self._retry_times: dict[GuestStop, float] = {}
        """For stops whose daemon is gone: when to call the daemon again."""
        self._return_deadlines: dict[GuestStop, float] = {}
        """For stops whose daemon is gone: the deadline for a restarted daemon to answer."""

    def start(self, stops: Sequence[GuestStop]) -> None:
        for at in range(0, len(stops), MAX_AT_ONCE):
            self._start(stops[at : at + MAX_AT_ONCE])

    def _start(self, stops: Sequence[GuestStop]) -> None:
        first = stops[0]
        method, order = self._terminate(stops)
        if passed := len(stops) == 1 and first.monitor >= 0:
            order["monitorIndex"] = 0
        try:
            call = DaemonCall(
                self._path,
                method,
                order,
                more=True,
                descriptor=first.monitor if passed else -1,
            )
        except OSError as error:
            why = f"qkilld cannot be reached: {error.strerror or error}"
            for stop in stops:
                stop.close_monitor()
                self._listener.lost(stop, why)
            return
        self._calls.append(_PendingCall(call, stops, self._clock() + ANSWER_TIMEOUT_S))

    def _terminate(self, stops: Sequence[GuestStop]) -> tuple[str, dict[str, Any]]:
        """Return the method that starts these stops, and its parameters."""
        order = self._order(stops[0])
        if self._stops_unit:
            order["byUnit"] = True
            order["forceAsUnit"] = self._options.force is None
        if len(stops) == 1:
            return "Terminate", order | _process(stops[0])
        return "TerminateAll", order | {"processes": [_process(stop) for stop in stops]}

    def _order(self, stop: GuestStop) -> dict[str, Any]:
        """Return the parameters of Terminate, except those that name the process."""
        options: dict[str, Any] = {
            _SPANS[name]: min(usec, _NEVER_USEC) for name, usec in self._options.spans.items()
        }
        options |= stop.options
        if self._options.reason is not None:
            options["reason"] = self._options.reason
        elif not self._stops_unit:
            options["reason"] = "qkilld-stop"
        return {"flags": stop.flags, "options": options}

    def descriptors(self) -> Collection[int]:
        checking = [self._check[0].sock.fileno()] if self._check else []
        return [pending.call.sock.fileno() for pending in self._calls] + checking

    def deadline(self) -> float:
        return min(
            *(pending.deadline for pending in self._calls),
            *(until for _, until in self._exits.values()),
            *self._check_deadlines.values(),
            *(until for _, until in self._cancellations.values()),
            *self._retry_times.values(),
            self._check[1] if self._check else _NEVER,
            _NEVER,
            _NEVER,
        )

    def work(self) -> None:
        now = self._clock()
        for pending in list(self._calls):
            replies, closed = pending.call.replies()
            for reply in replies:
                pending.call.answered = True
                pending.deadline = now + SILENCE_S
                self._handle_reply(pending, reply)
            if closed:
                self._handle_close(pending)
            elif now >= pending.deadline and pending in self._calls:
                self._handle_silence(pending)
        self._work_check(now)
        for stop, (result, until) in list(self._exits.items()):
            if stop.process.exited():
                del self._exits[stop]
                self._listener.ended(stop, result)
            elif now >= until:
                del self._exits[stop]
                stop.state = None
                self._listener.lost(stop, "qkilld reports the guest as exited, but it has not")
        for stop, until in list(self._check_deadlines.items()):
            if now >= until:
                self._forget(stop)
                self._listener.ended(stop, _guess(stop))
        for stop, (_, until) in list(self._cancellations.items()):
            if now >= until:
                self._forget(stop)
                self._listener.ended(stop, "cancelled")
        for stop, at in list(self._retry_times.items()):
            if now >= at:
                self._follow_again(stop)

    def note_exit(self, stop: GuestStop) -> None:
        # Wait for the daemon to report the result. If it is alive, it notices the exit, too.
        if stop not in self._exits:
            self._check_deadlines[stop] = self._clock() + CHECK_TIMEOUT_S

    def amend(self, stop: GuestStop) -> None:
        if stop.state is None:
            return
        order = self._order(stop) | _process(stop)
        try:
            call = DaemonCall(self._path, "Terminate", order, more=False)
        except OSError:
            return  # If the daemon is gone, the pending call fails.
        self._calls.append(_PendingCall(call, (), self._clock() + ANSWER_TIMEOUT_S))

    def release(self, stop: GuestStop) -> None:
        """Do nothing: while the daemon runs, others can release the job."""

    def close(self) -> None:
        for pending in self._calls:
            pending.call.close()
        if self._check is not None:
            self._check[0].close()
        self._calls.clear()
        self._check = None

    # ---- replies of the daemon ----

    def _handle_reply(self, pending: _PendingCall, reply: dict[str, Any]) -> None:
        parameters = reply.get("parameters") or {}
        if (error := reply.get("error")) is not None:
            self._handle_error(pending, str(error), str(parameters.get("message", error)))
            return
        for refusal in parameters.get("refused") or ():
            if stop := pending.stops.pop(refusal["pid"], None):
                self._forget(stop)
                self._listener.refused(stop, refusal["name"], refusal["message"])
        for state in parameters.get("states") or ():
            self._state(pending, state, None)
        if (state := parameters.get("state")) is not None:
            self._state(pending, state, parameters.get("receipt"))
        if (unit := parameters.get("unit")) is not None:
            self._listener.unit_known(unit, list(pending.stops.values()))
        if (why := parameters.get("unitError")) is not None:
            self._listener.unit_unknown(why)
        if not reply.get("continues") and not self._awaits_close(pending):
            stops, pending.stops = list(pending.stops.values()), {}
            self._drop(pending)
            for stop in stops:
                self._lose(stop, "qkilld does not report what became of the guest")

    def _awaits_close(self, pending: _PendingCall) -> bool:
        return any(each is pending for each, _ in self._cancellations.values())

    def _state(
        self, pending: _PendingCall, state: dict[str, Any], receipt: dict[str, Any] | None
    ) -> None:
        stop = pending.stops.get(state["pid"])
        if stop is None:
            return
        stop.close_monitor()
        start_time = stop.process.start_time
        if pending.after_restart and start_time not in (None, state["startTime"]):
            del pending.stops[state["pid"]]
            self._listener.lost(stop, "qkilld went away, and the new one has no job for the guest")
            return
        if receipt is None:
            stop.state = state
            self._return_deadlines.pop(stop, None)
            self._listener.heard(stop, state)
            return
        del pending.stops[state["pid"]]
        self._ended(pending, stop, state, receipt)

    def _ended(
        self,
        pending: _PendingCall,
        stop: GuestStop,
        state: dict[str, Any],
        receipt: dict[str, Any],
    ) -> None:
        result = state["result"]
        if str(receipt.get("errorName") or "").endswith(".ProcessChanged"):
            self._forget(stop)
            self._listener.refused(stop, "ProcessChanged", str(receipt.get("error", "")))
        elif result in ("exited", "killed") and not stop.process.exited():
            self._forget(stop)
            self._exits[stop] = result, self._clock() + EXIT_TIMEOUT_S
        elif result == "cancelled" and not stop.process.exited():
            # Wait, to learn whether the daemon exits. A daemon that is stopped, not restarted,
            # cancels its jobs. Another stopper must then continue.
            self._cancellations[stop] = pending, self._clock() + ENDING_S
        else:
            self._forget(stop)
            self._listener.ended(stop, result)

    def _handle_error(self, pending: _PendingCall, error: str, message: str) -> None:
        interface, _, name = error.rpartition(".")
        stops, pending.stops = list(pending.stops.values()), {}
        self._drop(pending)
        for stop in stops:
            passed = stop.monitor >= 0
            stop.close_monitor()
            if pending.after_restart:
                self._lose(stop, f"qkilld went away, and the new one says: {message}")
            elif passed and name in ("InvalidArgs", "InvalidParameter"):
                # The daemon may have refused the passed monitor. Try again without it.
                self._start([stop])
            elif interface == "org.qkilld1":
                self._listener.refused(stop, name, message)
            elif name == "PermissionDenied":
                self._listener.refused(stop, "AccessDenied", message)
            else:
                self._lose(stop, f"qkilld says: {message}")

    # ---- silence of the daemon ----

    def _handle_silence(self, pending: _PendingCall) -> None:
        if not pending.call.answered:
            if not pending.was_extended and pending.stops and pending.call.was_read:
                pending.was_extended = True
                pending.deadline = self._clock() + BUSY_TIMEOUT_S
                return
            limit = ANSWER_TIMEOUT_S + (BUSY_TIMEOUT_S if pending.was_extended else 0)
            stops, pending.stops = list(pending.stops.values()), {}
            self._drop(pending)
            for stop in stops:
                self._lose(stop, f"qkilld does not answer within {limit:g} s")
            return
        pending.deadline = self._clock() + SILENCE_S
        if self._check is None and pending.stops:
            try:
                call = DaemonCall(self._path, "GetStatus", {}, more=False)
            except OSError:
                return  # Try again soon. If the daemon is gone, the pending call fails.
            self._check = call, self._clock() + CHECK_TIMEOUT_S

    def _work_check(self, now: float) -> None:
        if self._check is None:
            return
        call, until = self._check
        replies, closed = call.replies()
        if not replies and not closed and now < until:
            return
        call.close()
        self._check = None
        if replies or closed:
            return
        for pending in list(self._calls):
            stops, pending.stops = list(pending.stops.values()), {}
            self._drop(pending)
            for stop in stops:
                self._lose(stop, "qkilld does not answer any more")

    def _handle_close(self, pending: _PendingCall) -> None:
        for stop in [each for each, (by, _) in self._cancellations.items() if by is pending]:
            self._forget(stop)
            self._listener.lost(stop, "qkilld was stopped")
        if pending not in self._calls:
            return
        stops, pending.stops = list(pending.stops.values()), {}
        self._drop(pending)
        now = self._clock()
        for stop in stops:
            # Call again, because a new daemon continues the jobs of the old one.
            self._retry_times[stop] = now if stop not in self._return_deadlines else now + RETRY_S
            self._return_deadlines.setdefault(stop, now + RETURN_TIMEOUT_S)

    def _follow_again(self, stop: GuestStop) -> None:
        until, now = self._return_deadlines[stop], self._clock()
        if now >= until:
            self._lose(stop, "qkilld went away")
            return
        if stop.state is not None:
            method, parameters = "Wait", {"job": stop.state["job"]}
        else:
            # The daemon exited before it replied. Terminate can be repeated, because it joins a
            # running job.
            stop.close_monitor()
            method, parameters = self._terminate([stop])
        try:
            call = DaemonCall(self._path, method, parameters, more=True)
        except OSError:
            self._retry_times[stop] = now + RETRY_S
            return
        pending = _PendingCall(call, (stop,), until)
        pending.after_restart = method == "Wait"
        del self._retry_times[stop]
        self._calls.append(pending)

    def _lose(self, stop: GuestStop, why: str) -> None:
        stop.close_monitor()
        known = stop.state is not None
        if known and stop.process.exited():
            self._forget(stop)
            self._listener.ended(stop, _guess(stop))
            return
        self._forget(stop)
        self._listener.lost(stop, why)

    def _forget(self, stop: GuestStop) -> None:
        self._check_deadlines.pop(stop, None)
        self._retry_times.pop(stop, None)
        self._return_deadlines.pop(stop, None)
        self._cancellations.pop(stop, None)
        for pending in self._calls:
            pending.stops.pop(stop.process.pid, None)

    def _drop(self, pending: _PendingCall) -> None:
        if pending in self._calls:
            self._calls.remove(pending)
            pending.call.close()


def _process(stop: GuestStop) -> dict[str, Any]:
    process: dict[str, Any] = {"pid": stop.process.pid}
    if stop.process.start_time is not None:
        process["startTime"] = stop.process.start_time
    return process


def _guess(stop: GuestStop) -> str:
    """Guess the result of a stop whose process is gone, when the daemon reports no result."""
    phase = stop.state["phase"] if stop.state is not None else ""
    return "killed" if phase in ("kill", "reap") else "exited"
