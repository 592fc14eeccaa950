"""The command check-unit: which settings of a unit lose data, and how to fix them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from qkilld.adapters import procfs
from qkilld.bus.systemd import KINDS, Systemd
from qkilld.ctl.process_stats import executable
from qkilld.ctl.session import Session, error_as_json, explain
from qkilld.ctl.unit_context import (
    config_of,
    gather,
    has_own_settings,
    instances_with_own,
    overrides,
)
from qkilld.ctl.unit_processes import others_are_hidden, unit_name_of
from qkilld.debug_log import ignore
from qkilld.model.constants import ExitCode
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import Failed, InvalidArgs, NoSuchUnit, QkilldError
from qkilld.model.exits import worst
from qkilld.model.policy import Config, is_qemu
from qkilld.model.text import printable
from qkilld.model.unit import UnitFacts, is_user_manager
from qkilld.unitcheck.check import check
from qkilld.unitcheck.comparison import Comparison, UnitVerdict, compare
from qkilld.unitcheck.context import Surroundings, looks_like_qemu
from qkilld.unitcheck.dropin import Override, changes
from qkilld.unitcheck.finding import Finding, Severity

_SAMPLE: Final = "qkilld"
"""The name of the instance that represents a template without running instances. (systemd does not
load templates.)"""
_OTHER_KINDS: Final = (
    *(".socket", ".target", ".device", ".mount", ".automount"),
    *(".swap", ".timer", ".path", ".slice"),
)
"""Units that cannot run a guest: systemd.unit(5)."""
_MAX_INSTANCES: Final = 64
_SHOWN: Final = 1000
_WIDTH: Final = 96


@dataclass(frozen=True, slots=True)
class UnitReport:
    facts: UnitFacts
    name: str
    """The unit's primary name; for a template, the name of the template."""
    surroundings: Surroundings
    findings: tuple[Finding, ...]
    overrides: tuple[Override, ...]
    """The drop-ins that override settings which adopt would write."""
    comparison: Comparison

    @property
    def is_safe(self) -> bool:
        """Whether qkilld recognises the unit's guest, and every stop of the unit keeps the guest's
        data."""
        unsafe = any(finding.is_unsafe for finding in self.findings)
        return (
            not unsafe and self.comparison.word is UnitVerdict.SAFE and self.comparison.keeps_data
        )

    @property
    def has_guest(self) -> bool:
        """Whether the unit runs, or would run, a QEMU that qkilld recognises."""
        return self.comparison.has_guest

    @property
    def exit_code(self) -> int:
        return ExitCode.OK if self.is_safe else ExitCode.UNSAFE

    def as_json(self) -> dict[str, Any]:
        return {
            "unit": self.name,
            "safe": self.is_safe,
            "adoptable": self.comparison.writes,
            **self.comparison.as_json(),
            "findings": [
                {
                    "key": finding.key,
                    "severity": finding.severity.name.lower().replace("_", "-"),
                    "problem": finding.problem,
                    "reason": finding.reason,
                    "fixes": [
                        {"section": line.section, "line": line.text, "by_hand": line.by_hand}
                        for line in finding.fixes
                    ],
                }
                for finding in self.findings
            ],
            "overrides": [{"path": each.path, "keys": list(each.keys)} for each in self.overrides],
            "error": None,
            "exit_code": int(self.exit_code),
        }


async def check_units(session: Session, names: Sequence[str]) -> int:
    """Check these units, or all units that run a QEMU; return the worst exit code."""
    systemd = Systemd(session.connection)
    config = await config_of(session)
    codes: list[int] = []
    documents: list[dict[str, Any]] = []
    if not names:
        names = _with_guests(config.executables, user=session.bus.user)
        # Only root can read the executables of other users' processes.
        if not session.bus.user and (os.geteuid() != 0 or others_are_hidden()):
            codes.append(ExitCode.UNSAFE)
            session.output.error(
                "you may not see the processes of other users, so units may be missing: run this"
                " as root"
            )
        if not names and not codes and not session.json:
            session.output.line("QEMU runs in no unit.")
    for name in names:
        try:
            report = await check_unit(session, systemd, name, config)
        except QkilldError as error:
            documents.append(error_report(session, name, error))
            codes.append(error.exit_code)
            continue
        documents.append(report.as_json())
        codes.append(report.exit_code)
        if not session.json:
            show(session, report)
    if session.json:
        session.output.json(documents)
    elif any(document.get("adoptable") for document in documents):
        session.output.line(f"`{session.command} adopt UNIT` writes these lines into a drop-in.")
    return worst(codes)


async def check_unit(session: Session, systemd: Systemd, name: str, config: Config) -> UnitReport:
    """Raises NoSuchUnit and InvalidArgs, and Failed if the unit is masked or cannot be read."""
    facts, name = await load(systemd, name)
    is_template = name != facts.id
    surroundings = await gather(
        systemd, facts, config, user=session.bus.user, is_template=is_template
    )
    if is_template and facts.id not in (running := await _running_instances(systemd, name)):
        surroundings = replace(surroundings, special_instances=tuple(running))
    findings = check(facts, surroundings)
    wanted = changes(findings)
    over = tuple(overrides(facts, wanted))
    instances: tuple[str, ...] = ()
    if is_template:
        instances = tuple(instances_with_own(await systemd.search_path(), name, wanted))
    comparison = compare(facts, surroundings, findings, over, instances)
    return UnitReport(facts, name, surroundings, findings, over, comparison)


async def load(systemd: Systemd, name: str) -> tuple[UnitFacts, str]:
    """Load a unit; return its settings and its primary name. Raises like check_unit."""
    full = full_name(name)
    prefix, at, rest = full.partition("@")
    is_template = bool(at) and rest.startswith(".")
    try:
        if is_template:
            facts = await _instance_of(systemd, prefix, rest)
            full = facts.id
        else:
            facts = await systemd.unit(full)
    except NoSuchUnit:
        raise NoSuchUnit(f'systemd knows no unit "{printable(full_name(name))}"') from None
    if not facts.exists:
        shown = printable(full)
        hint = f": `systemctl unmask {shown}`" if facts.load_state == "masked" else ""
        state = facts.load_state.replace("-", " ")
        raise Failed(f"systemd cannot load {shown}: {state}{hint}")
    if is_template:
        prefix, _, rest = facts.id.partition("@")
        return facts, f"{prefix}@.{rest.rpartition('.')[2]}"
    return facts, facts.id


async def _instance_of(systemd: Systemd, prefix: str, suffix: str) -> UnitFacts:
    """Load an instance that represents its template: a running instance without settings of its
    own, or else the instance _SAMPLE. Raises NoSuchUnit."""
    for name in await _running_instances(systemd, f"{prefix}@{suffix}"):
        with ignore(f"asking systemd for {name}", NoSuchUnit):
            facts = await systemd.unit(name)
            if not has_own_settings(facts):
                return facts
    return await systemd.unit(f"{prefix}@{_SAMPLE}{suffix}")


async def _running_instances(systemd: Systemd, template: str) -> list[str]:
    prefix, _, suffix = template.partition("@")
    return sorted(await systemd.list_units(f"{prefix}@*{suffix}"))[:_MAX_INSTANCES]


def full_name(name: str) -> str:
    """Return a unit's name with its suffix. Raises InvalidArgs for paths and units that cannot run
    a guest."""
    if "/" in name or not name:
        raise InvalidArgs(f'"{printable(name)}" is not the name of a unit, such as web.service')
    if name.endswith(_OTHER_KINDS):
        kind = name.rpartition(".")[2]
        raise InvalidArgs(
            f"{printable(name)} is a {kind} unit, which cannot run a guest: name a service or scope"
        )
    return name if name.endswith(tuple(KINDS)) else f"{name}.service"


def error_report(session: Session, name: str, error: QkilldError) -> dict[str, Any]:
    """Print the error; return its JSON form."""
    session.output.error(explain(error, session.bus))
    return {
        "unit": name,
        "error": error_as_json(error, session.bus),
        "exit_code": int(error.exit_code),
    }


def show(session: Session, report: UnitReport) -> None:
    output = session.output
    columns = output.columns(_WIDTH)
    worst_of = min((f.severity for f in report.findings), key=list(Severity).index, default=None)
    output.line(f"{printable(report.name)}: {_headline(report, worst_of)}")
    for text in _verdict_lines(report):
        for line in textwrap.wrap(printable(text, _SHOWN), columns - 2):
            output.line(f"  {line}")
    if not report.has_guest:
        return
    for finding in report.findings:
        what = finding.problem
        if finding.severity is not worst_of or report.is_safe:
            what = f"{finding.severity}: {what}"
        paragraphs = ((what, "  "), (f"{finding.reason}.", "    "))
        for text, indent in paragraphs:
            sentence = printable(_sentence(text), _SHOWN)
            for line in textwrap.wrap(sentence, columns - len(indent)):
                output.line(indent + line)
        for fix in finding.fixes:
            note = "   (by hand)" if fix.by_hand else ""
            output.line(f"      {printable(str(fix), _SHOWN)}{note}")
    for each in report.overrides:
        output.line(f"  {each}, which overrides what adopt writes: change that file")


def _headline(report: UnitReport, worst_of: Severity | None) -> str:
    if report.is_safe:
        return "is safe"
    if not report.has_guest:
        return _WITHOUT_GUEST[report.comparison.word]
    if worst_of is None or worst_of is Severity.ADVICE:
        return (
            "is not known to be safe" if report.comparison.word is UnitVerdict.UNKNOWN else "advice"
        )
    return str(worst_of)


_WITHOUT_GUEST: Final = {
    UnitVerdict.UNKNOWN: "has no known guest",
    UnitVerdict.MANUAL: "Executables= does not cover its guest",
    UnitVerdict.OTHER_UNIT: "its guest runs in another unit",
    UnitVerdict.WORSE: "manages its guests",
}


def _verdict_lines(report: UnitReport) -> Iterator[str]:
    """Unless the verdict is SAFE, yield its reason and the advice."""
    comparison = report.comparison
    if comparison.word is UnitVerdict.SAFE:
        return
    yield f"{_sentence(comparison.reason)}."
    if comparison.advice:
        yield f"{_sentence(comparison.advice)}."


def _sentence(text: str) -> str:
    """Capitalize the first letter, unless the text begins with "systemd"."""
    return text if text.startswith("systemd") else text[:1].upper() + text[1:]


def _with_guests(executables: Iterable[str], *, user: bool) -> list[str]:
    """List the services and scopes that run a QEMU, whether or not Executables= covers it. Leave
    out user@.service, because its processes belong to units of a user manager."""
    units = set()
    for pid in procfs.pids():
        path = executable(pid)
        if is_qemu(path, executables) or looks_like_qemu(path):
            units.add(unit_name_of(pid, user=user))
    return sorted(
        name for name in units if name.endswith(tuple(KINDS)) and not is_user_manager(name)
    )
