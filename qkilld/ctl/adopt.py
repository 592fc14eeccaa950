"""The command adopt: install the drop-in that makes a unit safe, or remove it."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import stat
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

from qkilld import __version__
from qkilld.bus.systemd import Systemd
from qkilld.ctl.check_unit import UnitReport, check_unit, error_report, full_name, load, show
from qkilld.ctl.dropin_file import DropIn, all_drop_ins, is_writable_by_others
from qkilld.ctl.running_stops import wait_for_stops
from qkilld.ctl.session import NeedsRoot, Session
from qkilld.ctl.unit_context import config_of, find_helper, guard_of
from qkilld.model.constants import ExitCode
from qkilld.model.errors import Failed, NoSuchUnit, QkilldError
from qkilld.model.exits import worst
from qkilld.model.policy import Config
from qkilld.model.text import printable
from qkilld.unitcheck.command import HELPER
from qkilld.unitcheck.dropin import Change, changes, missing_changes, text_of
from qkilld.unitcheck.finding import Line

GUARD_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 0.1
_INTERRUPTS: Final = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
_SHOWN: Final = 4096


async def adopt(
    session: Session,
    names: Sequence[str],
    *,
    dry_run: bool,
    undo: bool,
    all_units: bool = False,
    now: bool = False,
) -> int:
    """Adopt each unit. With `undo`, remove its drop-in instead. Return the worst exit code.

    `all_units`: with `undo`, select every adopted unit. `now`: do not wait for running stops before
    `daemon-reload`.
    """
    _end_like_ctrl_c()
    adopter = _Adopter(session, await config_of(session), dry_run=dry_run, now=now)
    codes: list[int] = []
    documents: list[dict[str, Any]] = []
    if all_units:
        names = await adopter.adopted_units()
        if not names and not session.json:
            session.output.line("Nothing was adopted, so there is nothing to undo.")
    for name in names:
        try:
            code, document = await (adopter.undo(name) if undo else adopter.adopt(name))
        except QkilldError as error:
            code, document = error.exit_code, error_report(session, name, error)
        codes.append(code)
        documents.append(document)
    if session.json:
        session.output.json(documents)
    return worst(codes)


def _end_like_ctrl_c() -> None:
    """On SIGTERM or SIGHUP (a closed terminal), cancel the task as Ctrl-C does, so that it undoes
    its changes."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in _INTERRUPTS[1:]:
        if signal.getsignal(number) is signal.SIG_DFL:
            loop.add_signal_handler(number, task.cancel)


class _Adopter:
    def __init__(self, session: Session, config: Config, *, dry_run: bool, now: bool) -> None:
        self._session = session
        self._now = now
        self._systemd = Systemd(session.connection)
        self._config = config
        self._dry_run = dry_run

    async def adopt(self, name: str) -> tuple[int, dict[str, Any]]:
        report = await self._check(name)
        wanted = changes(report.findings)
        if report.facts.is_scope and not report.surroundings.guard:
            raise _no_users_guard(report.name)
        if not report.comparison.writes:
            return self._report_unchanged(report)
        if report.facts.is_scope:
            return await self._guard(report)
        self._check_helper()
        if not self._dry_run:
            self._check_root(report.name)
        drop_in = DropIn(await self._base(report.facts.transient), report.name)
        old = drop_in.read()
        wanted = missing_changes(wanted, old)
        if not wanted:
            # The drop-in is complete, but another one overrides it, or systemd has not loaded it.
            if not report.overrides and not self._dry_run:
                await self._wait_for_stops()
                await self._reload(f"{drop_in.path} is complete")
                report = await self._check(name)
            return self._report(report, None, "")
        undo = f"{self._session.command} adopt --undo {shlex.quote(report.name)}"
        text = text_of(report.name, undo, __version__, wanted, old)
        if not self._dry_run:
            await self._wait_for_stops()
        self._show_file(drop_in, text, old)
        if self._dry_run:
            for each in report.overrides:
                self._say(f"  {each}, and will override this drop-in: change that file")
            document = report.as_json() | {"path": str(drop_in.path), "text": text}
            return ExitCode.OK, document
        drop_in.write(text)
        try:
            after = await self._check_adopted(drop_in, old, report)
        except asyncio.CancelledError:
            for number in _INTERRUPTS:  # Do not interrupt `_restore`.
                signal.signal(number, signal.SIG_IGN)
            self._say("Interrupted: taking the drop-in back.")
            await self._restore(drop_in, old)
            raise
        return self._report(after, drop_in, text)

    async def _check_adopted(self, drop_in: DropIn, old: str, report: UnitReport) -> UnitReport:
        try:
            await self._systemd.reload()
            after = await self._check(report.name)
            _compare_with_prediction(report, after)
        except QkilldError:
            # Either systemd did not reload, or it rejected the drop-in or parsed it differently
            # than predicted.
            await self._restore(drop_in, old)
            raise
        return after

    async def _restore(self, drop_in: DropIn, old: str) -> None:
        if old:
            drop_in.write(old)
        else:
            drop_in.remove()
        await self._reload(f"{drop_in.path} was taken back")

    def _report_unchanged(self, report: UnitReport) -> tuple[int, dict[str, Any]]:
        if not self._session.json:
            show(self._session, report)
            if not report.is_safe:
                self._say("  The unit was not changed.")
        return report.exit_code, report.as_json() | {"path": None, "text": ""}

    async def adopted_units(self) -> list[str]:
        """List all units that have our drop-in, and all scopes that have a guard."""
        unit_names: dict[str, None] = {}
        for transient in (False, True):
            base = await self._base(transient)
            unit_names.update(dict.fromkeys(each.unit for each in all_drop_ins(base)))
        if not self._session.bus.user:
            guards = await self._systemd.list_units("qkilld-scope@*.service", states=["active"])
            for guard in guards:
                unit_names[guard.removeprefix("qkilld-scope@").removesuffix(".service")] = None
        return list(unit_names)

    async def _wait_for_stops(self) -> None:
        if not self._now:
            advice = "Nothing was changed: try again later, or with --now"
            await wait_for_stops(self._systemd, advice)

    async def undo(self, name: str) -> tuple[int, dict[str, Any]]:
        try:
            _, primary = await load(self._systemd, name)
        except (NoSuchUnit, Failed):
            primary = full_name(name)  # The unit was removed, but its drop-in may still exist.
        if primary.endswith(".scope"):
            return await self._unguard(primary)
        if not self._dry_run:
            self._check_root(primary, "--undo ")
        if not self._dry_run:
            await self._wait_for_stops()
        paths = []
        # Try both names: the unit may have been adopted under a name that is an alias now.
        bases = [await self._base(transient) for transient in (False, True)]
        for base, unit in product(bases, dict.fromkeys((primary, full_name(name)))):
            drop_in = DropIn(base, unit)
            if not drop_in.read():
                continue
            paths.append(str(drop_in.path))
            self._say(f"{'Would remove' if self._dry_run else 'Removed'} {drop_in.path}")
            if not self._dry_run:
                drop_in.remove()
        if not paths:
            raise await self._not_adopted(primary)
        if not self._dry_run:
            await self._reload(f"{', '.join(paths)} was removed")
        return ExitCode.OK, {"unit": primary, "removed": paths, "error": None, "exit_code": 0}

    async def _not_adopted(self, name: str) -> Failed:
        text = f"{printable(name)} was not adopted"
        prefix, at, rest = name.partition("@")
        template = f"{prefix}@.{rest.rpartition('.')[2]}"
        if at and template != name and DropIn(await self._base(transient=False), template).read():
            command = f"{self._session.command} adopt --undo {shlex.quote(template)}"
            return Failed(
                f"{text} by itself, but through its template {printable(template)}: `{command}` "
                "undoes that for all instances"
            )
        return Failed(f"{text}, so there is nothing to undo")

    # A scope has no ExecStop=. So another unit (the scope's guard) is stopped before the scope. The
    # guard's ExecStop= stops the guest.

    async def _guard(self, report: UnitReport) -> tuple[int, dict[str, Any]]:
        guard = report.surroundings.guard
        if not guard:
            raise _no_users_guard(report.name)
        if not report.surroundings.is_guarded:
            try:
                await self._systemd.unit(guard)
            except NoSuchUnit:
                raise Failed(
                    "qkilld-scope@.service, which guards scopes, is not installed"
                ) from None
            say = "Would start" if self._dry_run else "Starting"
            self._say(f"{say} {guard}, which guards the scope until its guest has exited;")
            self._say("  another scope with this name will need a new guard.")
            if self._dry_run:
                return ExitCode.OK, report.as_json() | {"guard": guard}
            await self._systemd.start(guard)
            await self._wait_state(guard, "active")
            report = await self._check(report.name)
        # Write no drop-in, because a scope's settings belong to the program that created it.
        return self._report(report, None, "")

    async def _unguard(self, scope: str) -> tuple[int, dict[str, Any]]:
        """Stop the guard without running its ExecStop=, which would stop the guest."""
        if self._session.bus.user:
            raise _no_users_guard(scope)
        guard = guard_of(scope)
        document = {"unit": scope, "guard": guard, "error": None, "exit_code": 0}
        if (await self._systemd.unit(guard)).active_state != "active":
            raise Failed(f"{printable(scope)} is not guarded, so there is nothing to undo")
        self._say(f"{'Would stop' if self._dry_run else 'Stopping'} {guard}, but not the guest.")
        if self._dry_run:
            return ExitCode.OK, document
        await self._wait_for_stops()
        drop_in = DropIn(await self._base(transient=True), guard)
        why = "the guard must be stopped without stopping the guest"
        reset = Change(why, (Line("Service", "ExecStop="),))
        drop_in.write(text_of(guard, f"rm {drop_in.path}", __version__, [reset]))
        try:
            await self._systemd.reload()
            if (await self._systemd.unit(guard)).exec_stop:
                raise Failed(f"{guard} would stop the guest, so nothing was changed")
            await self._systemd.stop(guard)
            await self._wait_state(guard, "inactive")
        finally:
            drop_in.remove()
            await self._systemd.reload()
        return ExitCode.OK, document

    async def _wait_state(self, unit: str, state: str) -> None:
        try:
            async with asyncio.timeout(GUARD_TIMEOUT_S):
                while (now := (await self._systemd.unit(unit)).active_state) != state:
                    if now == "failed":
                        raise Failed(f"{unit} failed: see `systemctl status {unit}`")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise Failed(
                f"{unit} is not {state} after {GUARD_TIMEOUT_S:g} s: see `systemctl status {unit}`"
            ) from None

    async def _check(self, name: str) -> UnitReport:
        return await check_unit(self._session, self._systemd, name, self._config)

    async def _base(self, transient: bool) -> Path:
        """Return the directory for drop-ins. `transient`: return one that is cleared at reboot."""
        if self._session.bus.user:
            config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
            base = Path(os.environ.get("XDG_RUNTIME_DIR", "/run") if transient else config)
            base /= "systemd/user"
        else:
            base = Path("/run" if transient else "/etc") / "systemd/system"
        if str(base) not in await self._systemd.search_path():
            raise Failed(f"this systemd manager does not read drop-ins from {base}")
        return base

    async def _reload(self, done: str) -> None:
        """Reload systemd. On failure, raise Failed with a message that begins with `done`."""
        try:
            await self._systemd.reload()
        except QkilldError as error:
            user = " --user" if self._session.bus.user else ""
            raise Failed(
                f"{printable(done, _SHOWN)}, but reloading systemd failed ({error}): run "
                f"`systemctl{user} daemon-reload`"
            ) from None

    def _check_root(self, name: str, option: str = "") -> None:
        """Raises NeedsRoot."""
        if os.geteuid() == 0 or self._session.bus.user:
            return
        own = f"qkillctl --user adopt {option}{shlex.quote(name)}"
        raise NeedsRoot(
            f"{printable(name)} is a system unit, whose drop-ins only root can write: run this as "
            f"root. If it is your own unit: `{printable(own)}`"
        )

    def _check_helper(self) -> None:
        """Raise Failed if qkilld-stop is missing, or if another user could replace it, because
        units run it with their own privileges."""
        helper = find_helper()
        if helper is None:
            if self._dry_run:
                return
            raise Failed(f"{HELPER} is not installed beside qkillctl: install qkilld completely")
        trusted = {0, os.geteuid()} if self._session.bus.user else {0}
        for path in (helper, *helper.parents):
            status = path.stat()
            writable = is_writable_by_others(status) and not status.st_mode & stat.S_ISVTX
            if status.st_uid not in trusted or writable:
                raise Failed(
                    f"{path} can be changed by other users, so no unit may run it: "
                    "correct its owner and mode"
                )

    def _show_file(self, drop_in: DropIn, text: str, old: str) -> None:
        old_lines = set(old.splitlines())
        self._say(f"{'Would write' if self._dry_run else 'Writing'} {drop_in.path}:")
        for line in text.splitlines():
            self._say(f"  {' ' if line in old_lines else '+'} {line}")

    def _report(
        self, report: UnitReport, drop_in: DropIn | None, text: str
    ) -> tuple[int, dict[str, Any]]:
        if not self._session.json:
            show(self._session, report)
            if not report.is_safe and not report.overrides:
                self._say("  adopt does not change the rest: that is your decision.")
        written = {"path": str(drop_in.path), "text": text} if drop_in else {}
        return report.exit_code, report.as_json() | written

    def _say(self, text: str) -> None:
        if not self._session.json:
            self._session.output.line(printable(text, _SHOWN))


def _compare_with_prediction(before: UnitReport, after: UnitReport) -> None:
    """Raise Failed if the adopted unit is less safe than predicted."""
    predicted, real = before.comparison.adopted, after.comparison.now
    worse = [each.value for each in predicted if not real[each] >= predicted[each]]
    if worse:
        raise Failed(
            f"with the drop-in, {printable(before.name)} keeps less than predicted "
            f"({', '.join(worse)}), so the change was reverted. Something else may set the "
            f"same settings: see `systemctl cat {printable(before.name)}`"
        )


def _no_users_guard(scope: str) -> Failed:
    return Failed(
        f"{printable(scope)} belongs to your own manager, whose scopes cannot be guarded: start the"
        " guest as a service, with `systemd-run --user` without --scope"
    )
