"""One run of the helper: all its targets at once, each by the daemon or without it.

What only a guest needs that takes its time is imported when it does so: an idle one is gone 10 ms
after the daemon was asked, and everything else that `systemctl stop` takes is the helper's start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio import FIRST_COMPLETED
from typing import TYPE_CHECKING, Final

from qkilld.model.errors import AccessDenied, BusError, NoSuchProcess, NotQemu, QkilldError
from qkilld.model.exits import INTERRUPTED, exit_code_of, worst
from qkilld.model.words import INFINITY, ExitCode
from qkilld.stop.daemonic import DaemonJob, Lost
from qkilld.stop.limits import FIRST, extension, limits_of, would_be_killed
from qkilld.stop.log import Log, say, say_ending
from qkilld.stop.notify import Notifier
from qkilld.stop.options import Options
from qkilld.stop.order import Order
from qkilld.stop.target import Finder, Target, ran_for_s

if TYPE_CHECKING:
    from qkilld.bus.connection import Connection
    from qkilld.model.unit import UnitFacts
    from qkilld.stop.alone import Alone

CONNECT_TIMEOUT_S: Final = 2.0
EXITING_TIMEOUT_S: Final = 60.0
"""The kernel waits for the I/O of a process that exits, and takes its memory apart."""
FACTS_AFTER_S: Final = 0.05
"""An idle guest is gone before: its unit need not be asked for."""
FIRST_TICK_S: Final = 0.2
TICK_S: Final = 1.0
"""How often systemd is told how it goes, and for how much longer it may."""

_ENDINGS: Final = {
    "exited": "is gone, without SIGKILL",
    "killed": "is gone, but only by SIGKILL: data may be lost",
    "survived": "is still there, and gets no more signals",
    "cancelled": "is still there: its stop was called off",
    "failed": "could not be stopped, see the journal",
}
"""By a job's result."""


class Stopping:
    def __init__(self, options: Options, notifier: Notifier, log: Log) -> None:
        self.options = options
        self._notifier = notifier
        self._log = log
        self._finder = Finder(options, os.environ)
        self._orders: list[Order] = []
        self._facts: UnitFacts | None = None
        self._connections: dict[bool, asyncio.Task[Connection | str]] = {}
        """Of each bus (True: the session's), or why there is none."""
        self._alone: Alone | None = None
        self._left: asyncio.Future[int]
        self._extendable = False
        """systemd has been asked, and heeds what it is told of the time that is needed."""
        self._overrun = False

    async def run(self) -> int:
        """The exit code. Raises QkilldError where there is nothing to stop, or no right to."""
        loop = asyncio.get_running_loop()
        self._left = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._interrupted, number)
        side = [asyncio.create_task(self._tell()), asyncio.create_task(self._learn())]
        try:
            return await self._stop_all(await self.targets())
        finally:
            for task in side:
                task.cancel()
            await asyncio.gather(*side, return_exceptions=True)
            await self._close()

    async def rehearse(self) -> int:
        """The same with nothing done."""
        from qkilld.stop.rehearsal import rehearse

        try:
            return await rehearse(self, as_json=self.options.json)
        finally:
            await self._close()

    # Which

    async def targets(self) -> list[Target]:
        try:
            if (named := self._finder.named()) is not None:
                return [named]
        except NoSuchProcess:
            # A shell around the guest, say: it may be gone without it.
            if not (found := self.instead()):
                raise
            return found
        if self.options.everyone:
            return await self._everyone()
        found = self._in_unit()
        if found:
            return found
        if self.options.unit is not None:
            await self._check_unit(self.options.unit)
        raise NoSuchProcess("no QEMU runs in the unit")

    async def _everyone(self) -> list[Target]:
        from qkilld.stop.everyone import without_care

        found = self._finder.of_manager(self.engine().config.executables)
        connection = await self._connection(bool(self._finder.unit.user))
        targets = await without_care(found, connection)
        if not targets:
            raise NoSuchProcess("no QEMU runs that its own unit does not take care of")
        return targets

    def _in_unit(self) -> list[Target]:
        return self._finder.in_unit(self.engine().config.executables)

    def instead(self) -> list[Target]:
        """Those that are meant where the main process is none, or gone: a shell around it, say."""
        if not self._finder.in_own_unit:
            return []
        known = {order.target.pid for order in self._orders}
        found = self._in_unit()
        for target in found:
            if target.pid in known:
                target.close()
        return [target for target in found if target.pid not in known]

    async def _check_unit(self, name: str) -> None:
        """Raises NoSuchUnit where systemd says so."""
        from qkilld.bus.systemd import Systemd

        connection = await self._connection(bool(self._finder.unit.user))
        if not isinstance(connection, str):
            with contextlib.suppress(BusError):
                await Systemd(connection).unit(name)

    # How

    async def _stop_all(self, found: list[Target]) -> int:
        done = [asyncio.create_task(self._stop(target)) for target in found]
        try:
            every = asyncio.gather(*done)
            await asyncio.wait((every, self._left), return_when=FIRST_COMPLETED)
            return worst(every.result()) if every.done() else self._left.result()
        finally:
            for task in done:
                task.cancel()
            await asyncio.gather(*done, return_exceptions=True)

    async def _stop(self, target: Target) -> int:
        """The exit code for one process."""
        order = Order(target, self._finder.unit)
        order.forced = self.forced(target.pid)
        self._orders.append(order)
        try:
            result = await self._by_daemon(order)
        except NoSuchProcess:
            return await self._gone(order)
        except NotQemu as error:
            order.running = False
            return await self._instead_of(error)
        except QkilldError as error:
            say(f"{order.title}: {error}")
            return error.exit_code
        finally:
            order.running = False
        if result == "cancelled" and self._finder.by_systemd and not order.target.exited():
            from qkilld.stop.events import stop_left

            self._log.write(stop_left(order.guest, "its stop was called off"))
        say_ending(f"{order.title} {_ENDINGS.get(result, result)}")
        return exit_code_of(result)

    async def _gone(self, order: Order) -> int:
        """Of what is gone already, or on its way: exiting, where no signal is of any use."""
        if found := self.instead():
            return worst(await asyncio.gather(*(self._stop(target) for target in found)))
        try:
            async with asyncio.timeout(EXITING_TIMEOUT_S):
                await order.target.gone()
        except TimeoutError:
            say(f"{order.title} is exiting, but still there after {EXITING_TIMEOUT_S:g} s")
            return ExitCode.SURVIVED
        say_ending(f"{order.title} is gone already")
        return ExitCode.OK

    async def _instead_of(self, error: NotQemu) -> int:
        if not (found := self.instead()):
            say(f"{error}{'; nor is another of its unit' if self._finder.in_own_unit else ''}")
            return error.exit_code
        return worst(await asyncio.gather(*(self._stop(target) for target in found)))

    async def _by_daemon(self, order: Order) -> str:
        """The result. By itself where there is no daemon that does it."""
        why = ""
        denied: AccessDenied | None = None
        # The system's may stop everybody's guests, a user's own only those of the user.
        for user in (False, True) if self._finder.unit.user else (False,):
            connection = await self._connection(user)
            if isinstance(connection, str):
                why = why or connection
                continue
            job = DaemonJob(connection, order.target, self._given(), order.changed)
            order.daemon = job
            try:
                await job.start(order.flags)
                return await job.follow()
            except (NoSuchProcess, NotQemu):
                raise
            except AccessDenied as error:
                why, denied = str(error), error
            except Lost as error:
                why = str(error)
            except QkilldError as error:
                why = f"qkilld says: {error}"
            order.daemon, order.view = None, job.last_known()
            if order.view is not None:
                break  # it was under way there
        try:
            return await self._by_itself(order, why)
        except NotQemu as error:
            # Who may not touch a process is not shown either what it runs.
            raise (denied or error) from None

    async def _by_itself(self, order: Order, why: str) -> str:
        engine = self.engine()
        order.job = await engine.start(order, self.options.spans, self._reason(), why)
        return await engine.ended(order.job)

    def _given(self) -> dict[str, int | str]:
        """The options of TerminateWithOptions."""
        return {**self.options.spans, "reason": self._reason()}

    def _reason(self) -> str:
        if self.options.reason is not None:
            return self.options.reason
        return f"ExecStop of {self._finder.unit.name}" if self._finder.by_systemd else "qkilld-stop"

    def engine(self) -> Alone:
        if self._alone is None:
            from qkilld.stop.alone import Alone

            self._alone = Alone(self._log)
        return self._alone

    async def _connection(self, user: bool) -> Connection | str:
        if user not in self._connections:
            self._connections[user] = asyncio.create_task(_connect(user))
        return await self._connections[user]

    # How long

    async def facts(self) -> UnitFacts | None:
        """What systemd says of the unit that it is stopping, if this is part of it."""
        from qkilld.stop.facts import own_facts

        connection = await self._connection(bool(self._finder.unit.user))
        if not isinstance(connection, str):
            self._facts = await own_facts(connection)
        return self._facts

    async def _learn(self) -> None:
        """Ask for the settings of the unit, and heed them."""
        await asyncio.sleep(FACTS_AFTER_S)
        from qkilld.stop.events import stop_limited

        if (facts := await self.facts()) is None:
            return
        limits = limits_of(facts, os.getpid())
        for order in self._running:
            for warning in limits.warnings:
                self._log.write(stop_limited(order.guest, warning))
            if self.options.force is None and self.forced(order.target.pid):
                await self._force(order)
        self._extendable = limits.stay == INFINITY and facts.timeout_stop != INFINITY
        if limits.stay != INFINITY:
            await asyncio.sleep(limits.stay / 1e6 - ran_for_s())
            self._leave(ExitCode.SURVIVED, "its unit allows no more time")

    def forced(self, pid: int) -> bool:
        """Whether its stop may end in SIGKILL, as far as is known."""
        if self.options.force is not None:
            return self.options.force
        return self._facts is not None and would_be_killed(self._facts, pid)

    async def _force(self, order: Order) -> None:
        """Add FORCE to a stop that is under way."""
        order.forced = True
        if order.job is not None:
            self.engine().force(order, self._reason())
        elif order.daemon is not None:
            await order.daemon.add(order.flags)

    async def _tell(self) -> None:
        """Keep systemd informed, until cancelled."""
        await asyncio.sleep(FIRST_TICK_S)
        from qkilld.stop.status import status

        while True:
            now = time.monotonic_ns() // 1000
            views = [order.view for order in self._running if order.view is not None]
            deadlines = [int(view.properties["DeadlineUSec"]) for view in views]
            self._notifier.extend(extension(deadlines, now) if views else FIRST)
            self._notifier.status(status(views, now))
            await asyncio.sleep(TICK_S)

    @property
    def _running(self) -> list[Order]:
        return [order for order in self._orders if order.running]

    # The end

    def _interrupted(self, number: signal.Signals) -> None:
        if number == signal.SIGTERM and self._extendable and not self._overrun:
            self._go_on()
            return
        code = INTERRUPTED if number == signal.SIGINT else ExitCode.SURVIVED
        self._leave(code, f"it got {signal.Signals(number).name}")

    def _go_on(self) -> None:
        """systemd's clock has run out though it was extended: `systemctl daemon-reload` forgets
        what it was extended by. It can be extended again, as long as it has not come to SIGKILL."""
        from qkilld.stop.events import stop_overrun

        self._overrun = True
        self._notifier.extend(FIRST)
        for order in self._running:
            self._log.write(stop_overrun(order.guest))
            if order.job is not None:
                # Whoever held it cannot release it any more: the qkilld that was asked is gone.
                self.engine().release(order)

    def _leave(self, code: int, why: str) -> None:
        from qkilld.stop.events import stop_left

        if self._left.done():
            return
        for order in self._running:
            if not order.target.exited():
                self._log.write(stop_left(order.guest, why))
                say_ending(f"{order.title} is still there: {why}")
        self._left.set_result(code)

    async def _close(self) -> None:
        if self._alone is not None:
            self._alone.close()
        for task in self._connections.values():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                if not isinstance(connection := await task, str):
                    connection.close()
        for order in self._orders:
            order.target.close()


async def _connect(user: bool) -> Connection | str:
    from qkilld.bus.connection import connect

    try:
        return await connect(user=user, timeout_s=CONNECT_TIMEOUT_S)
    except BusError as error:
        return str(error)
