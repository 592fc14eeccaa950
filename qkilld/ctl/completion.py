"""Completion scripts of qkillctl for bash, zsh and fish, generated from its parser at installation.

shtab cannot replace this module: version 1.5.5 of Debian 12 supports neither fish nor hyphens in
zsh commands. The scripts only run `complete`, which prints plain words (qkilld.ctl.complete).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Final

from qkilld.ctl.arguments import build_parser
from qkilld.ctl.complete import JOBS, MACHINES, TARGETS, UNITS
from qkilld.model.dataclass import dataclass

PROGRAM: Final = "/usr/lib/qkilld/complete"
FILES, NOTHING = "files", "none"
_KINDS: Final = {
    "TARGET": TARGETS,
    "TARGET|JOB": JOBS,
    "GUEST|UNIT": TARGETS,
    "UNIT": UNITS,
    "CONTAINER": MACHINES,
    **dict.fromkeys(("FILE", "FILE|JOB", "PATH", "SVG"), FILES),
}
"""The kind of words for each placeholder in the help. Other placeholders are not completed."""


@dataclass(frozen=True, slots=True)
class OfferedOption:
    flags: tuple[str, ...]
    help: str
    value: str = ""
    """The kind of the option's value; "" if it takes none."""


@dataclass(frozen=True, slots=True)
class OfferedCommand:
    name: str
    help: str
    options: tuple[OfferedOption, ...]
    arguments: tuple[str, ...]
    """The kind of each argument; the last one may be repeated."""


def scripts() -> dict[str, str]:
    options, commands = _read(build_parser())
    return {
        "bash": _bash(options, commands),
        "zsh": _zsh(options, commands),
        "fish": _fish(options, commands),
    }


# ---- the parser ----


def _read(
    parser: argparse.ArgumentParser,
) -> tuple[tuple[OfferedOption, ...], list[OfferedCommand]]:
    (group,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    helps = {each.dest: each.help or "" for each in group._choices_actions}
    commands = [
        OfferedCommand(
            name,
            helps[name],
            _options(command),
            tuple(
                _KINDS.get(str(each.metavar), NOTHING)
                for each in command._actions
                if not each.option_strings
            ),
        )
        for name, command in group.choices.items()
    ]
    return _options(parser), commands


def _options(parser: argparse.ArgumentParser) -> tuple[OfferedOption, ...]:
    return tuple(
        OfferedOption(
            tuple(action.option_strings),
            (action.help or "").replace("%%", "%").replace("%(prog)s", parser.prog),
            "" if action.nargs == 0 else _KINDS.get(str(action.metavar), NOTHING),
        )
        for action in parser._actions
        if action.option_strings and action.help != argparse.SUPPRESS
    )


def _values(options: Iterable[OfferedOption], commands: Iterable[OfferedCommand]) -> dict[str, str]:
    """Return the kind of value of each option that takes a value. An option takes the same kind of
    value in all commands."""
    kinds: dict[str, str] = {}
    bare: set[str] = set()
    for each in (*options, *(option for command in commands for option in command.options)):
        for flag in each.flags:
            if not each.value:
                bare.add(flag)
            elif kinds.setdefault(flag, each.value) != each.value:
                raise ValueError(f"{flag} takes values of two kinds")
    if twofold := bare & kinds.keys():
        raise ValueError(f"{twofold} take a value only after some commands")
    return kinds


def _by_kind(values: dict[str, str]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    for flag, kind in values.items():
        options.setdefault(kind, []).append(flag)
    return options


# ---- bash ----

_BASH: Final = """\
# Completion of qkillctl for bash, made from its options.
_qkillctl() {{
    local line=${{COMP_LINE:0:COMP_POINT}} cur='' command='' kind='' skip='' n=0 word breaks
    local -a words choices=()
    COMPREPLY=()
    read -ra words <<<"$line"
    if [[ $line != *[[:space:]] ]]; then
        cur=${{words[${{#words[@]}} - 1]}}
        unset "words[${{#words[@]}} - 1]"
    fi
    for word in "${{words[@]:1}}"; do
        if [[ $skip ]]; then
            skip=
            continue
        fi
        case $word in
{skips}
        -*) ;;
        *) if [[ $command ]]; then n=$((n + 1)); else command=$word; fi ;;
        esac
    done
    if [[ $skip ]]; then
        kind=$skip
    elif [[ $cur == -* ]]; then
        case $command in
{options}
        esac
    elif [[ ! $command ]]; then
        choices=({commands})
    else
        case $command:$n in
{kinds}
        esac
    fi
    case $kind in
    {files})
        compopt -o default 2>/dev/null
        return
        ;;
    {dynamic}) mapfile -t choices < <({program} "$kind" 2>/dev/null) ;;
    esac
    # Not compgen -W, which expands its words.
    for word in "${{choices[@]}}"; do
        [[ $word == "$cur"* ]] && COMPREPLY+=("$word")
    done
    # readline replaces only the text after the last character at which it splits words.
    breaks=${{COMP_WORDBREAKS//[^@:=]/}}
    if [[ $breaks && $cur == *[$breaks]* ]]; then
        word=${{cur%"${{cur##*[$breaks]}}"}}
        COMPREPLY=("${{COMPREPLY[@]#"$word"}}")
    fi
}}
complete -F _qkillctl qkillctl
"""


def _bash(options: tuple[OfferedOption, ...], commands: list[OfferedCommand]) -> str:
    dynamic = " | ".join((TARGETS, JOBS, UNITS, MACHINES))
    return _BASH.format(
        skips=_skips(options, commands),
        options="\n".join(
            f"        {name}) choices=({' '.join(_flags(each))}) ;;"
            for name, each in [
                *((command.name, command.options) for command in commands),
                ('""', options),
            ]
        ),
        commands=" ".join(command.name for command in commands),
        kinds=_kinds(commands),
        files=FILES,
        dynamic=dynamic,
        program=PROGRAM,
    )


def _skips(options: tuple[OfferedOption, ...], commands: list[OfferedCommand]) -> str:
    return "\n".join(
        f"        {' | '.join(flags)}) skip={kind} ;;"
        for kind, flags in _by_kind(_values(options, commands)).items()
    )


def _kinds(commands: list[OfferedCommand]) -> str:
    lines = []
    for command in commands:
        for place, kind in enumerate(command.arguments):
            number = "*" if place == len(command.arguments) - 1 else str(place)
            lines.append(f"        {command.name}:{number}) kind={kind} ;;")
    return "\n".join(lines)


def _flags(options: Iterable[OfferedOption]) -> list[str]:
    return [flag for option in options for flag in option.flags]


# ---- zsh ----

_ZSH: Final = """\
#compdef qkillctl
# Completion of qkillctl for zsh, made from its options.
_qkillctl() {{
    local command= kind= skip= word
    local -i n=0
    local -a choices
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        if [[ -n $skip ]]; then
            skip=
            continue
        fi
        case $word in
{skips}
        -*) ;;
        *) if [[ -n $command ]]; then n+=1; else command=$word; fi ;;
        esac
    done
    if [[ -n $skip ]]; then
        kind=$skip
    elif [[ $words[CURRENT] == -* ]]; then
        case $command in
{options}
        esac
        _describe -o option choices
        return
    elif [[ -z $command ]]; then
        choices=(
{commands}
        )
        _describe command choices
        return
    else
        case $command:$n in
{kinds}
        esac
    fi
    case $kind in
    {files}) _files ;;
    {dynamic})
        choices=(${{(f)"$({program} $kind 2>/dev/null)"}})
        (( $#choices )) && compadd -a choices
        ;;
    esac
}}
_qkillctl "$@"
"""


def _zsh(options: tuple[OfferedOption, ...], commands: list[OfferedCommand]) -> str:
    cases = []
    for name, each in [*((c.name, c.options) for c in commands), ('""', options)]:
        described = "\n".join(
            f"            {_zsh_word(flag, option.help)}"
            for option in each
            for flag in option.flags
        )
        cases.append(f"        {name}) choices=(\n{described}\n        ) ;;")
    return _ZSH.format(
        skips=_skips(options, commands),
        options="\n".join(cases),
        commands="\n".join(f"            {_zsh_word(c.name, c.help)}" for c in commands),
        kinds=_kinds(commands),
        files=FILES,
        dynamic=" | ".join((TARGETS, JOBS, UNITS, MACHINES)),
        program=PROGRAM,
    )


def _zsh_word(word: str, description: str) -> str:
    """Format as `word:description` for zsh's _describe, with the colons in each part escaped."""
    text = ":".join(each.replace("\\", r"\\").replace(":", r"\:") for each in (word, description))
    return "'" + text.replace("'", "'\\''") + "'"


# ---- fish ----


def _fish(options: tuple[OfferedOption, ...], commands: list[OfferedCommand]) -> str:
    lines = [
        "# Completion of qkillctl for fish, made from its options.",
        "complete -c qkillctl -f",
        *(
            f"complete -c qkillctl -n __fish_use_subcommand -a {each.name} -d {_quoted(each.help)}"
            for each in commands
        ),
        *(f"complete -c qkillctl {_fish_option(option)}" for option in options),
    ]
    common = {option.flags for option in options}
    for command in commands:
        after = f"complete -c qkillctl -n '__fish_seen_subcommand_from {command.name}'"
        lines += [
            f"{after} {_fish_option(option)}"
            for option in command.options
            if option.flags not in common
        ]
        lines += [
            f"{after} {_fish_value(kind)}"
            for kind in dict.fromkeys(command.arguments)
            if kind != NOTHING
        ]
    return "".join(f"{line}\n" for line in lines)


def _fish_option(option: OfferedOption) -> str:
    words = []
    for flag in option.flags:
        name = flag.lstrip("-")
        words.append(f"-l {name}" if flag.startswith("--") else f"-s {name}")
    if option.value:
        words.append("-r" if option.value == FILES else "-x")
        if option.value != NOTHING:
            words.append(_fish_value(option.value))
    return " ".join([*words, f"-d {_quoted(option.help)}"])


def _fish_value(kind: str) -> str:
    return "-F" if kind == FILES else f"-a '({PROGRAM} {kind} 2>/dev/null)'"


def _quoted(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
