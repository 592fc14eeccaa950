"""Classify what the programs in stop lines do to a guest.

Sources: each program's manual page. For the signals on which QEMU exits: QEMU, os-posix.c,
os_setup_signal_handling(); for the default actions of other signals: signal(7).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from qkilld.model import timespan
from qkilld.unitcheck.stop_act import Act, ActKind, act

POLITE: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""On these signals, QEMU writes out its data and exits."""
IGNORED: Final = frozenset(
    {signal.SIGCONT, signal.SIGWINCH, signal.SIGURG, signal.SIGCHLD, signal.SIGPIPE}
)
"""QEMU ignores these signals."""

_NOTHING: Final = act(ActKind.NOTHING)
_CHANGES: Final = (Act(ActKind.NOTHING, changes=True),)
_UNKNOWN: Final = act(ActKind.UNKNOWN)
_ASKS: Final = act(ActKind.ASKS)
_ASKS_AND_WAITS: Final = (*act(ActKind.ASKS), *act(ActKind.WAITS))
_KILLS: Final = act(ActKind.KILLS)
_TERMINATES: Final = act(ActKind.TERMINATES)

_POWERDOWN: Final = re.compile(
    r"system_powerdown|guest-shutdown|\bshutdown\b|\bpoweroff\b|\bhalt\b|sendkey ctrl-alt-delete"
)
_SAVES: Final = re.compile(
    r"\b(?:savevm|snapshot|migrate|commit|backup|mirror|dump|snapshot_blkdev|migrate_incoming"
    r"|block-commit|blockdev-backup|drive-backup|drive-mirror|blockdev-mirror|snapshot-save"
    r"|blockdev-snapshot|dump-guest-memory)\b"
)
"""Monitor commands that save the guest's state or copy its disks. qkilld-stop does neither."""
_QUIT: Final = re.compile(r"\bquit\b|\bq\b")
_EMPTY: Final = re.compile(r"[\s\\n{}\"':,.]*|.*qmp_capabilities[\"'}\s\\n]*")


def signal_number(name: str) -> int | None:
    """Parse a signal such as `9`, `KILL` or `SIGKILL`. Return None for anything else, such as a
    variable."""
    name = name.upper()
    if name.isdecimal():
        return int(name)
    name = name if name.startswith("SIG") else f"SIG{name}"
    return getattr(signal.Signals, name, None) if name.isalnum() else None


def acts_of_signal(number: int | None, *, by_name: bool = False) -> tuple[Act, ...]:
    if number is None:
        return act(ActKind.UNKNOWN, by_name=by_name)
    if number == 0 or number in IGNORED:
        return _NOTHING
    kind = ActKind.TERMINATES if number in POLITE else ActKind.KILLS
    return act(kind, by_name=by_name)


def acts_of_text(text: str) -> tuple[Act, ...]:
    """Classify text written to a monitor, an agent or a console."""
    if _SAVES.search(text):
        return _UNKNOWN
    if _POWERDOWN.search(text):
        return _ASKS
    if _QUIT.search(text):
        return _TERMINATES
    if "$" in text or "`" in text:
        return _UNKNOWN
    return _NOTHING if _EMPTY.fullmatch(text) else _UNKNOWN


def acts_of_program(name: str, words: Sequence[str], text: str) -> tuple[Act, ...] | None:
    """Classify a program with its arguments `words` and its input `text`; None if it is unknown."""
    if name in _READING:
        return _NOTHING
    if name in _CHANGING:
        return _CHANGES
    if name in _SENDERS:
        if name == "socat" and not text and any(word in ("-", "STDIO") for word in words):
            return (Act(ActKind.NOTHING, reads=True),)
        return acts_of_text(f"{text} {' '.join(words)}" if name in _TYPED else text)
    reader = _READERS.get(name)
    return reader(words, text) if reader else None


# ---- signals ----


def _kill(words: Sequence[str], text: str) -> tuple[Act, ...]:
    return acts_of_signal(_signal_option(words, ("s", "n")))


def _pkill(words: Sequence[str], text: str) -> tuple[Act, ...]:
    # Pass no letters, because pkill's option -s selects sessions, not a signal.
    return acts_of_signal(_signal_option(words, ()), by_name=True)


def _killall(words: Sequence[str], text: str) -> tuple[Act, ...]:
    acts = acts_of_signal(_signal_option(words, ("s",)), by_name=True)
    waits = act(ActKind.WAITS) if {"-w", "--wait"} & set(words) else ()
    return (*acts, *waits)


def _fuser(words: Sequence[str], text: str) -> tuple[Act, ...]:
    if not any(re.fullmatch(r"-[a-zA-Z]*k[a-zA-Z]*|--kill", word) for word in words):
        return _NOTHING
    options = [word for word in words if re.fullmatch(r"-[A-Z0-9]+", word)]
    return acts_of_signal(signal_number(options[-1][1:]) if options else signal.SIGKILL)


def _start_stop_daemon(words: Sequence[str], text: str) -> tuple[Act, ...]:
    if not {"-K", "--stop"} & set(words):
        return _UNKNOWN
    by_name = not any(re.match(r"-p|--pidfile|--pid\b", word) for word in words)
    options = dict(pairwise(words))
    options |= dict(word.partition("=")[::2] for word in words if "=" in word)
    options |= {word[:2]: word[2:] for word in words if re.match(r"-[sR][^-]", word)}
    name = options.get("--signal") or options.get("-s") or "TERM"
    retry = options.get("--retry") or options.get("-R") or ""
    # A number alone means TERM/NUMBER/KILL/NUMBER.
    if retry and (retry.isdecimal() or re.search(r"KILL|/-?9\b|^-?9\b", retry)):
        return act(ActKind.KILLS, by_name=by_name)
    acts = acts_of_signal(signal_number(name.removeprefix("-")), by_name=by_name)
    return (*acts, *act(ActKind.WAITS)) if retry else acts


def _awk(words: Sequence[str], text: str) -> tuple[Act, ...]:
    may_run = any("system" in word or "|" in word or word.startswith("-f") for word in words)
    return _UNKNOWN if may_run else _NOTHING


def _signal_option(words: Sequence[str], letters: Sequence[str]) -> int | None:
    """Return the signal that the options select: SIGTERM if they select none, None if it is
    unknown. `letters`: options that take a signal."""
    rest = iter(words)
    for word in rest:
        if word == "--":
            break
        if word == "--signal" or word in [f"-{letter}" for letter in letters]:
            return signal_number(next(rest, ""))
        if word.startswith("--signal="):
            return signal_number(word.partition("=")[2])
        for letter in letters:
            if re.fullmatch(rf"-{letter}(\d+|[A-Z][A-Z0-9]+)", word):
                return signal_number(word[2:])
        if re.fullmatch(r"-(\d+|(SIG)?[A-Z][A-Z0-9+]+)", word):
            return signal_number(word[1:])
        if word.startswith("-$"):
            return None
    return signal.SIGTERM


# ---- managers of guests and of units ----


def _virsh(words: Sequence[str], text: str) -> tuple[Act, ...]:
    command = _verb(words, ("-c", "--connect", "-d", "--debug", "-l", "--log", "-k", "-K"))
    match command:
        case "destroy":
            # Without --graceful, libvirt sends SIGTERM, and SIGKILL 10 s later.
            return _TERMINATES if "--graceful" in words else _KILLS
        case "shutdown":
            return _ASKS
        case "managedsave" | "save":
            return _ASKS_AND_WAITS
        case "qemu-monitor-command" | "qemu-agent-command":
            return acts_of_text(" ".join(words))
        case "domid" | "dominfo" | "domstate" | "list":
            return _NOTHING
        case "autostart" | "start" | "dumpxml" | "domdisplay":
            return _CHANGES
    return _UNKNOWN


def _container(
    words: Sequence[str], text: str, *, forced_removal: tuple[Act, ...] = _KILLS
) -> tuple[Act, ...]:
    """Classify docker, nerdctl and podman."""
    command = _verb(words, ("--context", "-H", "--host", "--namespace", "-n"))
    if command in ("container", "pod"):
        rest = words[list(words).index(command) + 1 :]
        return _container(rest, text, forced_removal=forced_removal)
    if command == "machine":
        subcommand = _verb(words[list(words).index("machine") + 1 :], ())
        return _ASKS_AND_WAITS if subcommand == "stop" else _UNKNOWN
    if command == "kill":
        number = _signal_option(words, ("s",))
        has_signal = any(re.match(r"-s|--signal|-[A-Z0-9]+$", word) for word in words)
        return acts_of_signal(number if has_signal else signal.SIGKILL)
    if command == "rm" and _has_flag(words, "f", "--force"):
        return forced_removal
    # The effect of a stop is unknown, because the container's entry point may do anything on
    # SIGTERM. SIGKILL follows 10 s later.
    return _CHANGES if command in ("rm", "network", "volume", "image", "cp") else _UNKNOWN


def _podman(words: Sequence[str], text: str) -> tuple[Act, ...]:
    # Unlike `docker rm -f`, `podman rm -f` stops a container before removing it. Quadlet uses this.
    return _container(words, text, forced_removal=_UNKNOWN)


def _has_flag(words: Iterable[str], letter: str, name: str) -> bool:
    """Return whether an option is given, either alone or with others in one word, such as -vf."""
    return any(word == name or re.fullmatch(rf"-[a-z]*{letter}[a-z]*", word) for word in words)


def _instances(words: Sequence[str], text: str) -> tuple[Act, ...]:
    """Classify a command of incus, lxc, multipass, limactl, crc or minikube."""
    command, forced = _verb(words, ("--project",)), {"-f", "--force"} & set(words)
    if command in ("stop", "restart", "delete", "rm") and forced:
        return _KILLS
    if command in ("stop", "suspend"):
        return _ASKS_AND_WAITS
    return _CHANGES if command in ("list", "info", "config", "start") else _UNKNOWN


def _proxmox(words: Sequence[str], text: str) -> tuple[Act, ...]:
    acts = {"shutdown": _ASKS_AND_WAITS, "suspend": _ASKS_AND_WAITS, "stop": _TERMINATES}
    command = _verb(words, ())
    if command == "monitor":
        return acts_of_text(text)
    harmless = command in ("status", "list", "config", "set", "unlock")
    return acts.get(command, _CHANGES if harmless else _UNKNOWN)


def _xen(words: Sequence[str], text: str) -> tuple[Act, ...]:
    match _verb(words, ()):
        case "destroy":
            return _KILLS
        case "shutdown":
            return _ASKS_AND_WAITS if {"-w", "--wait"} & set(words) else _ASKS
    return _UNKNOWN


def _ganeti(words: Sequence[str], text: str) -> tuple[Act, ...]:
    return _ASKS_AND_WAITS if _verb(words, ()) in ("shutdown", "stop") else _UNKNOWN


def _machinectl(words: Sequence[str], text: str) -> tuple[Act, ...]:
    match _verb(words, ("-s", "--signal", "-M", "-H")):
        case "poweroff" | "stop":
            return _ASKS
        case "terminate":
            return _KILLS
        case "kill":
            return acts_of_signal(_signal_option(words, ("s",)))
        case "list" | "status" | "show":
            return _NOTHING
    return _UNKNOWN


def _systemctl(words: Sequence[str], text: str) -> tuple[Act, ...]:
    match _verb(words, ("-s", "--signal", "-M", "-H", "-t", "-p", "-P")):
        case "kill":
            return acts_of_signal(_signal_option(words, ("s",)))
        case "poweroff" | "halt" if "-H" in words:
            return _ASKS  # Powers off the guest: `systemctl -H GUEST poweroff`.
        case "is-active" | "is-failed" | "show" | "status":
            return _NOTHING
        case "start" | "daemon-reload" | "reset-failed" | "set-property":
            return _CHANGES
        case "enable" | "disable" if "--now" not in words:
            return _CHANGES
    return _UNKNOWN


def _ssh(words: Sequence[str], text: str) -> tuple[Act, ...]:
    return _ASKS if _POWERDOWN.search(" ".join([*words, text])) else _UNKNOWN


def _verb(words: Sequence[str], with_value: Sequence[str]) -> str:
    """Return the first word that is not an option; "" for none."""
    rest = iter(words)
    for word in rest:
        if word in with_value:
            next(rest, None)
        elif not word.startswith("-"):
            return word
    return ""


# ---- waiting and reading ----


def _sleep(words: Sequence[str], text: str) -> tuple[Act, ...]:
    total = 0
    for word in words:
        if word == "infinity":
            return act(ActKind.SLEEPS)
        try:
            total += timespan.parse(word)
        except ValueError:
            return act(ActKind.SLEEPS, 0)
    return act(ActKind.SLEEPS, total)


def _wait(words: Sequence[str], text: str) -> tuple[Act, ...]:
    return act(ActKind.WAITS)


def _tail(words: Sequence[str], text: str) -> tuple[Act, ...]:
    follows = any(word.startswith("--pid") for word in words)
    return act(ActKind.WAITS) if follows else _NOTHING


def _read(words: Sequence[str], text: str) -> tuple[Act, ...]:
    reads = not text and not [word for word in words if not word.startswith("-")]
    return (Act(ActKind.NOTHING, reads=reads),)


def _read_builtin(words: Sequence[str], text: str) -> tuple[Act, ...]:
    return (Act(ActKind.NOTHING, reads=not text),)


_SENDERS: Final = frozenset(
    ["socat", "nc", "ncat", "netcat", "nc.openbsd", "nc.traditional", "qmp-shell", "qmp-shell-wrap",
     "telnet", "websocat", "screen", "tmux", "hmp", "qmp", "qemu-ga-client", "qmp.py"]
)  # fmt: skip
"""Programs that write text to a monitor or a console, and return."""
_TYPED: Final = frozenset(["screen", "tmux", "qmp-shell", "hmp", "qmp", "qemu-ga-client", "qmp.py"])
"""The programs of _SENDERS that take the text as arguments."""
_READING: Final = frozenset(
    ["true", ":", "echo", "printf", "test", "[", "[[", "logger", "cd", "export", "unset", "set",
     "exit", "return", "local", "sync", "seq", "grep", "egrep", "cut", "tr", "head", "pgrep",
     "pidof", "ps", "systemd-notify", "systemd-cat", "stat", "ls", "readlink", "realpath",
     "basename", "dirname", "umask", "declare", "typeset", "readonly", "false", "continue",
     "break", "id", "expr", "let", "wc", "sort", "uniq", "jq", "which", "uname", "nproc", "lsof",
     "ss"]
)  # fmt: skip
"""Programs that change nothing."""
_CHANGING: Final = frozenset(
    ["rm", "rmdir", "touch", "ip", "iptables", "ip6tables", "nft", "brctl", "bridge", "ovs-vsctl",
     "tunctl", "mkdir", "mv", "cp", "ln", "date", "sed", "chmod", "chown", "chgrp", "install",
     "tee", "hostname", "ethtool", "sysctl", "modprobe", "resolvectl", "losetup", "mktemp"]
)  # fmt: skip
"""Programs that change files or the network, but do nothing to a running guest."""
_READERS: Final[Mapping[str, Callable[[Sequence[str], str], tuple[Act, ...]]]] = {
    "kill": _kill,
    "pkill": _pkill,
    "skill": _pkill,
    "killall": _killall,
    "killall5": _killall,
    "fuser": _fuser,
    "start-stop-daemon": _start_stop_daemon,
    "awk": _awk,
    "gawk": _awk,
    "mawk": _awk,
    "virsh": _virsh,
    "docker": _container,
    "podman": _podman,
    "nerdctl": _container,
    "incus": _instances,
    "lxc": _instances,
    "multipass": _instances,
    "limactl": _instances,
    "crc": _instances,
    "minikube": _instances,
    "qm": _proxmox,
    "xl": _xen,
    "gnt-instance": _ganeti,
    "machinectl": _machinectl,
    "systemctl": _systemctl,
    "ssh": _ssh,
    "sleep": _sleep,
    "wait": _wait,
    "waitpid": _wait,
    "pidwait": _wait,
    "tail": _tail,
    "cat": _read,
    "read": _read_builtin,
}
