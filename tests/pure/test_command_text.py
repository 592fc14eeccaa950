"""Commands in unit files are split as systemd splits them, and are compared with systemd's
report."""

from __future__ import annotations

import pytest

from qkilld.model.unit import Command
from qkilld.unitcheck.command_text import (
    helper_arguments_of,
    ignoring_failure,
    matching_texts,
    split_commands,
)


def command(*words: str, ignores: bool = False, flags: tuple[str, ...] = ()) -> Command:
    return Command(words[0], words, ignores, flags)


@pytest.mark.parametrize(
    ("value", "commands"),
    [
        ("/bin/a", ["/bin/a"]),
        ("/bin/a %i ; -/bin/b %i", ["/bin/a %i", "-/bin/b %i"]),
        ("/bin/a ;", ["/bin/a"]),
        ("/bin/a;", ["/bin/a;"]),
        ("/bin/a \\; b", ["/bin/a \\; b"]),
        ("/bin/a ';' b", ["/bin/a ';' b"]),
        ("/bin/sh -c 'a ; b' ;\t/bin/c", ["/bin/sh -c 'a ; b'", "/bin/c"]),
        ('/bin/a "x\\"y" ; /bin/b', ['/bin/a "x\\"y"', "/bin/b"]),
    ],
)
def test_a_semicolon_ends_a_command(value: str, commands: list[str]) -> None:
    assert split_commands(value) == commands


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("/usr/bin/qkilld-stop --unit %n", "--unit %n"),
        ("-+/usr/bin/qkilld-stop", ""),
        ("@/usr/bin/qkilld-stop stop --force", "--force"),
        ("/bin/sh -c 'exec qkilld-stop --unit %n'", "--unit %n"),
        ('-@/bin/sh sh -c "exec /usr/bin/qkilld-stop --pid $$MAINPID"', "--pid $MAINPID"),
        ("/bin/sh -c 'exec qkilld-stop'", ""),
    ],
)
def test_the_arguments_of_the_helper(text: str, arguments: str) -> None:
    assert helper_arguments_of(text) == arguments


@pytest.mark.parametrize("value", ["/bin/a 'x", '/bin/a "x', "/bin/a \\", "/bin/a '\\'"])
def test_what_systemd_cannot_parse_is_refused(value: str) -> None:
    with pytest.raises(ValueError):
        split_commands(value)


@pytest.mark.parametrize(
    ("values", "commands"),
    [
        (["/bin/a %i ; /bin/b"], [command("/bin/a", "web"), command("/bin/b")]),
        (["/bin/a%%%i-%n"], [command("/bin/a%web-kvm@web.service")]),
        (["/opt//bin/./a"], [command("/opt/bin/a")]),
        (["kill $MAINPID"], [command("/usr/bin/kill", "$MAINPID")]),
        (["/bin/a 'b c' \"d\\x20e\" f\\sg \\q \\;"],
         [command("/bin/a", "b c", "d e", "f g", "\\q", ";")]),
        (["/bin/a \\xc3\\xbc \\u00fc \\101"], [command("/bin/a", "ü", "ü", "A")]),
        (["-+/bin/a"], [command("/bin/a", ignores=True, flags=("privileged",))]),
        (["!!/bin/a"], [command("/bin/a", flags=("ambient",))]),
        (["-:@/bin/sh sh x"], [Command("/bin/sh", ("sh", "x"), True, ("no-env-expand",))]),
    ],
)  # fmt: skip
def test_a_text_that_systemd_has_parsed(values: list[str], commands: list[Command]) -> None:
    found = matching_texts(values, commands)
    assert len(found) == len(commands)
    assert all(text in value for text in found for value in values)


@pytest.mark.parametrize(
    ("values", "commands"),
    [
        # One line may have two commands, or systemd may ignore a line. The number of commands
        # cannot tell these cases apart, so the texts are compared.
        (["/bin/a ; /bin/b", "-nonsense/"], [command("/bin/a"), command("/bin/b")]),
        (["-nonsense/", "/bin/b"], [command("/bin/b"), command("/bin/c")]),
        (["/bin/a %i"], [command("/bin/a", "web"), command("/bin/b")]),
        # systemd has not reloaded the file.
        (["/bin/a old"], [command("/bin/a", "new")]),
        (["/bin/a x%i"], [command("/bin/a", "yweb")]),
        (["/bin/a %ix%i"], [command("/bin/a", "web")]),
        (["/bin/a %i"], [command("/bin/a", "web", "1")]),
        (["-/bin/a"], [command("/bin/a")]),
        (["+/bin/a"], [command("/bin/a")]),
        (["|/bin/a"], [command("/bin/a")]),
        (["/bin/a 'b"], [command("/bin/a", "b")]),
        ([], [command("/bin/a")]),
    ],
)
def test_a_text_that_is_not_what_systemd_has(values: list[str], commands: list[Command]) -> None:
    assert matching_texts(values, commands) == ()


def test_a_failure_is_ignored_once() -> None:
    assert ignoring_failure("+/bin/a %i") == "-+/bin/a %i"
    for text in ("-/bin/a", "+-/bin/a", '"-/bin/a" b'):
        assert ignoring_failure(text) == text
