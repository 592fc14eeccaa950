"""adopt: write the drop-in that makes a unit safe, or take it back."""

from __future__ import annotations

import asyncio
import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qkilld import __version__
from qkilld.bus.systemd import Systemd
from qkilld.ctl.dropin import DropIn, is_writable_by_others
from qkilld.ctl.session import NeedsRoot, Session
from qkilld.ctl.surroundings import config_of, find_helper, guard_of
from qkilld.ctl.units import Checked, check_unit, failed, full_name, load, show
from qkilld.judgement.adoption import Change, changes, text_of, unwritten
from qkilld.judgement.finding import Line
from qkilld.judgement.stopcommand import HELPER
from qkilld.model.errors import Failed, NoSuchUnit, QkilldError
from qkilld.model.exits import worst
from qkilld.model.policy import Config
from qkilld.model.text import printable
from qkilld.model.words import ExitCode

GUARD_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 0.1
_SHOWN: Final = 4096


async def adopt(session: Session, names: Sequence[str], *, dry_run: bool, undo: bool) -> int:
    """Each unit by itself; the exit code is that of the worst."""
    adopter = _Adopter(session, await config_of(session), dry_run=dry_run)
    codes: list[int] = []
    documents: list[dict[str, Any]] = []
    for name in names:
        try:
            code, document = await (adopter.undo(name) if undo else adopter.adopt(name))
        except QkilldError as error:
            code, document = error.exit_code, failed(session, name, error)
        codes.append(code)
        documents.append(document)
    if session.json:
        session.output.json(documents)
    return worst(codes)


class _Adopter:
    def __init__(self, session: Session, config: Config, *, dry_run: bool) -> None:
        self._session = session
        self._systemd = Systemd(session.connection)
        self._config = config
        self._dry_run = dry_run

    async def adopt(self, name: str) -> tuple[int, dict[str, Any]]:
        checked = await self._check(name)
        if checked.facts.is_scope:
            return await self._guard(checked)
        wanted = changes(checked.findings)
        if not wanted:
            return self._told(checked, None, "")
        self._check_helper()
        if not self._dry_run:
            self._check_root(checked.name)
        drop_in = DropIn(await self._base(checked.facts.transient), checked.name)
        old = drop_in.read()
        wanted = unwritten(wanted, old)
        if not wanted:
            # It is all in there already: something stands over it, or systemd has not read it yet.
            if not checked.overrides and not self._dry_run:
                await self._reload(drop_in)
                checked = await self._check(name)
            return self._told(checked, None, "")
        undo = f"{self._session.bus.command} adopt --undo {shlex.quote(checked.name)}"
        text = text_of(checked.name, undo, __version__, wanted, old)
        self._show_file(drop_in, text, old)
        if self._dry_run:
            for each in checked.overrides:
                self._say(f"  {each}, which will stand over it: change it there")
            document = checked.as_json() | {"path": str(drop_in.path), "text": text}
            return ExitCode.OK, document
        drop_in.write(text)
        await self._reload(drop_in)
        try:
            after = await self._check(name)
        except QkilldError:
            # systemd does not load the unit with it: then better as it was.
            if old:
                drop_in.write(old)
            else:
                drop_in.remove()
            await self._systemd.reload()
            raise
        return self._told(after, drop_in, text)

    async def undo(self, name: str) -> tuple[int, dict[str, Any]]:
        try:
            _, primary = await load(self._systemd, name)
        except (NoSuchUnit, Failed):
            primary = full_name(name)  # the unit has gone, its drop-in has not
        if primary.endswith(".scope"):
            return await self._unguard(primary)
        if not self._dry_run:
            self._check_root(primary, "--undo ")
        taken = []
        for transient in (False, True):
            drop_in = DropIn(await self._base(transient), primary)
            if not drop_in.read():
                continue
            taken.append(str(drop_in.path))
            self._say(f"{'Would remove' if self._dry_run else 'Removed'} {drop_in.path}")
            if not self._dry_run:
                drop_in.remove()
        if not taken:
            raise await self._not_adopted(primary)
        if not self._dry_run:
            await self._systemd.reload()
        return ExitCode.OK, {"unit": primary, "removed": taken, "error": None, "exit_code": 0}

    async def _not_adopted(self, name: str) -> Failed:
        text = f"{printable(name)} was not adopted"
        prefix, at, rest = name.partition("@")
        template = f"{prefix}@.{rest.rpartition('.')[2]}"
        if at and template != name and DropIn(await self._base(transient=False), template).read():
            command = f"{self._session.bus.command} adopt --undo {shlex.quote(template)}"
            return Failed(
                f"{text} by itself but through its template, {printable(template)}: `{command}`"
                " takes that back for all its instances"
            )
        return Failed(f"{text}: there is nothing to take back")

    # Scopes have no ExecStop=: a unit that is stopped before them waits in their place.

    async def _guard(self, checked: Checked) -> tuple[int, dict[str, Any]]:
        guard = checked.around.guard
        if not guard:
            raise _no_users_guard(checked.name)
        if not checked.around.is_guarded:
            try:
                await self._systemd.unit(guard)
            except NoSuchUnit:
                raise Failed("qkilld-scope@.service is not installed, and guards scopes") from None
            say = "Would start" if self._dry_run else "Starting"
            self._say(f"{say} {guard}, which guards the scope until its guest has ended;")
            self._say("  the next scope of that name is another one and needs it again.")
            if self._dry_run:
                return ExitCode.OK, checked.as_json() | {"guard": guard}
            await self._systemd.start(guard)
            await self._wait_state(guard, "active")
            checked = await self._check(checked.name)
        # A scope's own properties belong to whoever made it.
        return self._told(checked, None, "")

    async def _unguard(self, scope: str) -> tuple[int, dict[str, Any]]:
        """Stopping the guard is what stops the guest: its ExecStop= is taken from it before."""
        if self._session.bus.user:
            raise _no_users_guard(scope)
        guard = guard_of(scope)
        document = {"unit": scope, "guard": guard, "error": None, "exit_code": 0}
        if (await self._systemd.unit(guard)).active_state != "active":
            raise Failed(f"{printable(scope)} is not guarded: there is nothing to take back")
        self._say(f"{'Would stop' if self._dry_run else 'Stopping'} {guard}, and not the guest.")
        if self._dry_run:
            return ExitCode.OK, document
        drop_in = DropIn(await self._base(transient=True), guard)
        why = "the guard is to end and leave the guest alone"
        reset = Change(why, (Line("Service", "ExecStop="),))
        drop_in.write(text_of(guard, f"rm {drop_in.path}", __version__, [reset]))
        try:
            await self._systemd.reload()
            if (await self._systemd.unit(guard)).exec_stop:
                raise Failed(f"{guard} would stop the guest: it was left as it is")
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

    async def _check(self, name: str) -> Checked:
        return await check_unit(self._session, self._systemd, name, self._config)

    async def _base(self, transient: bool) -> Path:
        """Where drop-ins go: what is transient has them where a reboot removes them as well."""
        if self._session.bus.user:
            config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
            base = Path(os.environ.get("XDG_RUNTIME_DIR", "/run") if transient else config)
            base /= "systemd/user"
        else:
            base = Path("/run" if transient else "/etc") / "systemd/system"
        if str(base) not in await self._systemd.search_path():
            raise Failed(f"this manager of systemd reads nothing from {base}")
        return base

    async def _reload(self, drop_in: DropIn) -> None:
        try:
            await self._systemd.reload()
        except QkilldError as error:
            user = " --user" if self._session.bus.user else ""
            raise Failed(
                f"{drop_in.path} is written, but systemd could not be made to read it ({error}):"
                f" run `systemctl{user} daemon-reload`"
            ) from None

    def _check_root(self, name: str, option: str = "") -> None:
        """Raises NeedsRoot."""
        if os.geteuid() == 0 or self._session.bus.user:
            return
        own = f"qkillctl --user adopt {option}{shlex.quote(name)}"
        raise NeedsRoot(
            f"{printable(name)} is a unit of the system, whose drop-ins only root can write: run"
            f" this as root. Where it is a unit of your own: `{printable(own)}`"
        )

    def _check_helper(self) -> None:
        """Raises Failed where it is not there, or somebody else could put something in its place.

        What is written into a unit is run with the rights of the unit.
        """
        helper = find_helper()
        if helper is None:
            if self._dry_run:
                return
            raise Failed(f"{HELPER} is not installed: `make install` puts it beside qkillctl")
        trusted = {0, os.geteuid()} if self._session.bus.user else {0}
        for path in (helper, *helper.parents):
            found = path.stat()
            writable = is_writable_by_others(found) and not found.st_mode & stat.S_ISVTX
            if found.st_uid not in trusted or writable:
                raise Failed(f"{path} can be changed by others, so no unit can be made to run it")

    def _show_file(self, drop_in: DropIn, text: str, old: str) -> None:
        kept = set(old.splitlines())
        self._say(f"{'Would write' if self._dry_run else 'Writing'} {drop_in.path}:")
        for line in text.splitlines():
            self._say(f"  {' ' if line in kept else '+'} {line}")

    def _told(
        self, checked: Checked, drop_in: DropIn | None, text: str
    ) -> tuple[int, dict[str, Any]]:
        if not self._session.json:
            show(self._session, checked)
            if not checked.is_safe and not checked.overrides:
                self._say("  What is left is for you to decide: adopt does not change it.")
        written = {"path": str(drop_in.path), "text": text} if drop_in else {}
        return checked.exit_code, checked.as_json() | written

    def _say(self, text: str) -> None:
        if not self._session.json:
            self._session.output.line(printable(text, _SHOWN))


def _no_users_guard(scope: str) -> Failed:
    return Failed(
        f"{printable(scope)} belongs to your own manager, whose scopes cannot be guarded: start the"
        " guest as a service, with `systemd-run --user` without --scope"
    )
