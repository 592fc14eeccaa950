"""The verdict on a unit: what its stops keep now, and after adoption."""

from __future__ import annotations

import shlex
import signal
from dataclasses import replace
from typing import Any

import pytest

from qkilld.model.constants import INFINITY
from qkilld.model.unit import Command, UnitFacts
from qkilld.unitcheck.check import check
from qkilld.unitcheck.command import line_of
from qkilld.unitcheck.comparison import Comparison, UnitVerdict, compare
from qkilld.unitcheck.context import Surroundings, is_guest_of
from qkilld.unitcheck.dropin import Override, changes
from qkilld.unitcheck.keepers import GuestKeeper
from qkilld.unitcheck.stop_outcome import Occasion, Patience
from qkilld.unitcheck.storage import Storage
from tests.pure.test_unitcheck import SAFE, SCOPE, SHELL, STOP, S, line

QEMU = "/usr/bin/qemu-system-x86_64"
ASKABLE = Surroundings(guests=1, is_running=True, can_ask=True)
MUTE = replace(ASKABLE, can_ask=False)
BARE = replace(SAFE, exec_stop=(), notify_access="none", timeout_stop=5 * S)
POWERDOWN = line("echo system_powerdown | socat - UNIX:/run/m")
LOOP = line(
    "while test -d /proc/$MAINPID; do echo system_powerdown | socat - UNIX:/run/m; sleep 60; done"
)
PRIVILEGED = replace(STOP, flags=("privileged",))
UNEXPANDED = replace(STOP, arguments=(STOP.path, "--pid", "$MAINPID"), flags=("no-env-expand",))
UNKNOWN = Command("/opt/vm-stop", ("/opt/vm-stop", "web"))
NBD = Storage(protocol="nbd", server="lval.service")


def judge(facts: UnitFacts, surroundings: Surroundings = MUTE) -> Comparison:
    return compare(facts, surroundings, check(facts, surroundings))


def starting(*words: str, kill_mode: str = "control-group") -> UnitFacts:
    return replace(BARE, kill_mode=kill_mode, exec_start=(Command(words[0], words),))


def written(facts: UnitFacts, surroundings: Surroundings) -> list[str]:
    found = changes(check(facts, surroundings))
    return [one.text for change in found for one in change.lines]


def test_a_bare_unit_is_safe_when_it_was_adopted() -> None:
    found = judge(BARE)
    assert found.word is UnitVerdict.SAFE and found.writes
    assert {each.disks for each in found.now.values()} == {Patience.TIMED}
    assert {each.disks for each in found.adopted.values()} == {Patience.PATIENT}
    assert {each.guest for each in judge(BARE, ASKABLE).adopted.values()} == {Patience.PATIENT}


def test_an_adopted_unit_is_safe_and_nothing_is_to_be_written() -> None:
    found = judge(SAFE)
    assert (found.word, found.writes) == (UnitVerdict.SAFE, False)
    assert found.now == found.adopted


def test_the_signal_of_a_restart_counts() -> None:
    killed = replace(BARE, restart_kill_signal=signal.SIGKILL)
    assert judge(killed).now[Occasion.RESTART].disks is Patience.NONE
    assert judge(killed).now[Occasion.STOP].disks is Patience.TIMED
    # QEMU ignores SIGWINCH, so a guest that was asked has time to shut down until SIGKILL.
    asked = replace(BARE, exec_stop=(POWERDOWN,), restart_kill_signal=signal.SIGWINCH)
    found = judge(asked)
    assert (found.word, found.writes) == (UnitVerdict.WORSE, False)
    assert "systemctl restart could lose" in found.reason


def test_without_a_guest_nothing_is_safe() -> None:
    nobody = replace(MUTE, guests=0)
    assert judge(BARE, nobody).word is UnitVerdict.UNKNOWN
    assert "no QEMU runs in it" in judge(BARE, nobody).reason
    stopped = replace(nobody, is_running=False)
    assert judge(BARE, stopped).word is UnitVerdict.SAFE, "its ExecStart= is a QEMU"
    script = replace(BARE, exec_start=(Command("/opt/run", ("/opt/run",)),))
    assert judge(script, stopped).word is UnitVerdict.UNKNOWN
    assert not judge(script, stopped).writes
    assert judge(replace(BARE, exec_start=(SHELL,)), stopped).word is UnitVerdict.SAFE


def test_a_qemu_that_is_not_covered() -> None:
    path = "/srv/qemu/bin/qemu-system-x86_64"
    running = judge(BARE, replace(MUTE, guests=0, uncovered=(path,)))
    stopped = judge(replace(BARE, exec_start=(Command(path, (path,)),)), Surroundings())
    for found in (running, stopped):
        assert (found.word, found.writes) == (UnitVerdict.MANUAL, False)
        assert f" {path}" in found.advice and "Executables=/usr/bin/qemu-system-*" in found.advice


VMS = Command(QEMU, (QEMU,))
ROOTS = Command(QEMU, (QEMU,), flags=("privileged",))
ROOTS_IP = Command("/usr/bin/ip", ("ip", "link", "set", "br0", "up"), flags=("privileged",))


@pytest.mark.parametrize(
    ("facts", "settings", "problem"),
    [
        ({}, {"uncovered": ("/opt/qemu-kvm",)}, "another QEMU in it is /opt/qemu-kvm"),
        # The other QEMU is meant to keep running.
        ({"kill_mode": "process"}, {"uncovered": ("/opt/qemu-kvm",)}, ""),
        ({}, {"missing": (STOP.path,)}, "is /usr/bin/qkilld-stop, which does not exist"),
        ({}, {"missing": ("/opt/qkilld-stop",)}, ""),
        ({"user": "vm"}, {"has_foreign": True}, "runs as another user than the guest"),
        ({"user": "vm", "exec_stop": (PRIVILEGED,)}, {"has_foreign": True}, ""),
        ({}, {"has_foreign": True, "manager": "user@1.service"}, "runs as another user"),
        (
            {"user": "vm", "exec_start": (ROOTS,)},
            {"guests": 0, "is_running": False},
            "another user",
        ),
        ({"user": "vm", "exec_start": (ROOTS,)}, {}, ""),  # -runas vm
        ({"user": "vm", "exec_start": (ROOTS_IP, VMS)}, {"guests": 0, "is_running": False}, ""),
        ({"user": "root", "exec_start": (ROOTS,)}, {"guests": 0, "is_running": False}, ""),
        ({"exec_stop": (UNEXPANDED,)}, {}, "gets no process id"),
    ],
)
def test_a_guest_that_qkilld_stop_would_not_stop(
    facts: dict[str, Any], settings: dict[str, Any], problem: str
) -> None:
    unit, around = replace(SAFE, **facts), replace(ASKABLE, **settings)
    problems = [each.problem for each in check(unit, around) if each.is_unsafe]
    assert len(problems) == bool(problem) and all(problem in each for each in problems)
    assert (judge(unit, around).word is UnitVerdict.SAFE) is not bool(problem)


def test_a_guest_in_another_unit() -> None:
    virsh = replace(BARE, exec_start=(Command("/usr/bin/virsh", ("virsh", "start", "web")),))
    found = judge(virsh, Surroundings())
    assert (found.word, found.writes, found.other_unit) == (UnitVerdict.OTHER_UNIT, False, "")
    found = judge(virsh, Surroundings(other_unit="machine-qemu-1-web.scope", is_running=True))
    assert (found.word, found.other_unit) == (UnitVerdict.OTHER_UNIT, "machine-qemu-1-web.scope")


@pytest.mark.parametrize(
    ("facts", "surroundings"),
    [
        (replace(BARE, kill_mode="process", exec_start=(Command("/usr/bin/python3", ()),)),
         replace(MUTE, guests=2)),
        (replace(BARE, kill_mode="process", exec_start=(SHELL,)), replace(MUTE, guests=2)),
        (replace(SAFE, kill_mode="process"), replace(ASKABLE, guests=2)),
        (starting("/usr/sbin/atd", "-f", kill_mode="process"), MUTE),
        (starting("/usr/libexec/incus/incusd"), MUTE),
        (starting("/usr/sbin/virtqemud", kill_mode="process"), replace(MUTE, guests=0)),
        (starting("/usr/bin/perl", "-T", "/usr/bin/pvedaemon", "start"), MUTE),
        (starting("/usr/bin/snap", "run", "lxd.daemon"), MUTE),
        (starting("/usr/bin/env", "A=b", "/usr/bin/podman", "system", "service"), MUTE),
        (starting("/opt/start"), replace(MUTE, main_executable="/usr/bin/dockerd (deleted)")),
    ],
)  # fmt: skip
def test_a_manager_is_left_alone(facts: UnitFacts, surroundings: Surroundings) -> None:
    found = judge(facts, surroundings)
    assert (found.word, found.writes) == (UnitVerdict.WORSE, False)


@pytest.mark.parametrize(
    ("start", "name", "words", "expected"),
    [
        ("/bin/su - vm -c 'exec qemu-system-x86_64 -S'", "", "qemu-system-x86_64 -S", True),
        ("/bin/su - vm -c '/opt/bin/qemu-kvm -S; true'", "", "/opt/bin/qemu-kvm -S", True),
        ("/bin/su - vm -c 'exec qemu-system-x86_64 -S -m 1G'", "", "qemu-system-x86_64 -S", False),
        ("/bin/su - vm -c 'exec qemu-system-x86_64 -m 1G -S'", "", "qemu-system-x86_64 -S", False),
        ("/bin/su - vm -c 'exec qemu-kvm'", "", "qemu-kvm", False),
        ("/usr/bin/virsh start web", "web", "qemu-kvm -name web", True),
        ("/opt/start-vm web", "web", "qemu-kvm -name web", True),
        ("/opt/start-vm web-1", "web", "qemu-kvm -name web", False),
        # This unit's own QEMU runs in the unit, so the guest outside is a different one.
        (f"{QEMU} -name db -drive file=/srv/web/disk.img", "web", "qemu-kvm -name web", False),
        (f"/bin/sh -c '{QEMU} -S'", "", "qemu-system-x86_64 -S", False),
        (f"{QEMU} -name sudo -S", "sudo", "qemu-system-x86_64 -name sudo -S", False),
        # These programs may start QEMU in the unit of a server or of a session.
        (f"/bin/tmux new -d -s a '{QEMU} -name web'", "web", "qemu-kvm -name web", True),
        (f"/bin/sh -c '/bin/screen -dm {QEMU} -S'", "", f"{QEMU} -S", True),
        (f"/bin/sudo -u vm {QEMU} -S", "", f"{QEMU} -S", True),
        (f"/opt/launch {QEMU} -S", "", f"{QEMU} -S", True),
    ],
)
def test_a_guest_elsewhere_that_a_unit_starts(
    start: str, name: str, words: str, expected: bool
) -> None:
    assert is_guest_of(starting(*shlex.split(start)), name, words.split()) is expected


def test_no_guest_may_be_one_that_cannot_be_seen() -> None:
    around = replace(ASKABLE, guests=0)
    assert judge(BARE, around).reason == "no QEMU runs in it"
    found = judge(BARE, replace(around, are_all_seen=False))
    assert (found.word, found.advice) == (UnitVerdict.UNKNOWN, "run this as root")


@pytest.mark.parametrize("program", ["systemd-nspawn", "lxc-start"])
def test_a_container_is_left_alone(program: str) -> None:
    """With KillMode=control-group, a database in the container would be ended without its own
    shutdown."""
    facts = replace(starting(f"/usr/bin/{program}", "-b"), kill_mode="mixed")
    running = replace(ASKABLE, main_executable=f"/usr/bin/{program} (deleted)")
    script = replace(facts, exec_start=(Command("/opt/run", ("/opt/run",)),))
    for found in (judge(facts, ASKABLE), judge(script, running), judge(facts, Surroundings())):
        assert (found.word, found.writes) == (UnitVerdict.WORSE, False)
        assert "runs a container" in found.reason
    assert judge(script, ASKABLE).word is UnitVerdict.SAFE


@pytest.mark.parametrize(
    "facts",
    [
        replace(BARE, id="libvirtd.service"),
        replace(starting("/usr/bin/podman", "run", "vm"), id="docker.service"),
        starting("/bin/sh", "-c", "exec qemu-system-x86_64 -name libvirtd"),
        starting("/usr/bin/env", "qemu-system-x86_64", "-name", "libvirtd"),
    ],
)
def test_the_name_of_a_unit_makes_no_manager(facts: UnitFacts) -> None:
    assert judge(facts).word is UnitVerdict.SAFE


def test_a_shell_around_one_guest_is_no_manager() -> None:
    found = judge(replace(BARE, kill_mode="process", exec_start=(SHELL,)))
    assert (found.word, found.writes) == (UnitVerdict.SAFE, True)


def test_a_wait_by_sigcont_is_not_made_a_power_cut() -> None:
    facts = replace(BARE, exec_stop=(POWERDOWN,), kill_signal=signal.SIGCONT, timeout_stop=30 * S)
    found = judge(facts, ASKABLE)
    assert (found.word, found.writes) == (UnitVerdict.SAFE, True)
    assert found.now[Occasion.STOP].guest is Patience.TIMED
    assert found.adopted[Occasion.STOP].guest is Patience.PATIENT
    refused = judge(facts, MUTE)
    assert (refused.word, refused.writes) == (UnitVerdict.WORSE, False)
    # Without a timeout, adoption would not improve anything, so nothing is written.
    endless = judge(replace(facts, timeout_stop=INFINITY), MUTE)
    assert not endless.writes and endless.keeps_data


def test_a_loop_that_waits_is_replaced_by_what_waits_better() -> None:
    facts = replace(BARE, exec_stop=(LOOP,), timeout_stop=60 * S)
    found = judge(facts, ASKABLE)
    assert (found.word, found.writes) == (UnitVerdict.SAFE, True)
    assert found.now[Occasion.STOP].guest is Patience.TIMED
    assert written(facts, ASKABLE) == [
        "ExecStop=",
        "ExecStop=-/usr/bin/qkilld-stop",
        "NotifyAccess=exec",
    ]
    mute = judge(facts, MUTE)
    assert (mute.word, mute.writes) == (UnitVerdict.NO_BETTER, False)
    (finding,) = [each for each in check(facts, MUTE) if each.is_unsafe]
    assert finding.key == "exec-stop-clock"


def test_an_unknown_line_stays_and_stays_unknown() -> None:
    facts = replace(BARE, exec_stop=(UNKNOWN,), timeout_stop=90 * S)
    for surroundings in (ASKABLE, MUTE):
        found = judge(facts, surroundings)
        assert (found.word, found.writes) == (UnitVerdict.UNKNOWN, True)
        assert "vm-stop" in found.reason
        assert written(facts, surroundings)[:3] == [
            "ExecStop=",
            "ExecStop=-/opt/vm-stop web",
            "ExecStop=-/usr/bin/qkilld-stop",
        ]
    # The line may ask the guest. In this case systemd waits, because QEMU ignores SIGCONT.
    waits = judge(replace(facts, kill_signal=signal.SIGCONT), MUTE)
    assert (waits.word, waits.writes) == (UnitVerdict.UNKNOWN, False)


def test_order_and_specifiers_of_lines_are_kept() -> None:
    facts = replace(
        BARE,
        exec_stop=(
            replace(UNKNOWN, arguments=("/opt/vm-stop", "qkilld")),
            line("kill -9 1"),
            Command("/opt/after", ("/opt/after",), True),
        ),
        timeout_stop=90 * S,
    )
    texts = ("/opt/vm-stop %i", "/bin/sh -c 'kill -9 1'", "-/opt/after %n")
    surroundings = replace(ASKABLE, stop_texts=texts)
    assert [text for text in written(facts, surroundings) if text.startswith("ExecStop")] == [
        "ExecStop=",
        "ExecStop=-/opt/vm-stop %i",
        # The helper takes the place of the line that kills, because the next line may need the
        # guest to be gone.
        "ExecStop=/usr/bin/qkilld-stop",
        "ExecStop=-/opt/after %n",
    ]


def test_a_template_gets_no_line_of_one_instance() -> None:
    facts = replace(BARE, exec_stop=(POWERDOWN, line("logger web")), timeout_stop=90 * S)
    found = judge(facts, replace(ASKABLE, is_template=True))
    assert (found.word, found.writes) == (UnitVerdict.UNKNOWN, False)
    assert "daemon-reload" in found.advice
    for surroundings in (ASKABLE, replace(ASKABLE, is_template=True, stop_texts=("a %i", "b %i"))):
        assert judge(facts, surroundings).writes
    # These settings have no ExecStop= line, so no line can be for a single instance.
    assert judge(BARE, replace(ASKABLE, is_template=True)).writes


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("/usr/bin/qkilld-stop --pidfile /run/%i.pid", " --pidfile /run/%i.pid"),
        ("@/usr/bin/qkilld-stop q --pidfile  '/run/%i.pid'", " --pidfile  '/run/%i.pid'"),
        ("/opt/python3 -m qkilld.stop --pidfile /run/%i.pid", " --pidfile /run/%i.pid"),
        ("/usr/bin/qkilld-stop", ""),
    ],
)
def test_the_helper_of_a_template_keeps_its_specifiers(text: str, options: str) -> None:
    words = text.replace("%i", "web").replace("'", "").replace("@", "").split()
    stop = Command(words[0], tuple(words))
    facts = replace(SAFE, exec_stop=(stop,), address_families=("AF_INET",), pid_file="/run/web.pid")
    template = replace(ASKABLE, is_template=True)
    known = replace(template, stop_texts=(text,))
    assert written(facts, known) == [
        "ExecStop=",
        f"ExecStop=-+/usr/bin/qkilld-stop{options}",
    ]
    assert judge(facts, known).writes
    # If the text is unknown, only a line without arguments is right for every instance.
    assert judge(facts, template).writes is (len(words) == 1)


@pytest.mark.parametrize("polite", ["kill -TERM $MAINPID", "echo quit | socat - UNIX:/run/m"])
def test_lines_that_ask_qemu_leave_the_guest_to_be_asked_first(polite: str) -> None:
    facts = replace(BARE, exec_stop=(line(polite), UNKNOWN))
    assert [text for text in written(facts, ASKABLE) if text.startswith("ExecStop")] == [
        "ExecStop=",
        "ExecStop=/usr/bin/qkilld-stop",
        "ExecStop=/opt/vm-stop web",
    ]
    assert judge(facts, ASKABLE).word is UnitVerdict.SAFE
    found = judge(replace(BARE, exec_stop=(line(polite),)), ASKABLE)
    assert (found.word, found.writes) == (UnitVerdict.SAFE, True)
    assert found.now[Occasion.STOP].guest is Patience.NONE
    assert found.adopted[Occasion.STOP].guest is Patience.PATIENT


COPY = Command("/bin/cp", ("/bin/cp", "/run/web.img", "/srv/web.img"))


@pytest.mark.parametrize(
    ("stops", "can_ask", "kept"),
    [
        (["kill $MAINPID"], True, []),
        (["kill $MAINPID", "while kill -0 $MAINPID; do sleep 1; done"], True, []),
        (["kill -9 $MAINPID"], True, []),
        (["echo system_powerdown | socat - UNIX:/m; while kill -0 1; do sleep 1; done"], True, []),
        (["echo system_powerdown | socat - UNIX:/m", "tail --pid=1 -f /dev/null"], True, [0]),
        # The helper cannot ask the guest, so the line that asks is kept.
        (["echo system_powerdown | socat - UNIX:/m; sleep 30"], False, [0]),
    ],
)
def test_lines_that_need_the_guest_to_be_gone_come_after_the_helper(
    stops: list[str], can_ask: bool, kept: list[int]
) -> None:
    own = tuple(replace(line(text), ignores_failure=True) for text in stops)
    facts = replace(BARE, exec_stop=(*own, COPY), timeout_stop=90 * S)
    texts = [each for each in written(facts, ASKABLE if can_ask else MUTE) if "ExecStop" in each]
    assert texts[-2:] == [
        "ExecStop=/usr/bin/qkilld-stop",
        "ExecStop=/bin/cp /run/web.img /srv/web.img",
    ]
    assert len(texts) == 1 + len(kept) + 2


@pytest.mark.parametrize("later", ["kill -9 $MAINPID", "virsh destroy web", "rm -f /run/x"])
def test_what_follows_a_helper_that_may_fail_may_find_the_guest_running(later: str) -> None:
    """qkilld-stop fails if its job is cancelled. With `-`, systemd ignores this failure."""
    facts = replace(SAFE, exec_stop=(replace(STOP, ignores_failure=True), line(later)))
    found = judge(facts, ASKABLE)
    kills = "rm" not in later
    assert found.now[Occasion.STOP].disks is (Patience.NONE if kills else Patience.TIMED)
    steps = [step.does for step in found.now[Occasion.STOP].steps]
    assert steps[:2] == ["fails", "kills" if kills else "nothing"]
    assert (found.word, found.writes) == (UnitVerdict.SAFE, True)
    assert {each.disks for each in found.adopted.values()} == {Patience.PATIENT}
    # Without the prefix `-`, systemd skips the second line if the first one fails.
    assert judge(replace(SAFE, exec_stop=(STOP, line(later))), ASKABLE).keeps_data


def test_a_helper_with_options_keeps_only_what_they_allow() -> None:
    def stopped(*words: str, timeout: int = 90 * S) -> Comparison:
        command = Command(STOP.path, (STOP.path, *words))
        return judge(replace(SAFE, exec_stop=(command,), timeout_stop=timeout), ASKABLE)

    asks = stopped().now[Occasion.STOP]
    assert (asks.guest, asks.disks) == (Patience.PATIENT, Patience.PATIENT)
    mute = stopped("--no-powerdown").now[Occasion.STOP]
    assert (mute.guest, mute.disks) == (Patience.NONE, Patience.PATIENT)
    for words in (("--force", "--stall", "1s"), ("--force", "--max=9s")):
        for timeout in (90 * S, INFINITY):
            assert stopped(*words, timeout=timeout).now[Occasion.STOP].disks is Patience.TIMED
            assert stopped(*words, timeout=timeout).word is not UnitVerdict.SAFE
    # A helper that does not ask the guest does not replace a line that asks it.
    mute_stop = Command(STOP.path, (STOP.path, "--no-powerdown"))
    assert any("system_powerdown" in each for each in written(
        replace(SAFE, exec_stop=(LOOP, mute_stop)), ASKABLE
    ))  # fmt: skip


def test_each_helper_of_a_unit_remains() -> None:
    stops = [Command(STOP.path, (STOP.path, "--pidfile", f"/run/{name}.pid")) for name in "ab"]
    start = (QEMU, "-pidfile", "/run/a.pid", "-pidfile", "/run/b.pid")
    facts = replace(
        SAFE, exec_start=(Command(QEMU, start),), exec_stop=(POWERDOWN, *stops),
        address_families=("AF_INET",),
    )  # fmt: skip
    assert written(facts, ASKABLE)[2:] == [
        "ExecStop=-+/usr/bin/qkilld-stop --pidfile /run/a.pid",
        "ExecStop=-+/usr/bin/qkilld-stop --pidfile /run/b.pid",
    ]


IGNORED_UNKNOWN = replace(UNKNOWN, ignores_failure=True)


@pytest.mark.parametrize(
    ("stops", "lines"),
    [
        # Before adoption, systemd skips the copy if the previous line fails and the guest still
        # runs.
        ((UNKNOWN, COPY), ["-/opt/vm-stop web", "/usr/bin/qkilld-stop", "COPY"]),
        ((POWERDOWN, COPY, line("logger x")), ["-POWERDOWN", "/usr/bin/qkilld-stop", "COPY",
                                               '/bin/sh -c "logger x"']),
        ((line("logger x"), UNKNOWN), None),
        ((UNKNOWN, COPY, STOP), ["-/opt/vm-stop web", "/usr/bin/qkilld-stop", "COPY"]),
        ((UNKNOWN, COPY, line("kill -9 1")), ["-/opt/vm-stop web", "/usr/bin/qkilld-stop", "COPY"]),
        # Before adoption, the copy already follows a line that ends the guest.
        ((line("kill -9 1"), COPY, STOP), ["/usr/bin/qkilld-stop", "COPY"]),
        ((line("kill 1"), line("while kill -0 1; do sleep 1; done"), COPY, STOP),
         ["/usr/bin/qkilld-stop", "COPY"]),
        # The line after the copy must run before the helper.
        ((UNKNOWN, COPY, line("sleep 9")), None),
        ((POWERDOWN, COPY, line("sleep 9")), None),
        ((POWERDOWN, line("echo > /run/x; sleep 9")), None),
        ((UNKNOWN, UNKNOWN), None),
        # Before adoption, systemd already runs these lines after a failure.
        ((IGNORED_UNKNOWN, IGNORED_UNKNOWN),
         ["-/opt/vm-stop web", "-/opt/vm-stop web", "-/usr/bin/qkilld-stop"]),
        ((POWERDOWN, line("sleep 9"), line("kill -0 1")),
         ["-POWERDOWN", '-/bin/sh -c "sleep 9"', "/usr/bin/qkilld-stop", '/bin/sh -c "kill -0 1"']),
    ],
)  # fmt: skip
def test_no_line_runs_after_a_failure_that_prevents_it_now(
    stops: tuple[Command, ...], lines: list[str] | None
) -> None:
    facts = replace(BARE, exec_stop=stops, timeout_stop=90 * S)
    found = judge(facts, ASKABLE)
    assert found.writes is (lines is not None)
    if lines is None:
        known = all(each is not UNKNOWN for each in stops)
        assert found.word is (UnitVerdict.WORSE if known else UnitVerdict.UNKNOWN)
        assert "has failed" in found.reason
        return
    names = {line_of(POWERDOWN): "POWERDOWN", line_of(COPY): "COPY"}
    texts = [each for each in written(facts, ASKABLE) if each.startswith("ExecStop=")]
    for text, name in names.items():
        texts = [each.replace(text, name) for each in texts]
    both = ["ExecStop=", *(f"ExecStop={each}" for each in lines)]
    assert texts in (both, both[-1:])


@pytest.mark.parametrize("saves", ["savevm auto\\nquit", "migrate exec:gzip\\nquit"])
def test_a_line_that_saves_the_state_of_the_guest_is_not_replaced(saves: str) -> None:
    """With -loadvm, the next start continues from the state that was saved last."""
    facts = replace(BARE, exec_stop=(line(f"printf '{saves}' | socat - UNIX:/m"),))
    found = judge(facts, ASKABLE)
    assert found.word is UnitVerdict.UNKNOWN
    assert any(saves.split()[0] in text for text in written(facts, ASKABLE))


@pytest.mark.parametrize("killing", ["kill -n 9 $MAINPID", "kill -QUIT 1", "virsh destroy w"])
def test_lines_that_kill_are_replaced(killing: str) -> None:
    facts = replace(BARE, exec_stop=(line(killing),))
    found = judge(facts)
    assert found.now[Occasion.STOP].disks is Patience.NONE
    assert (found.word, found.writes) == (UnitVerdict.SAFE, True)
    assert not any("kill" in text for text in written(facts, MUTE) if "qkilld" not in text)


@pytest.mark.parametrize(
    ("condition", "kills"),
    [
        ("test -d /proc/$MAINPID &&", True),
        ("! test -d /proc/$MAINPID ||", True),
        ("test ! -d /proc/$MAINPID ||", True),
        ("[ ! -d /proc/$MAINPID ] ||", True),
        ("! kill -0 $MAINPID ||", True),
        # These lines kill only if the guest is gone.
        ("kill -0 $MAINPID ||", False),
        ("! test ! -d /proc/$MAINPID ||", False),
    ],
)
def test_a_line_that_kills_a_guest_that_still_runs(condition: str, kills: bool) -> None:
    asks = "echo system_powerdown | socat - UNIX:/run/m; sleep 10"
    facts = replace(BARE, exec_stop=(line(f"{asks}; {condition} kill -9 $MAINPID"),))
    found = judge(replace(facts, timeout_stop=INFINITY), ASKABLE)
    assert found.now[Occasion.STOP].disks is (Patience.TIMED if kills else Patience.PATIENT)


def test_a_server_of_this_host_needs_the_order() -> None:
    surroundings = replace(ASKABLE, storage=(NBD,))
    found = judge(BARE, surroundings)
    assert (found.word, found.writes) == (UnitVerdict.SAFE, True)
    assert "After=lval.service" in written(BARE, surroundings)
    # A unit cannot be ordered after a session's scope. So with the helper, the server would exit
    # before the guest.
    session = replace(surroundings, storage=(replace(NBD, server="session-3.scope"),))
    refused = judge(BARE, session)
    assert (refused.word, refused.writes) == (UnitVerdict.WORSE, False)
    assert "served" in refused.reason


def test_a_server_that_is_not_known_is_not_none() -> None:
    unseen = Storage(protocol="nbd", unseen="the sockets of this host cannot be listed")
    surroundings = replace(ASKABLE, storage=(unseen,))
    for facts in (SAFE, BARE):
        found = judge(facts, surroundings)
        assert (found.word, found.writes) == (UnitVerdict.UNKNOWN, False)
        assert "which unit serves its disks: the sockets of this host" in found.reason
        findings = [each for each in check(facts, surroundings) if each.key == "server-unknown"]
        assert len(findings) == 1 and "cannot be listed" in findings[0].problem


def test_a_keeper_of_a_scope_comes_first() -> None:
    keeper = GuestKeeper("pve-guests.service", "Proxmox VE")
    facts = replace(
        SCOPE, kill_mode="process", sends_sigkill=False, timeout_stop=INFINITY,
        before=("pve-guests.service",),
    )  # fmt: skip
    surroundings = replace(MUTE, guard="qkilld-scope@100.scope.service", keepers=(keeper,))
    found = judge(facts, surroundings)
    assert found.now[Occasion.SHUTDOWN].guest is Patience.PATIENT
    assert found.adopted[Occasion.SHUTDOWN].guest is Patience.PATIENT
    assert [step.by for step in found.adopted[Occasion.SHUTDOWN].steps] == [
        "pve-guests.service",
        "qkilld-scope@100.scope.service",
    ]


def test_a_scope_that_is_safe_gets_no_guard() -> None:
    surroundings = replace(ASKABLE, guard="qkilld-scope@run-1.scope.service")
    safe = judge(replace(SCOPE, timeout_stop=INFINITY), surroundings)
    assert (safe.word, safe.writes) == (UnitVerdict.SAFE, False) and safe.keeps_data
    for facts in (SCOPE, replace(SCOPE, sends_sigkill=False), replace(SCOPE, kill_mode="process")):
        assert judge(facts, surroundings).writes
        assert not judge(facts, replace(surroundings, is_guarded=True)).writes


def test_a_sandbox_that_hides_the_bus() -> None:
    facts = replace(BARE, timeout_stop=90 * S, address_families=("AF_INET", "AF_INET6"))
    assert "ExecStop=-+/usr/bin/qkilld-stop" in written(facts, MUTE)
    assert judge(facts).word is UnitVerdict.SAFE
    plain = replace(facts, exec_stop=(STOP,), notify_access="exec")
    (finding,) = [each for each in check(plain, MUTE) if each.is_unsafe]
    assert finding.key == "helper-sandbox"
    assert judge(plain).now[Occasion.STOP].disks is Patience.TIMED
    assert "ExecStop=-+/usr/bin/qkilld-stop" in written(plain, MUTE)
    # Here, the unit's user can write a file that sets the environment of a root process.
    theirs = replace(facts, user="vm", environment_files=("/home/vm/env",))
    assert "ExecStop=-/usr/bin/qkilld-stop" in written(theirs, MUTE)
    assert judge(theirs).word is not UnitVerdict.SAFE


THEIRS = replace(
    BARE, user="vm", environment_files=("/home/vm/env",), address_families=("AF_INET",)
)
"""A unit whose timeout qkilld-stop cannot extend, even after adoption."""


def test_what_is_better_but_not_safe_is_written() -> None:
    asked = judge(replace(THEIRS, timeout_stop=90 * S), ASKABLE)
    assert (asked.word, asked.writes) == (UnitVerdict.MANUAL, True)
    assert asked.now[Occasion.STOP].guest is Patience.NONE
    assert asked.adopted[Occasion.STOP].guest is Patience.TIMED
    assert "keeps more" in asked.reason
    longer = judge(THEIRS)
    assert "TimeoutStopSec=90s" in written(THEIRS, MUTE)
    assert (longer.word, longer.writes) == (UnitVerdict.MANUAL, True)


def test_what_is_no_better_is_not_written() -> None:
    facts = replace(THEIRS, timeout_stop=90 * S)
    assert written(facts, MUTE), "it would only take other steps"
    found = judge(facts)
    assert (found.word, found.writes) == (UnitVerdict.NO_BETTER, False)


def test_a_template_of_which_only_special_instances_run() -> None:
    facts = replace(BARE, id="vm@qkilld.service", exec_start=(line("/usr/local/bin/vm qkilld"),))
    around = replace(
        ASKABLE, guests=0, is_running=False, is_template=True, special_instances=("vm@web.service",)
    )
    found = judge(facts, around)
    assert (found.word, found.advice) == (UnitVerdict.UNKNOWN, "check vm@web.service instead")
    assert (
        judge(facts, replace(around, special_instances=())).advice == "start it and check it again"
    )


def test_overrides_of_the_drop_in_are_counted() -> None:
    facts = replace(BARE, kill_signal=signal.SIGKILL)
    override = Override("/etc/x.conf", ("ExecStop=",))
    found = compare(facts, MUTE, check(facts, MUTE), [override])
    assert found.adopted[Occasion.STOP].disks is Patience.TIMED
    assert found.word is UnitVerdict.MANUAL


def test_a_later_drop_in_that_adds_to_the_stop_is_moved_first() -> None:
    facts = replace(BARE, exec_stop=(POWERDOWN,))
    adding = Override("/etc/systemd/system/web.service.d/60-local.conf", ("ExecStop=",), True)
    found = compare(facts, ASKABLE, check(facts, ASKABLE), [adding])
    assert (found.word, found.writes) == (UnitVerdict.MANUAL, False)
    assert "60-local.conf" in found.reason and "50-qkilld.conf" in found.advice
    assert found.adopted == found.now
    replacing = Override("/etc/systemd/system/web.service.d/70-local.conf", ("ExecStop=",))
    found = compare(facts, ASKABLE, check(facts, ASKABLE), [adding, replacing])
    assert "60-local.conf" not in found.reason


def test_adopting_is_never_worse_under_any_assumption() -> None:
    """For every combination of settings, a unit keeps at least as much after adoption as before."""
    stops = [(), (POWERDOWN,), (LOOP,), (UNKNOWN,), (line("kill -9 1"),), (line("kill 1"),),
             (POWERDOWN, UNKNOWN), (line("pkill qemu"), UNKNOWN), (line("sleep 20"),)]  # fmt: skip
    seen = set()
    for exec_stop in stops:
        for mode in ("control-group", "mixed", "process", "none"):
            for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGKILL):
                for limit in (5 * S, 90 * S, INFINITY):
                    for start in (SAFE.exec_start, (SHELL,)):
                        facts = replace(
                            BARE, exec_stop=exec_stop, kill_mode=mode, kill_signal=number,
                            timeout_stop=limit, exec_start=start,
                        )  # fmt: skip
                        for surroundings in (ASKABLE, MUTE, replace(MUTE, can_ask=None)):
                            found = judge(facts, surroundings)
                            seen.add(found.word)
                            assert not (found.writes and found.word is UnitVerdict.NO_BETTER)
                            if found.writes:
                                worse = [
                                    each for each in Occasion
                                    if not found.adopted[each] >= found.now[each]
                                ]  # fmt: skip
                                assert not worse, (facts, surroundings, found)
    assert seen == set(UnitVerdict) - {UnitVerdict.OTHER_UNIT}
