"""The manual pages describe exactly the options, commands and settings of the programs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld import __version__, daemon_arguments
from qkilld.adapters.config import _POLICY_KEYS
from qkilld.ctl import arguments as ctl_arguments
from qkilld.model.constants import ExitCode
from qkilld.model.exits import INTERRUPTED
from qkilld.monitor.endpoints import AGENT_PORT
from qkilld.stop import arguments as stop_arguments

MAN = Path(__file__).parents[2] / "packaging" / "man"
PROGRAMS = {
    "qkilld.8": daemon_arguments.build_parser,
    "qkilld-stop.8": stop_arguments.build_parser,
    "qkillctl.1": ctl_arguments.build_parser,
}


def page(name: str) -> str:
    return (MAN / name).read_text().replace("\\-", "-")


def section(text: str, title: str) -> str:
    found = re.search(rf"^\.SH {title}\n(.*?)(?=^\.SH |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def tags(text: str) -> Iterator[str]:
    """Yield the described items: the line after each .TP, without formatting."""
    for line in re.findall(r"^\.TP\n(.*)$", text, re.MULTILINE):
        yield re.sub(r'\\f.|[\\"]', "", re.sub(r"^\.[BI]+R? ", "", line))


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser, and the parsers of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {
        option
        for each in parsers(parser)
        for action in each._actions
        for option in action.option_strings
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_option_is_in_the_page_and_no_other(name: str) -> None:
    described = " ".join(tags(section(page(name), "OPTIONS")))
    in_page = set(re.findall(r"(?<![\w-])--?[A-Za-z][a-z-]*", described))
    assert in_page == options(PROGRAMS[name]())


def test_every_option_of_a_command_is_described_for_it() -> None:
    """An option of several commands, such as --dry-run, has a description for each of them."""
    text = section(page("qkillctl.1"), "OPTIONS")
    parts = re.split(r"^\.SS Options of (.*)$", text, flags=re.MULTILINE)[1:]
    described = {
        title: set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(tags(part))))
        for title, part in zip(parts[::2], parts[1::2], strict=True)
    }
    everywhere = described["all commands"]
    for parser in parsers(ctl_arguments.build_parser()):
        command = parser.prog.partition(" ")[2]
        own = {option for option in options(parser) if option.startswith("--")} - everywhere
        if not command or not own:
            continue
        (title,) = (title for title in described if command in re.split(r", | and ", title))
        assert own <= described[title], command


def test_every_command_is_described() -> None:
    (group,) = (
        action
        for action in ctl_arguments.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    described = {tag.split()[0] for tag in tags(section(page("qkillctl.1"), "COMMANDS"))}
    words = {"safe", "worse", "no-better", "unknown", "manual", "other-unit"}
    assert described - words == set(group.choices)


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("qkilld.8", {0, 1, 2}),
        ("qkilld-stop.8", set(ExitCode) - {ExitCode.UNSAFE}),
        ("qkillctl.1", {*ExitCode, INTERRUPTED}),
    ],
)
def test_every_exit_code_is_described(name: str, codes: set[int]) -> None:
    text = section(page(name), "EXIT STATUS")
    assert {int(tag) for tag in tags(text)} == set(map(int, codes))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_names_the_same_exit_codes(name: str) -> None:
    epilog = PROGRAMS[name]().epilog or ""
    codes = {int(tag) for tag in tags(section(page(name), "EXIT STATUS"))}
    listed = epilog.lower().partition("exit codes")[2].partition("worst code counts")[0]
    assert {int(code) for code in re.findall(r"(?:^  |[:,]\s)(\d+) ", listed, re.M)} == codes


def test_every_key_of_the_configuration_is_described() -> None:
    text = page("qkilld.conf.5")
    described = [*tags(section(text, r"\[POLICY\]")), *tags(section(text, r"\[TARGET\]"))]
    assert {f"{key}=" for key in (*_POLICY_KEYS, "Executables")} == set(described)


def test_every_kind_of_target_is_described() -> None:
    described = " ".join(tags(section(page("qkillctl.1"), "TARGETS")))
    for prefix in ("pid:", "name:", "uuid:", "pidfile:", "unit:", "job:"):
        assert prefix in described


def test_the_port_of_the_agent_is_named() -> None:
    assert AGENT_PORT in page("qemu-guest@.service.8")


@pytest.mark.parametrize("path", sorted(MAN.iterdir()), ids=lambda path: path.name)
def test_each_page_has_its_parts(path: Path) -> None:
    text = page(path.name)
    assert f'"qkilld {__version__}"' in text.splitlines()[1]
    titles = re.findall(r"^\.SH (.*)$", text, re.MULTILINE)
    assert titles[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    assert titles[-1] == "SEE ALSO"
    assert {"EXAMPLE", "EXAMPLES"} & set(titles)
