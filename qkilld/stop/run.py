"""One run of the helper: stops all its processes at once, with the daemon or without it.

Polls stoppers, processes, signals and timers. Imports most modules late: see stop.main.
"""

from __future__ import annotations

import os
import select
import signal
import time

from qkilld.adapters.journal_stream import stderr_is_journal
from qkilld.stop.daemon import DaemonStopper, socket_paths
from qkilld.stop.guest_stop import ENDINGS, GuestStop
from qkilld.stop.limits import ASK_ALL, FIRST, MAX_RESTARTS, NO_STATE, RESTART_S, extension
from qkilld.stop.log import say, say_ending
from qkilld.stop.process import (
    ProcessHandle,
    has_libvirt,
    has_others,
    may_pass_monitor,
    open_main_process,
    ran_for_s,
    stops_unit,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from qkilld.model.unit import UnitFacts
    from qkilld.stop.local import LocalStopper
    from qkilld.stop.log import Log
    from qkilld.stop.mailbox import Mailbox
    from qkilld.stop.notifier import Notifier
    from qkilld.stop.options import Options
    from qkilld.stop.stopper import Stopper
    from qkilld.stop.targets import Targets

EXITING_TIMEOUT_S = 60.0
"""The time for the kernel to finish the I/O of an exiting process and free its memory."""
UNIT_AFTER_S = 0.05
"""The delay before the unit's settings are read: an idle guest exits sooner and does not need
them."""
FIRST_TICK_S = 0.2
TICK_S = 1.0
"""How often systemd gets a status and an extension."""
NEVER = float("inf")


class StopRun:
    """Implements stopper.StopListener."""

    def __init__(
        self,
        options: Options,
        notifier: Notifier,
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._notifier = notifier
        self._log = log
        self._clock = clock
        self._stops_unit = stops_unit(os.environ)
        self._began = clock()
        self._stops: list[GuestStop] = []
        self._stoppers: list[Stopper | None] = [None] * (len(socket_paths(options)) + 1)
        """The stoppers in the order in which they are tried; each is None until needed. The last
        one is the local engine."""
        self._stopper_of: dict[GuestStop, Stopper] = {}
        self._place: dict[GuestStop, int] = {}
        """For each stop, the index of its stopper in `_stoppers`."""
        self._why: dict[GuestStop, str] = {}
        """For each stop, why an earlier stopper did not finish it."""
        self._targets: Targets | None = None
        self._local: LocalStopper | None = None
        self._mailbox: Mailbox | None = None
        self._departure: int | None = None
        self._next_tick = self._began + FIRST_TICK_S
        self._ask_unit_at = NEVER
        self._leave_at = NEVER
        """The time (time.monotonic()) up to which the unit's settings allow this program to run."""
        self._extendable = False
        """Whether systemd honours extensions."""
        self._is_unit_settled = False
        """Whether the unit's limits are known, or are being read from systemd."""
        self._overrun = False
        self._signals = -1

    def run(self) -> int:
        """Return the exit code. Raises QkilldError if nothing can be stopped."""
        self._signals, wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        try:
            self.begin(self._processes())
            self._work_until_over()
            for _ in range(MAX_RESTARTS):
                if not self._stop_others():
                    break
                self._work_until_over()
            return self.code
        finally:
            self.close()

    def _work_until_over(self) -> None:
        while self._departure is None and any(stop.running for stop in self._stops):
            self._wait()
            self.turn()

    def _stop_others(self) -> bool:
        """Stop the other guests of the unit that are ours to stop; return whether there are any."""
        main_pid = os.environ.get("MAINPID", "")
        pids = {stop.process.pid for stop in self._stops}
        shelled = any(str(pid) != main_pid for pid in pids)
        more = self._stops_unit and (shelled or has_others(pids))
        if self._departure is not None or not more or not self.targets.finder.in_own_unit:
            return False
        self._notifier.extend(FIRST)
        until = self._clock() + (RESTART_S if shelled else 0)
        while not (others := self.targets.substitutes(pids)):
            if not os.access(f"/proc/{main_pid or 'gone'}", os.F_OK) or self._clock() > until:
                return False
            time.sleep(0.05)
        if not shelled or self._options.names_one:
            others = self.targets.left_to_us(
                others,
                main_was_qemu=not shelled,
                fails=any(stop.code for stop in self._stops),
            )
        if others:
            say("another QEMU runs in the unit: stopping it too")
        self.begin(others)
        return bool(others)

    @property
    def code(self) -> int:
        codes = [stop.code for stop in self._stops if stop.code is not None]
        if len(codes) < len(self._stops) and self._departure is not None:
            return self._departure
        if self._targets is not None:
            self._notifier.extend(FIRST)  # It may ask systemd.
            codes += self._targets.codes()
        if not any(codes):
            return 0
        from qkilld.model.exits import worst

        return worst(codes)

    # ---- choosing processes ----

    def _processes(self) -> list[ProcessHandle]:
        main_pid = os.environ.get("MAINPID", "")
        if main_pid and not self._options.names_one and self._options.names_process:
            try:
                return [open_main_process(main_pid)]
            except Exception:
                pass  # `choose` raises the error again, or finds another process.
        return self.targets.choose()

    @property
    def targets(self) -> Targets:
        if self._targets is None:
            from qkilld.stop.targets import Targets

            self._targets = Targets(self._options)
        return self._targets

    def begin(self, processes: Sequence[ProcessHandle]) -> None:
        options = self._options
        stops = [
            GuestStop(
                process,
                forced=bool(options.force),
                powerdown=options.powerdown,
                ask_at_most=ASK_ALL if options.all_guests else None,
            )
            for process in processes
        ]
        self._stops += stops
        self._is_unit_settled = False
        if options.names_process:
            for stop in stops:
                if may_pass_monitor(stop.process.pid):
                    from qkilld.stop.passing import connect_monitor

                    connect_monitor(stop)
            self._start(stops)
        else:
            self._leave_to_keepers(stops)

    def _leave_to_keepers(self, stops: Sequence[GuestStop]) -> None:
        """Wait for the keepers of each guest (the units that shut it down), then stop the guest."""
        from qkilld.stop.keepers import leave_all
        from qkilld.stop.systemd_units import on_bus

        mailbox, user = self._mail, self.targets.user
        by_process = {stop.process: stop for stop in stops}

        def note_kept(process: ProcessHandle, keeper: str) -> None:
            stop = by_process[process]
            mailbox.put(lambda: self._note_kept(stop, keeper))

        def release(processes: Sequence[ProcessHandle]) -> None:
            free = [by_process.pop(process) for process in processes]
            mailbox.put(lambda: self._start([stop for stop in free if stop.running]))

        def work() -> None:
            try:
                on_bus(
                    lambda connection: leave_all(connection, list(by_process), note_kept, release),
                    user=user,
                )
            finally:
                release(list(by_process))

        if not self._in_thread(work):
            release(list(by_process))

    def _note_kept(self, stop: GuestStop, keeper: str) -> None:
        from qkilld.stop.helper_events import stop_kept

        self._log.write(stop_kept(self._guest(stop), keeper))

    @property
    def _mail(self) -> Mailbox:
        """The mailbox of the threads that ask systemd or libvirt."""
        if self._mailbox is None:
            from qkilld import log_setup
            from qkilld.stop.mailbox import Mailbox

            log_setup.silence()
            self._mailbox = Mailbox()
        return self._mailbox

    def _in_thread(self, work: Callable[[], None]) -> bool:
        """Return False if the system allows no more threads."""
        import threading

        from qkilld.debug_log import ignore

        with ignore("starting a thread", RuntimeError):
            threading.Thread(target=work, name="systemd", daemon=True).start()
            return True
        return False

    # ---- stopping ----

    def _wait(self) -> None:
        poll = select.poll()
        if self._signals >= 0:
            poll.register(self._signals, select.POLLIN)
        if self._mailbox is not None:
            poll.register(self._mailbox.fileno(), select.POLLIN)
        for stop in self._stops:
            if stop.running and not stop.is_exit_noted:
                poll.register(stop.process.pidfd, select.POLLIN)
        due = min(self._next_tick, self._ask_unit_at, self._leave_at)
        for stopper in self._stoppers:
            if stopper is not None:
                for descriptor in stopper.descriptors():
                    poll.register(descriptor, select.POLLIN)
                due = min(due, stopper.deadline())
        for stop in self._stops:
            if stop.running and stop.leave_at is not None:
                due = min(due, stop.leave_at)
        poll.poll(max(0, int((due - self._clock()) * 1000) + 1))

    def turn(self) -> None:
        """Handle everything that has been received or is due."""
        self._take_signals()
        for stop in list(self._stops):
            if stop.running and not stop.is_exit_noted and stop.process.exited():
                stop.is_exit_noted = True
                if stop not in self._stopper_of:
                    self._report_gone(stop)
                elif (stopper := self._stopper_of.get(stop)) is not None:
                    stopper.note_exit(stop)
        for stopper in self._stoppers:
            if stopper is not None:
                self._work(stopper)
        if self._mailbox is not None:
            self._mailbox.work()
        now = self._clock()
        for stop in self._stops:
            if stop.running and stop.leave_at is not None and now >= stop.leave_at:
                say(f"{stop.title} is exiting, but still there after {EXITING_TIMEOUT_S:g} s")
                self._over(stop, 4)
        if now >= self._ask_unit_at:
            self._ask_unit()
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._update_systemd()
        if now >= self._leave_at:
            self._leave_at = NEVER
            self._leave(4, "its unit allows no more time")

    def _work(self, stopper: Stopper) -> None:
        if stopper is self._local:
            stopper.work()
            return
        try:
            stopper.work()
        except Exception as error:
            # Use the next stopper, because the guest must be stopped whatever the daemon replies.
            for stop in self._stops:
                if stop.running and self._stopper_of.get(stop) is stopper:
                    self.lost(
                        stop, f"cannot parse the reply of qkilld: {type(error).__name__}: {error}"
                    )

    def _start(self, stops: Sequence[GuestStop]) -> None:
        """Start these stops. libvirt first asks the guests that it manages, each in a thread."""
        if not has_libvirt(os.environ):
            self._hand_over(stops, 0)
            return
        from qkilld.stop.libvirt_guest import domain_to_ask, shut_down_by_libvirt

        for stop in stops:
            if (domain := domain_to_ask(stop)) is None:
                self._hand_over([stop], 0)
                continue
            shut_down_by_libvirt(
                stop,
                domain,
                guest=self._guest(stop),
                span=self._options.spans.get("powerdown"),
                log=self._log,
                mailbox=self._mail,
                go_on=lambda stop: self._hand_over([stop], 0),
            )
            self._ask_unit_at = min(self._ask_unit_at, self._clock() + UNIT_AFTER_S)

    def _hand_over(self, stops: Sequence[GuestStop], place: int) -> None:
        if not stops:
            return
        stopper = self._stopper(place)
        for stop in stops:
            self._place[stop] = place
            self._stopper_of[stop] = stopper
            if self._local is not None and stopper is self._local:
                self._local.why[stop] = self._why.get(stop, "qkilld is not running")
                if not self._is_unit_settled:
                    self._ask_unit_at = min(self._ask_unit_at, self._clock() + UNIT_AFTER_S)
        stopper.start(stops)

    def _stopper(self, place: int) -> Stopper:
        stopper = self._stoppers[place]
        if stopper is None:
            paths = socket_paths(self._options)
            if place < len(paths):
                stopper = DaemonStopper(
                    paths[place],
                    self._options,
                    self,
                    stops_unit=self._stops_unit,
                    clock=self._clock,
                )
            else:
                stopper = self._local = self._make_local()
            self._stoppers[place] = stopper
        return stopper

    def _make_local(self) -> LocalStopper:
        from qkilld import log_setup
        from qkilld.stop.local import LocalStopper

        log_setup.silence()
        self._log.open()
        return LocalStopper(self._options, self, self._log, reason=self.targets.reason)

    # ---- stopper.StopListener ----

    def heard(self, stop: GuestStop, state: dict[str, Any]) -> None: ...

    def ended(self, stop: GuestStop, result: str) -> None:
        if result == "cancelled" and self._stops_unit and not stop.process.exited():
            self._note_given_up(stop, "its job was cancelled")
        if not stderr_is_journal():
            say(f"{stop.title} {ENDINGS.get(result, result)}")
        if result == "exited":
            self._over(stop, 0)
            return
        from qkilld.model.exits import exit_code_of

        self._over(stop, exit_code_of(result))

    def refused(self, stop: GuestStop, name: str, message: str) -> None:
        local = self._stopper_of[stop] is self._local
        match name:
            case "NoSuchProcess" if local or stop.process.exited():
                self._handle_exit(stop)
            case "NoSuchProcess":
                self.lost(stop, "qkilld reports the guest as exited, but it has not")
            case "NotQemu" if not stop.denial:
                self._stop_substitutes(stop, message)
            case "ProcessChanged":
                self._fail(stop, name, message)
            case "AccessDenied" if not local:
                stop.denial = stop.denial or message
                self.lost(stop, message)
            case "NotQemu" if local:
                # The daemon denied the stop, so do not reveal what the process runs.
                self._fail(stop, "AccessDenied", stop.denial)
            case _ if local:
                self._fail(stop, name, message)
            case _:
                self.lost(stop, f"qkilld says: {message}")

    def lost(self, stop: GuestStop, why: str) -> None:
        self._why.setdefault(stop, why)
        place = self._place[stop] + 1
        if stop.state is not None:
            self._why[stop] = why
            place = len(self._stoppers) - 1  # The local engine must continue a job that has begun.
        self._hand_over([stop], place)

    def unit_known(self, unit: dict[str, Any], stops: Sequence[GuestStop]) -> None:
        self._is_unit_settled = True
        self._ask_unit_at = NEVER
        for stop in stops:
            if stop.running:
                self._obey(stop, unit)
        self._extendable = unit["extendable"]
        if (stay := unit["stayUSec"]) is not None:
            self._leave_at = self._clock() + stay / 1e6 - ran_for_s()
        for stop in self._stops:
            if stop.running and unit["warnings"]:
                from qkilld.stop.helper_events import stop_limited

                for warning in unit["warnings"]:
                    self._log.write(stop_limited(self._guest(stop), warning))

    def unit_unknown(self, why: str) -> None:
        if not self._is_unit_settled:
            self._ask_unit_at = self._clock()

    # ---- results ----

    def _over(self, stop: GuestStop, code: int) -> None:
        stop.code = code
        self._stopper_of.pop(stop, None)

    def _fail(self, stop: GuestStop, name: str, message: str) -> None:
        from qkilld.model.errors import BY_BUS_NAME, ERROR_PREFIX, AccessDenied, Failed

        known = AccessDenied if name == "AccessDenied" else BY_BUS_NAME.get(ERROR_PREFIX + name)
        say(f"{stop.title}: {message}")
        self._over(stop, (known or Failed).exit_code)

    def _handle_exit(self, stop: GuestStop) -> None:
        """Handle a process that is gone or exiting, and so no longer reacts to signals."""
        others = self.targets.left_to_us(self._substitutes())
        if not stop.process.exited():
            # The kernel still finishes the I/O of the process.
            del self._stopper_of[stop]
            stop.leave_at = self._clock() + EXITING_TIMEOUT_S
        elif others:
            self._over(stop, 0)
        else:
            self._report_gone(stop)
        self.begin(others)

    def _report_gone(self, stop: GuestStop) -> None:
        say_ending(f"{stop.title} is gone already")
        self._over(stop, 0)

    def _stop_substitutes(self, stop: GuestStop, message: str) -> None:
        pid, others = stop.process.pid, self._substitutes()
        code, others = self.targets.judge_not_qemu(pid, message, others)
        self._over(stop, code)
        self.begin(others)

    def _substitutes(self) -> list[ProcessHandle]:
        self._notifier.extend(FIRST)  # The search and the new stops may take longer than a tick.
        return self.targets.substitutes({stop.process.pid for stop in self._stops})

    # ---- time limits ----

    def _ask_unit(self) -> None:
        """Read the unit's settings from systemd, in a thread."""
        self._ask_unit_at = NEVER
        self._is_unit_settled = True
        from qkilld.stop.systemd_units import limiting_units, on_bus

        mailbox, user = self._mail, self.targets.user
        pids = [stop.process.pid for stop in self._stops if stop.running]

        def work() -> None:
            units = on_bus(lambda connection: limiting_units(connection, pids), user=user)
            if units is not None:
                mailbox.put(lambda: self._facts_known(*units))

        self._in_thread(work)

    def _facts_known(self, facts: UnitFacts, guest_units: Mapping[int, UnitFacts]) -> None:
        from qkilld.decision.unit_limits import limits_of
        from qkilld.varlink.values import limits_value

        running = [stop for stop in self._stops if stop.running]
        for stop in running:
            pid = stop.process.pid
            inside = pid not in guest_units and self.targets.is_in_own_unit(pid)  # a substitute
            guest_unit = facts if inside else guest_units.get(pid)
            unit = limits_value(facts.id, limits_of(facts, os.getpid(), pid, guest_unit))
            before = stop.forced, stop.ask_at_most
            self._obey(stop, unit)
            stopper = self._stopper_of.get(stop)
            if before != (stop.forced, stop.ask_at_most) and stopper is not None:
                stopper.amend(stop)
        if running:
            # FORCE was decided above for each stop. The other limits are the same for all stops.
            self.unit_known(unit | {"force": False}, running)

    def _obey(self, stop: GuestStop, unit: dict[str, Any]) -> None:
        if unit["force"] and self._options.force is None:
            stop.force_if_allowed()
        if (ask := unit["askUSec"]) is not None:
            # askUSec counts from the start of this program, ask_at_most from `_began`.
            before = ran_for_s() - (self._clock() - self._began)
            ask = max(0, int(ask - max(0.0, before) * 1e6))
            stop.ask_at_most = ask if stop.ask_at_most is None else min(ask, stop.ask_at_most)

    def _update_systemd(self) -> None:
        now = time.monotonic_ns() // 1000
        states = [stop.state for stop in self._stops if stop.running and stop.state is not None]
        deadlines = [2**64 if (at := state.get("deadlineUSec")) is None else at for state in states]
        self._notifier.extend(extension(deadlines, now) if states else FIRST)
        if not states:
            # Skip the imports below, which take 12 ms and would delay the daemon's first reply.
            self._notifier.status(NO_STATE)
            return
        from qkilld.debug_log import ignore

        with ignore("sending a status to systemd", Exception):
            from qkilld.model.varlink_state import status_of
            from qkilld.stop.status_line import status_line

            self._notifier.status(status_line([status_of(state) for state in states], now))

    # ---- ending ----

    def _take_signals(self) -> None:
        if self._signals < 0:
            return
        try:
            numbers = os.read(self._signals, 64)
        except BlockingIOError:
            return
        for number in numbers:
            self.interrupted(signal.Signals(number))

    def interrupted(self, number: signal.Signals) -> None:
        if number == signal.SIGTERM and self._extendable and not self._overrun:
            self._go_on()
            return
        self._leave(130 if number == signal.SIGINT else 4, f"it got {number.name}")

    def _go_on(self) -> None:
        """Extend systemd's expired timeout. This is possible until systemd sends SIGKILL. (After
        `systemctl daemon-reload`, a timeout expires despite its extensions.)"""
        from qkilld.stop.helper_events import stop_overrun

        self._overrun = True
        self._notifier.extend(FIRST)
        for stop in self._stops:
            if stop.running:
                self._log.write(stop_overrun(self._guest(stop)))
                if (stopper := self._stopper_of.get(stop)) is not None:
                    stopper.release(stop)

    def _leave(self, code: int, why: str) -> None:
        if self._departure is not None:
            return
        for stop in self._stops:
            if stop.running and not stop.process.exited():
                self._note_given_up(stop, why)
                say_ending(f"{stop.title} is still there: {why}")
        self._departure = code

    def _note_given_up(self, stop: GuestStop, why: str) -> None:
        from qkilld.stop.helper_events import stop_given_up

        self._log.write(stop_given_up(self._guest(stop), why))

    def _guest(self, stop: GuestStop) -> Any:
        from qkilld.stop.helper_events import guest_of

        return guest_of(stop, self.targets.finder.unit)

    def close(self) -> None:
        for stopper in self._stoppers:
            if stopper is not None:
                stopper.close()
        for stop in self._stops:
            stop.close()
