"""check-unit: what in a unit loses data, and the lines that mend it; and the names of units."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qkilld.bus.systemd import KINDS, Systemd
from qkilld.ctl.session import Session, error_as_json, explain
from qkilld.ctl.surroundings import config_of, executable, gather, overrides
from qkilld.judgement.adoption import Override, changes
from qkilld.judgement.finding import Finding, Severity
from qkilld.judgement.surroundings import Surroundings
from qkilld.judgement.target import is_qemu
from qkilld.judgement.unitcheck import check
from qkilld.model.errors import Failed, InvalidArgs, NoSuchUnit, QkilldError
from qkilld.model.exits import worst
from qkilld.model.policy import Config
from qkilld.model.text import printable
from qkilld.model.unit import UnitFacts
from qkilld.model.words import ExitCode

_SAMPLE: Final = "qkilld"
"""The instance that is looked at for a template, which systemd knows nothing of by itself."""
_SHOWN: Final = 1000


@dataclass(frozen=True, slots=True)
class Checked:
    facts: UnitFacts
    name: str
    """The primary one; of a template, its own and not that of an instance."""
    around: Surroundings
    findings: tuple[Finding, ...]
    overrides: tuple[Override, ...]
    """What stands over the lines that adopt writes for them."""

    @property
    def is_safe(self) -> bool:
        return not any(finding.is_unsafe for finding in self.findings)

    @property
    def exit_code(self) -> int:
        return ExitCode.OK if self.is_safe else ExitCode.UNSAFE

    def as_json(self) -> dict[str, Any]:
        return {
            "unit": self.name,
            "safe": self.is_safe,
            "findings": [
                {
                    "key": finding.key,
                    "severity": finding.severity.name.lower().replace("_", "-"),
                    "what": finding.what,
                    "why": finding.why,
                    "mends": [
                        {"section": line.section, "line": line.text, "by_hand": line.by_hand}
                        for line in finding.mends
                    ],
                }
                for finding in self.findings
            ],
            "overrides": [{"path": each.path, "keys": list(each.keys)} for each in self.overrides],
            "error": None,
            "exit_code": int(self.exit_code),
        }


async def check_units(session: Session, names: Sequence[str]) -> int:
    """Of each unit, or of every one that a QEMU runs in; the exit code is that of the worst."""
    systemd = Systemd(session.connection)
    config = await config_of(session)
    codes: list[int] = []
    documents: list[dict[str, Any]] = []
    if not names:
        names = await _with_guests(systemd, config.executables)
        if not names and not session.json:
            session.output.line("No unit that a QEMU runs in was found.")
    for name in names:
        try:
            checked = await check_unit(session, systemd, name, config)
        except QkilldError as error:
            documents.append(failed(session, name, error))
            codes.append(error.exit_code)
            continue
        documents.append(checked.as_json())
        codes.append(checked.exit_code)
        if not session.json:
            show(session, checked)
    if session.json:
        session.output.json(documents)
    elif ExitCode.UNSAFE in codes:
        session.output.line(
            f"`{session.bus.command} adopt UNIT` writes these lines into a drop-in."
        )
    return worst(codes)


async def check_unit(session: Session, systemd: Systemd, name: str, config: Config) -> Checked:
    """Raises NoSuchUnit, InvalidArgs, Failed for what is masked or cannot be read."""
    facts, name = await load(systemd, name)
    around = await gather(systemd, facts, config, user=session.bus.user)
    findings = check(facts, around)
    return Checked(facts, name, around, findings, tuple(overrides(facts, changes(findings))))


async def load(systemd: Systemd, name: str) -> tuple[UnitFacts, str]:
    """The unit of that name, and its primary one. Raises as check_unit."""
    full = full_name(name)
    prefix, at, rest = full.partition("@")
    is_template = bool(at) and rest.startswith(".")
    try:
        facts = await systemd.unit(f"{prefix}@{_SAMPLE}{rest}" if is_template else full)
    except NoSuchUnit:
        raise NoSuchUnit(f'systemd knows no unit "{printable(full)}"') from None
    if not facts.exists:
        shown = printable(full)
        hint = f": `systemctl unmask {shown}`" if facts.load_state == "masked" else ""
        state = facts.load_state.replace("-", " ")
        raise Failed(f"systemd cannot load {shown}, for it says: {state}{hint}")
    if is_template:
        prefix, _, rest = facts.id.partition("@")
        return facts, f"{prefix}@.{rest.rpartition('.')[2]}"
    return facts, facts.id


def full_name(name: str) -> str:
    """With its suffix. Raises InvalidArgs for a path."""
    if "/" in name or not name:
        raise InvalidArgs(f'"{printable(name)}" is not the name of a unit, such as web.service')
    return name if name.endswith(tuple(KINDS)) else f"{name}.service"


def failed(session: Session, name: str, error: QkilldError) -> dict[str, Any]:
    """Tells of it, and gives what --json has for it."""
    session.output.error(explain(error, session.bus))
    return {
        "unit": name,
        "error": error_as_json(error, session.bus),
        "exit_code": int(error.exit_code),
    }


def show(session: Session, checked: Checked) -> None:
    output = session.output
    worst_of = min((f.severity for f in checked.findings), key=list(Severity).index, default=None)
    verdict = "is safe" if checked.is_safe else str(worst_of)
    output.line(f"{printable(checked.name)}: {verdict}")
    for finding in checked.findings:
        what = finding.what
        if finding.severity is not worst_of or checked.is_safe:
            what = f"{finding.severity}: {what}"
        paragraphs = ((what, "  "), (f"{finding.why}.", "    "))
        for text, indent in paragraphs:
            for line in textwrap.wrap(printable(text[:1].upper() + text[1:], _SHOWN), 92):
                output.line(indent + line)
        for mend in finding.mends:
            note = "   (by hand)" if mend.by_hand else ""
            output.line(f"      {printable(str(mend), _SHOWN)}{note}")
    for each in checked.overrides:
        output.line(f"  {each}, which stands over what adopt writes: change it there")


async def _with_guests(systemd: Systemd, executables: Iterable[str]) -> list[str]:
    """Every service and scope that a QEMU runs in, those of other managers left out."""
    found = []
    for unit in await systemd.list_units(*(f"*{suffix}" for suffix in KINDS)):
        if unit.startswith("user@"):
            continue
        try:
            processes = await systemd.processes(unit)
        except QkilldError:
            continue  # gone meanwhile
        if any(is_qemu(executable(each.pid), executables) for each in processes):
            found.append(unit)
    return sorted(found)
