"""Completion of qkillctl in real shells, with guest names of every kind."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from qkilld.adapters import config
from qkilld.ctl.complete import main, plain_names, words
from qkilld.ctl.completion import PROGRAM, scripts
from qkilld.model.policy import Config
from tests.lab import needs
from tests.lab.guest import Guest
from tests.lab.process import run

HOSTILE = (
    "$(touch {mark})",
    "`touch {mark}`",
    "; touch {mark}",
    "a\\nb",
    "*",
    "-x",
    "\x1b[2J",
    "é",
)
PLAIN = ("web", "db-1.example")
COMPLETE = """\
#!/bin/sh
[ "$1" != units ] || {{ echo guest@web.service; echo other.service; exit; }}
[ "$1" = targets -o "$1" = jobs ] || exit 1
cat {words}
"""
ZSH = """\
compadd() {{ shift; print -rl -- "${{(@P)1}}"; }}
_describe() {{ print -rl -- "${{(@P)argv[-1]}}"; }}
_files() {{ print FILES; }}
words=("${{(@)argv}}") CURRENT=$#argv
set --
. {script}
"""
"""Replaces zsh's completion functions."""

Complete = Callable[[str], list[str]]


@pytest.fixture(params=["bash", "zsh", "fish"])
def complete(request: pytest.FixtureRequest, lab_dir: Path) -> Complete:
    """A function that returns the words that the shell offers at the end of a line. The completion
    script runs a program that offers every word."""
    shell: str = request.param
    needs.program(shell, shell)
    mark = lab_dir / "touched"
    (lab_dir / "words").write_text("".join(f"{each}\n" for each in _all_words(mark)))
    program = lab_dir / "complete"
    program.write_text(COMPLETE.format(words=lab_dir / "words"))
    program.chmod(0o755)
    script = lab_dir / "script"
    script.write_text(scripts()[shell].replace(PROGRAM, str(program)))

    def call(line: str) -> list[str]:
        where = shlex.quote(str(script))
        match shell:
            case "bash":
                code = (
                    f". {where}; COMP_LINE=$1 COMP_POINT=${{#1}}; _qkillctl;"
                    ' printf "%s\\n" "${COMPREPLY[@]}"'
                )
                command = ["bash", "--norc", "-c", code, "bash", line]
            case "zsh":
                split = [*line.split(), *([""] if line.endswith(" ") else [])]
                command = ["zsh", "-f", "-c", ZSH.format(script=where), "zsh", *split]
            case _:
                command = [
                    "fish",
                    "--no-config",
                    "-c",
                    f"source {where}; complete -C $argv[1]",
                    line,
                ]
        env = {"HOME": str(lab_dir), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        done = run(["env", "-C", lab_dir, *command], env=env)
        assert not mark.exists(), "a name was run"
        # fish and zsh show descriptions.
        cut = "\t" if shell == "fish" else ":"
        offered = done.stdout.splitlines()
        return offered if shell == "bash" else [each.partition(cut)[0] for each in offered]

    return call


def _all_words(mark: Path) -> list[str]:
    return [*PLAIN, *(each.format(mark=mark) for each in HOSTILE if "\n" not in each)]


def test_commands_and_options(complete: Complete) -> None:
    offered = [each for each in complete("qkillctl ch") if each.startswith("ch")]
    assert sorted(offered) == ["check-host", "check-unit"]
    assert "--storage-stall" in complete("qkillctl terminate --")
    assert "--undo" in complete("qkillctl --json adopt --u")
    assert "--undo" not in complete("qkillctl list --")


def test_arguments_by_their_kind(complete: Complete) -> None:
    assert set(PLAIN) <= set(complete("qkillctl terminate --wait "))
    assert "web" in complete("qkillctl terminate --grace 5s w")
    assert "web" in complete("qkillctl extend 5min ")
    assert "other.service" in complete("qkillctl adopt --dry-run o")


def test_hostile_names_are_never_run(complete: Complete) -> None:
    complete("qkillctl terminate ")
    complete("qkillctl terminate $")
    complete("qkillctl cancel `")


def test_bash_replaces_what_it_has_split(
    complete: Complete, request: pytest.FixtureRequest
) -> None:
    offered = complete("qkillctl adopt guest@w")
    bash = "[bash]" in request.node.name
    assert ("web.service" if bash else "guest@web.service") in offered


def test_only_plain_names_are_offered() -> None:
    assert list(plain_names((*PLAIN, *HOSTILE, "4711", "db.service", "", "x" * 200))) == [*PLAIN]


def test_guests_with_other_names_are_offered_by_their_process(
    qemu: Callable[..., Guest],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, other = qemu(name="plain-1"), qemu(name="$(touch x)")
    covered = Config(executables=(str(Path(f"/proc/{plain.pid}/exe").readlink()),))
    monkeypatch.setattr(config, "load", lambda: covered)
    monkeypatch.setattr("sys.argv", ["complete", "targets"])
    assert main() == 0
    offered = capsys.readouterr().out.splitlines()
    assert {"plain-1", str(other.pid)} <= set(offered)
    assert str(plain.pid) not in offered


def test_units_and_containers(lab_dir: Path) -> None:
    units, machines = lab_dir / "etc/systemd/system", lab_dir / "run/systemd/machines"
    for directory, names in (
        (units, ("web.service", "a b.service", "x\\x2dy.service", "guest@.service", "x.timer")),
        (machines, ("box", "unit:box", "$(id)")),
    ):
        directory.mkdir(parents=True)
        for name in names:
            (directory / name).touch()
    offered = set(words("units", lab_dir))
    assert {"web.service", "guest@.service"} <= offered
    assert not any(set(each) & set(" \\$") for each in offered) and "x.timer" not in offered
    assert list(words("machines", lab_dir)) == ["box"]
    assert list(words("anything", lab_dir)) == []
