"""Determine what each ExecStop= line does to the guest. Lines are parsed as systemd and the shell
parse them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Final

from qkilld.model import timespan
from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass
from qkilld.model.unit import Command
from qkilld.unitcheck.command import SHELLS, is_helper
from qkilld.unitcheck.programs import acts_of_program, acts_of_text
from qkilld.unitcheck.shell import (
    Branch,
    CommandGroup,
    Loop,
    Node,
    Pipeline,
    SimpleCommand,
    read_shell,
    substitutions,
)
from qkilld.unitcheck.stop_act import Act, ActKind, act

_WRAPPERS: Final[Mapping[str, tuple[str, ...]]] = {
    "env": ("-u", "-C"),
    "sudo": ("-u", "-g", "-p", "-C", "-h"),
    "doas": ("-u", "-C"),
    "nice": ("-n",),
    "ionice": ("-c", "-n"),
    "nohup": (),
    "setsid": (),
    "exec": ("-a",),
    "command": (),
    "builtin": (),
    "stdbuf": ("-i", "-o", "-e"),
    "taskset": (),
    "chrt": (),
    "busybox": (),
    "runuser": ("-u", "-g", "-G"),
    "nsenter": ("-t", "--target", "-S", "-G"),
    "chroot": (),
    "flock": ("-w", "-E"),
    "xargs": ("-n", "-I", "-L", "-P", "-d", "-a", "-s"),
    "systemd-inhibit": (),
    "setpriv": (),
    "unbuffer": (),
}
"""Programs that run another program, with their options that take a value."""
_USES_UP: Final = {"taskset": 1, "chrt": 1, "chroot": 1, "flock": 1}
"""The number of arguments between the options and the program to run."""
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*\+?=")
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_]\w*)\}")
_ALIVE: Final = re.compile(
    r"\bkill\s+(?:-0|-s\s*0|-n\s*0)\b|(?:\[|\btest)\s+(?:!\s+)?-[defS]\s|\bpgrep\b|\bpidof\b|\bps\b"
    r"|\bis-active\b|\bdomstate\b|\bvirsh\b.*\blist\b|\bqm\s+status\b|\bMAINPID\b"
)
"""A condition that tests whether the guest still runs."""
_TESTS_ABSENCE: Final = re.compile(r"(?:\[|\btest)\s+!\s")
_KILLING_FILES: Final = frozenset(["cgroup.kill", "sysrq-trigger"])
"""Files that kill processes when something is written to them."""
_MAX_DEPTH: Final = 8
_UNKNOWN: Final = act(ActKind.UNKNOWN)


@dataclass(frozen=True, slots=True)
class StopLine:
    acts: tuple[Act, ...]
    ignores_failure: bool = False
    shown: str = ""
    """The program of the line, for display."""
    changes: bool = False
    """The line changes something besides the guest, such as a file. Such a line may have to run
    after the guest has exited."""

    def has(self, *kinds: ActKind) -> bool:
        return any(each.kind in kinds for each in self.acts)

    @property
    def is_understood(self) -> bool:
        return not self.has(ActKind.UNKNOWN)

    @property
    def is_by_name(self) -> bool:
        return any(each.by_name for each in self.acts)

    @property
    def reads(self) -> bool:
        return any(each.reads for each in self.acts)


def read_line(command: Command, environment: Mapping[str, str] | None = None) -> StopLine:
    """Parse an ExecStop= line. `environment`: the known variables that systemd sets for it."""
    program = PurePosixPath(command.path).name
    if is_helper(command):
        return StopLine(act(ActKind.HELPER), command.ignores_failure, program)
    words = list(command.arguments) or [command.path]
    words[0] = command.path
    if "no-env-expand" not in command.flags:
        words = _expanded(words, environment or {})
    acts = _acts_of_words(words, "", 0)
    changes = any(each.changes for each in acts)
    return StopLine(_tidied(acts), command.ignores_failure, program, changes)


def _expanded(words: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """Expand variables as systemd does: systemd.service(5), "Command lines"."""
    expanded: list[str] = []
    for word in words:
        name = word[1:]
        if word.startswith("$") and name in environment:
            expanded += environment[name].split()
            continue
        expanded.append(_VARIABLE.sub(lambda match: environment.get(match[1], match[0]), word))
    return expanded


def _acts_of_words(words: Sequence[str], text: str, depth: int) -> tuple[Act, ...]:
    """Classify a simple command. `text` is what it gets on standard input; "<" stands for a file
    with unknown content. `depth` counts nested shells."""
    words = list(words)
    while words and _ASSIGNMENT.match(words[0]):
        words.pop(0)
    if not words:
        return act(ActKind.NOTHING)
    name, arguments = PurePosixPath(words[0]).name, words[1:]
    if _kills_by_file(arguments):
        return act(ActKind.KILLS)
    if depth > _MAX_DEPTH or "$" in words[0]:
        return _UNKNOWN
    deeper = depth + 1
    if name == "qkilld-stop" or "qkilld.stop" in arguments:
        return act(ActKind.HELPER)
    if name in SHELLS:
        return _acts_of_shell(arguments, deeper)
    if name == "su":
        place = next((n for n, word in enumerate(arguments) if word in ("-c", "--command")), None)
        return (
            _UNKNOWN
            if place is None
            else _acts_of_text(" ".join(arguments[place + 1 :][:1]), deeper)
        )
    if name == "timeout":
        return _bounded(
            _after_options(arguments, ("-k", "-s", "--signal", "--kill-after")), deeper, text
        )
    if name == "env" and any(re.match(r"-[a-zA-Z]*S|--split", word) for word in arguments):
        return _UNKNOWN  # A whole command line in one word.
    if name in _WRAPPERS:
        arguments = _after_options(arguments, _WRAPPERS[name])[_USES_UP.get(name, 0) :]
        return _acts_of_words(arguments, text, deeper) if arguments else act(ActKind.NOTHING)
    if name == "eval":
        return _acts_of_text(" ".join(arguments), deeper)
    if name == "trap":
        return _acts_of_text("".join(arguments[:1]), deeper)
    if name == "ip" and "exec" in arguments:  # ip netns exec NAME PROGRAM …
        return _acts_of_words(arguments[arguments.index("exec") + 2 :], text, deeper)
    if name == "socat":
        return _acts_of_socat(arguments, text, deeper)
    inner = [
        each for word in arguments for part in substitutions(word) for each in _inner(part, deeper)
    ]
    acts = acts_of_program(name, arguments, text)
    return (*inner, *(_UNKNOWN if acts is None else acts))


def _kills_by_file(paths: Iterable[str]) -> bool:
    return any(PurePosixPath(path).name in _KILLING_FILES for path in paths)


def _acts_of_socat(addresses: Sequence[str], text: str, depth: int) -> tuple[Act, ...]:
    """Classify socat, which connects two addresses. Each is a monitor, socat's standard input, a
    file, or a program that socat runs. Source: socat(1)."""
    inner: list[Act] = []
    for address in addresses:
        kind, _, rest = address.partition(":")
        match kind.upper():
            case "EXEC" | "SYSTEM" | "SHELL":
                # Options follow a comma, so the command ends at the first comma.
                try:
                    nodes = read_shell(rest.partition(",")[0])
                    inner += _acts_of_nodes(nodes, depth)
                except ValueError:
                    return _UNKNOWN
                text += " ".join(_output_of(node) for node in nodes)
            case "OPEN" | "FILE" | "GOPEN" | "PIPE" if not rest.startswith("/dev/null"):
                text += "$"  # Unknown text.
    inner = [each for each in inner if each.kind is not ActKind.NOTHING]
    sent = acts_of_program("socat", addresses, text) or _UNKNOWN
    return (*inner, *sent) if not inner or sent != _UNKNOWN else tuple(inner)


def _acts_of_shell(words: Sequence[str], depth: int) -> tuple[Act, ...]:
    for number, word in enumerate(words):
        if re.fullmatch(r"-[a-z]*c", word):
            return _acts_of_text(words[number + 1], depth) if number + 1 < len(words) else _UNKNOWN
    return _UNKNOWN  # A script.


def _acts_of_text(text: str, depth: int) -> tuple[Act, ...]:
    try:
        return _acts_of_nodes(read_shell(text), depth)
    except ValueError:
        return _UNKNOWN


def _inner(text: str, depth: int) -> list[Act]:
    """Return the acts of a substitution that affect or may affect the guest."""
    return [each for each in _acts_of_text(text, depth) if each.kind is not ActKind.NOTHING]


def _bounded(words: Sequence[str], depth: int, text: str) -> tuple[Act, ...]:
    """Classify `timeout TIME PROGRAM …`."""
    if len(words) < 2:
        return _UNKNOWN
    try:
        limit = timespan.parse(words[0])
    except ValueError:
        return _UNKNOWN
    return tuple(
        replace(each, usec=min(each.usec, limit))
        if each.kind in (ActKind.WAITS, ActKind.SLEEPS)
        else each
        for each in _acts_of_words(words[1:], text, depth)
    )


def _after_options(words: Sequence[str], with_value: Sequence[str]) -> list[str]:
    rest = list(words)
    while rest and (rest[0].startswith("-") or _ASSIGNMENT.match(rest[0])):
        option = rest.pop(0)
        if option == "--":
            break
        if option in with_value and rest:
            rest.pop(0)
    return rest


# ---- shell ----


def _acts_of_nodes(nodes: Iterable[Node], depth: int) -> tuple[Act, ...]:
    acts_so_far: list[Act] = []
    before: Node | None = None
    for node in nodes:
        acts = _acts_of_node(node, depth)
        if isinstance(node, Pipeline) and node.joined_by == "||":
            kills = before is not None and _is_negated(before)
            acts = tuple(
                each if kills and each.kind is ActKind.KILLS else replace(each, if_failed=True)
                for each in acts
            )
        acts_so_far += acts
        before = node
    return tuple(acts_so_far)


def _is_negated(node: Node) -> bool:
    """Return whether a command is expected to fail while the guest exists.

    It is if it tests that something, usually the guest, does not exist. A `!` before the command
    reverses the result.
    """
    negated = isinstance(node, Pipeline) and node.negated
    return negated != bool(_TESTS_ABSENCE.search(_text_of(node)))


def _acts_of_node(node: Node, depth: int, text: str = "") -> tuple[Act, ...]:
    match node:
        case SimpleCommand():
            acts = _acts_of_simple_command(node, depth, text)
            if not node.output or node.output.startswith("/dev/"):
                return acts
            return tuple(
                replace(each, changes=True) if each.kind is ActKind.NOTHING else each
                for each in acts
            )
        case Pipeline():
            return _acts_of_pipeline(node, depth)
        case CommandGroup():
            return _acts_of_nodes(node.body, depth)
        case Branch():
            first, *alternatives = [_acts_of_nodes(body, depth) for body in node.bodies]
            harmless = all(each.kind is ActKind.NOTHING for acts in alternatives for each in acts)
            condition = _acts_of_nodes(node.condition, depth)
            if harmless:
                return (*condition, *first)
            kills = any(each.kind is ActKind.KILLS for acts in alternatives for each in acts)
            return (*condition, *first, *(act(ActKind.KILLS) if kills else _UNKNOWN))
        case Loop():
            return _acts_of_loop(node, depth)


def _acts_of_simple_command(node: SimpleCommand, depth: int, text: str) -> tuple[Act, ...]:
    stdin_text = f"{text} {node.text}" if node.text else text
    if node.output and _kills_by_file([node.output]):
        return act(ActKind.KILLS)
    if node.output and PurePosixPath((*node.words, "")[0]).name in ("echo", "printf"):
        written_acts = acts_of_text(" ".join(node.words[1:]))
        is_known = written_acts[0].kind is not ActKind.UNKNOWN
        return written_acts if is_known else act(ActKind.NOTHING)
    return _acts_of_words(node.words, stdin_text or "<" * node.redirected, depth)


def _acts_of_pipeline(node: Pipeline, depth: int) -> tuple[Act, ...]:
    *sources, last = node.parts
    text = " ".join(_output_of(part) for part in sources)
    acts = [each for part in sources for each in _acts_of_node(part, depth)]
    # The source of a pipe may return at once because it reads /dev/null, while the last command
    # of the pipe still runs.
    acts = [replace(each, reads=False) for each in acts]
    combined = (*_acts_of_node(last, depth, text or "|" * bool(sources)), *acts)
    if node.background:
        waits = (ActKind.WAITS, ActKind.SLEEPS)
        return tuple(each for each in combined if each.kind not in waits)
    return combined


def _output_of(node: Node) -> str:
    """Return the text that a command writes; "$" if unknown."""
    match node:
        case SimpleCommand(words=(program, *words)):
            name = PurePosixPath(program).name
            if name in ("echo", "printf"):
                return " ".join(words)
            return "" if name in ("sleep", "cat", "read", "true") else "$"
        case Pipeline():
            return " ".join(_output_of(part) for part in node.parts)
        case CommandGroup():
            return " ".join(_output_of(part) for part in node.body)
    return "$"


def _acts_of_loop(node: Loop, depth: int) -> tuple[Act, ...]:
    condition = _acts_of_nodes(node.condition, depth)
    body = _acts_of_nodes(node.body, depth)
    all_of_it = (*condition, *body)
    if any(each.kind is ActKind.UNKNOWN for each in all_of_it):
        return _UNKNOWN
    other_acts = tuple(
        each for each in all_of_it if each.kind not in (ActKind.SLEEPS, ActKind.WAITS)
    )
    pause = sum(each.usec for each in all_of_it if each.kind is ActKind.SLEEPS)
    if node.kind == "for":
        count = _count_of(node.words)
        limit = INFINITY if count is None else min(count * pause, INFINITY)
        return (*other_acts, Act(ActKind.WAITS, limit)) if pause else other_acts
    text = " ".join(_text_of(part) for part in node.condition)
    if _ALIVE.search(text) or pause:
        return (*other_acts, *act(ActKind.WAITS))
    if any(each.reads for each in condition):
        return other_acts
    return _UNKNOWN


def _text_of(node: Node) -> str:
    match node:
        case SimpleCommand():
            return " ".join(node.words)
        case Pipeline():
            return " | ".join(_text_of(part) for part in node.parts)
        case CommandGroup():
            return "; ".join(_text_of(part) for part in node.body)
    return ""


def _count_of(words: Sequence[str]) -> int | None:
    """Return how often `for` runs its body; None if unknown."""
    if len(words) == 1 and (match := re.fullmatch(r"[$`(]+seq (?:1 )?(\d{1,6})[)`]+", words[0])):
        return int(match[1])
    if len(words) == 1 and (match := re.fullmatch(r"\{1\.\.(\d{1,6})\}", words[0])):
        return int(match[1])
    return None if any(mark in word for word in words for mark in "$`*") else len(words)


def _tidied(acts: Iterable[Act]) -> tuple[Act, ...]:
    """Drop acts that do nothing, unless there are no others."""
    acts = tuple(acts)
    effective = [each for each in acts if each.kind is not ActKind.NOTHING]
    return tuple(effective) or acts[:1] or act(ActKind.NOTHING)
