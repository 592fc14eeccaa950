"""The effects of ExecStop= lines on a guest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.model.constants import INFINITY
from qkilld.model.unit import Command
from qkilld.unitcheck.command import helper_arguments, helper_words, is_helper
from qkilld.unitcheck.command_text import helper_arguments_of
from qkilld.unitcheck.shell import MAX_DEPTH, MAX_TEXT, read_shell
from qkilld.unitcheck.stop_act import ActKind
from qkilld.unitcheck.stop_line import StopLine, read_line

HELPER, ASKS, WAITS = ActKind.HELPER, ActKind.ASKS, ActKind.WAITS
SLEEPS, TERMINATES, KILLS = ActKind.SLEEPS, ActKind.TERMINATES, ActKind.KILLS
NOTHING, UNKNOWN = ActKind.NOTHING, ActKind.UNKNOWN
MONITOR = "socat - UNIX-CONNECT:/run/m"


def shell(text: str, **environment: str) -> StopLine:
    return read_line(Command("/bin/sh", ("/bin/sh", "-c", text)), environment)


def program(*words: str) -> StopLine:
    return read_line(Command(f"/usr/bin/{words[0]}", words))


def kinds(line: StopLine) -> list[ActKind]:
    return [each.kind for each in line.acts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Signals, in every spelling.
        ("kill -9 $MAINPID", [KILLS]),
        ("kill -KILL $MAINPID", [KILLS]),
        ("kill -SIGKILL $MAINPID", [KILLS]),
        ("kill -s 9 $MAINPID", [KILLS]),
        ("kill -s KILL $MAINPID", [KILLS]),
        ("kill -sKILL $MAINPID", [KILLS]),
        ("kill -n 9 $MAINPID", [KILLS]),
        ("kill --signal 9 $MAINPID", [KILLS]),
        ("kill --signal=SIGKILL $MAINPID", [KILLS]),
        ("kill -QUIT $MAINPID", [KILLS]),
        ("kill -ABRT $MAINPID", [KILLS]),
        ("kill $MAINPID", [TERMINATES]),
        ("kill -15 $MAINPID", [TERMINATES]),
        ("kill -INT $MAINPID", [TERMINATES]),
        ("kill -CONT $MAINPID", [NOTHING]),
        ("kill -0 $MAINPID", [NOTHING]),
        ("kill -$SIGNAL $MAINPID", [UNKNOWN]),
        ("kill -9 $(/opt/pid-of vm)", [UNKNOWN, KILLS]),
        ("echo $(/opt/stop-vm)", [UNKNOWN]),
        ("echo $(lsof -t disk.img)", [NOTHING]),
        ("kill -9 $(cat /run/vm.pid) 2>/dev/null || true", [KILLS]),
        ("kill -9 `cat /run/vm.pid`", [KILLS]),
        ("sudo -u root nice -n 5 kill -9 1", [KILLS]),
        ("busybox kill -9 1", [KILLS]),
        ("exec env A=b kill -9 1", [KILLS]),
        ("sh -c 'bash -c \"kill -9 1\"'", [KILLS]),
        ("if [ -n \"$MAINPID\" ]; then kill -9 $MAINPID; fi", [KILLS]),
        ("if true; then true; else kill -9 1; fi", [KILLS]),
        ("cat /run/vm.pid | xargs -r kill -9", [KILLS]),
        ("nsenter -t 1 -a kill -9 $MAINPID", [KILLS]),
        ("flock /run/lock kill -9 1", [KILLS]),
        ("ip netns exec web kill -9 1", [KILLS]),
        ("ip link del tap0", [NOTHING]),
        ("trap 'kill -9 1' EXIT; true", [KILLS]),
        ("echo 1 > /sys/fs/cgroup/system.slice/web.service/cgroup.kill", [KILLS]),
        ("echo 1 | tee /sys/fs/cgroup/system.slice/web.service/cgroup.kill", [KILLS]),
        ("echo b > /proc/sysrq-trigger", [KILLS]),
        ("start-stop-daemon --stop --signal KILL --pidfile /run/p", [KILLS]),
        ("start-stop-daemon -K -s 9 -p /run/p", [KILLS]),
        ("start-stop-daemon --stop --retry 5 --pidfile /run/p", [KILLS]),
        ("start-stop-daemon --stop --retry=TERM/5/KILL/5 --pidfile /run/p", [KILLS]),
        ("start-stop-daemon --stop --retry TERM/60 --pidfile /run/p", [TERMINATES, WAITS]),
        ("start-stop-daemon --stop --pidfile /run/p", [TERMINATES]),
        ("start-stop-daemon --start --pidfile /run/p", [UNKNOWN]),
        ("ps ax | awk '/web/ {system(\"kill -9 \" $1)}'", [UNKNOWN]),
        # socat runs programs and reads files.
        ("socat SYSTEM:'kill -9 $MAINPID' STDOUT", [KILLS]),
        ("socat EXEC:'echo system_powerdown' UNIX-CONNECT:/run/m", [ASKS]),
        ("socat UNIX-CONNECT:/run/m SYSTEM:'echo quit; sleep 1',pty", [SLEEPS, TERMINATES]),
        ("socat EXEC:/opt/stop UNIX-CONNECT:/run/m", [UNKNOWN]),
        ("socat SYSTEM:'kill \"' STDOUT", [UNKNOWN]),
        ("socat -u FILE:/etc/stop.txt UNIX-CONNECT:/run/m", [UNKNOWN]),
        ("socat -u OPEN:/dev/null UNIX-CONNECT:/run/m", [NOTHING]),
        # These save a state that the next start may need.
        (f"printf 'savevm a\\nquit\\n' | {MONITOR}", [UNKNOWN]),
        (f"echo 'migrate \"exec:cat > /srv/state\"' | {MONITOR}", [UNKNOWN]),
        ("pkill -9 qemu", [KILLS]),
        ("pkill --signal=KILL -f web", [KILLS]),
        ("killall -s KILL qemu-system-x86_64", [KILLS]),
        ("killall -q qemu-system-x86_64", [TERMINATES]),
        ("fuser -k /srv/vm.qcow2", [KILLS]),
        ("systemctl kill -s KILL web", [KILLS]),
        # Managers.
        ("virsh destroy web", [KILLS]),
        ("virsh -c qemu:///system destroy web", [KILLS]),
        ("virsh destroy web --graceful", [TERMINATES]),
        ("virsh shutdown web", [ASKS]),
        ("docker kill web", [KILLS]),
        ("docker kill --signal TERM web", [TERMINATES]),
        ("docker rm -f web", [KILLS]),
        ("docker rm -vf web", [KILLS]),
        ("podman rm -v -f -i --cidfile=/run/web.cid", [UNKNOWN]),
        ("podman rm -vf web", [UNKNOWN]),
        ("podman rm web", [NOTHING]),
        ("podman kill web", [KILLS]),
        ("docker stop web", [UNKNOWN]),
        ("podman machine stop", [ASKS, WAITS]),
        # Commands that are not known may do anything.
        ("docker container kill web", [KILLS]),
        ("docker container rm -f web", [KILLS]),
        ("docker exec web kill -9 1", [UNKNOWN]),
        ("docker run --pid=host tools kill -9 1", [UNKNOWN]),
        ("podman pod stop web", [UNKNOWN]),
        ("podman pod rm -f web", [UNKNOWN]),
        ("podman kube down web.yaml", [UNKNOWN]),
        ("podman machine rm -f", [UNKNOWN]),
        ("docker network rm web", [NOTHING]),
        ("virsh 'destroy web'", [UNKNOWN]),
        ("virsh pool-destroy images", [UNKNOWN]),
        ("virsh dominfo web", [NOTHING]),
        ("incus delete -f web", [KILLS]),
        ("limactl factory-reset web", [UNKNOWN]),
        ("incus list", [NOTHING]),
        ("qm reset 100", [UNKNOWN]),
        ("qm unlock 100", [NOTHING]),
        ("gnt-instance reboot --type=hard web", [UNKNOWN]),
        ("machinectl shell web /bin/halt", [UNKNOWN]),
        ("systemctl freeze web", [UNKNOWN]),
        ("systemctl try-restart web", [UNKNOWN]),
        ("systemctl disable --now web", [UNKNOWN]),
        ("systemctl disable web", [NOTHING]),
        ("systemctl --no-block start backup@web", [NOTHING]),
        ("systemctl -H web poweroff", [ASKS]),
        ("systemctl poweroff", [UNKNOWN]),
        ("env -S 'kill -9 1'", [UNKNOWN]),
        ("env -iS'kill -9 1'", [UNKNOWN]),
        ("start-stop-daemon -K -sKILL -p /run/p", [KILLS]),
        ("start-stop-daemon -K -R5 -p /run/p", [KILLS]),
        ("awk -f /opt/stop.awk", [UNKNOWN]),
        ("qm shutdown 100", [ASKS, WAITS]),
        ("incus stop web", [ASKS, WAITS]),
        ("incus stop --force web", [KILLS]),
        ("multipass stop web", [ASKS, WAITS]),
        ("gnt-instance shutdown web", [ASKS, WAITS]),
        ("ssh web sudo poweroff", [ASKS]),
        # Monitors.
        (f"echo system_powerdown | {MONITOR}", [ASKS]),
        (f"printf '%s' '{{\"execute\":\"system_powerdown\"}}' | {MONITOR}", [ASKS]),
        (f"(echo system_powerdown; sleep 60) | {MONITOR}", [ASKS, SLEEPS]),
        ("echo quit | nc -N -U /run/m", [TERMINATES]),
        ("socat - UNIX:/run/m <<< system_powerdown", [ASKS]),
        ("echo system_powerdown > /run/fifo", [ASKS]),
        ("screen -S web -X stuff 'system_powerdown\\n'", [ASKS]),
        (f"echo $COMMAND | {MONITOR}", [UNKNOWN]),
        (f"cat /etc/commands | {MONITOR}", [UNKNOWN]),
        # Waiting.
        ("while kill -0 $MAINPID; do sleep 1; done", [WAITS]),
        ("while test -d /proc/$MAINPID; do sleep 1; done", [WAITS]),
        ("until ! kill -0 1 >/dev/null 2>&1; do sleep 1; done", [WAITS]),
        ("while [ -e /run/vm.pid ]; do sleep 0.1; done", [WAITS]),
        ("timeout 60 tail --pid=$MAINPID -f /dev/null || kill -9 1", [WAITS, KILLS]),
        ("virsh shutdown web; sleep 30; virsh destroy web", [ASKS, SLEEPS, KILLS]),
        (f"while test -d /proc/$MAINPID; do echo system_powerdown | {MONITOR}; sleep 60; done",
         [ASKS, WAITS]),
        ("tail --pid=$MAINPID -f /dev/null &", [NOTHING]),
        # An unknown program is never taken for one that does nothing.
        ("/opt/vm-stop web", [UNKNOWN]),
        ("${HALT}", [UNKNOWN]),
        ("eval $HALT", [UNKNOWN]),
        ("case $1 in a) true;; esac", [UNKNOWN]),
        ("stop() { true; }; stop", [UNKNOWN]),
        ("kill -9 '", [UNKNOWN]),
        ("python3 -c 'import os; os.kill(1, 9)'", [UNKNOWN]),
        ("curl -X PUT --unix-socket /run/api http://x/shutdown", [UNKNOWN]),
        ("rm -f /run/x; true", [NOTHING]),
    ],
)  # fmt: skip
def test_a_line_of_shell(text: str, expected: list[ActKind]) -> None:
    assert kinds(shell(text)) == expected


def test_programs_without_a_shell() -> None:
    assert kinds(program("qkilld-stop", "--force")) == [HELPER]
    assert kinds(read_line(Command("/opt/python3", ("/opt/python3", "-m", "qkilld.stop")))) == [
        HELPER
    ]
    # The shell executes qkilld-stop in place of itself.
    assert is_helper(Command("/bin/sh", ("/bin/sh", "-c", "exec qkilld-stop --force")))
    for text in (
        *("qkilld-stop", "exec qkilld-stop; true", "exec qkilld-stop $X", "true", "exec "),
        *("exec\nqkilld-stop", "exec qkilld-stop\n--force", "true\nexec qkilld-stop"),
    ):
        assert not is_helper(Command("/bin/sh", ("/bin/sh", "-c", text))), text
    assert kinds(program("kill", "-n", "9", "$MAINPID")) == [KILLS]
    assert kinds(program("vm-stop")) == [UNKNOWN]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("/usr/bin/python3.13 -m qkilld.stop --force", ["--force"]),
        ("/usr/bin/python3 -Es -S -m qkilld.stop", []),
        ("/usr/bin/python3 -m qkilld.stop -m qkilld.stop", ["-m", "qkilld.stop"]),
        ("/usr/bin/qkilld-stop --reason -m", ["--reason", "-m"]),
        ("/usr/bin/timeout 5 python3 -m qkilld.stop", None),
        ("/bin/echo -m qkilld.stop", None),
        ("/usr/bin/python3 -c -m qkilld.stop", None),
        ("/usr/bin/python3 /opt/x -m qkilld.stop", None),
        ("/usr/bin/python3", None),
        ("/bin/sh -c /usr/bin/python3 -m qkilld.stop", None),
    ],
)
def test_a_line_that_runs_the_helper_directly(words: str, arguments: list[str] | None) -> None:
    """The SIGTERM of timeout(1) would end the helper."""
    command = Command(words.split()[0], tuple(words.split()))
    assert is_helper(command) is (arguments is not None)
    for each in (command, replace(command, arguments=("x", *command.arguments[1:]))):
        if arguments is not None:
            assert list(helper_words(each)) == arguments
            assert helper_arguments_of(words).split() == arguments
    assert not is_helper(Command("/bin/echo", ("python3", "-m", "qkilld.stop")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--pid=$MAINPID", "--pid=${MAINPID}"),
        ("--pid=$$MAINPID", "--pid=${MAINPID}"),
        ("--pidfile /run/$MAINPID.pid", "--pidfile /run/${MAINPID}.pid"),
        ("--pidfile $MAINPID$MAINPID", "--pidfile ${MAINPID}${MAINPID}"),
        ("--pid ${MAINPID} --force", "--pid ${MAINPID} --force"),
        ("--pid $MAINPID", "--pid $MAINPID"),
        ("--pid $MAINPID --force", "--pid $MAINPID --force"),
    ],
)
def test_the_words_of_a_shell_become_words_for_systemd(text: str, words: str) -> None:
    """Unlike a shell, systemd expands $MAINPID only if it is a whole word."""
    command = Command("/bin/sh", ("sh", "-c", f"exec qkilld-stop {text}"))
    assert helper_arguments(command) == words
    assert helper_arguments_of(f"/bin/sh -c 'exec qkilld-stop {text}'") == words


def test_the_environment_of_the_unit() -> None:
    command = Command("/bin/sh", ("/bin/sh", "-c", "${haltcmd}"))
    assert kinds(read_line(command)) == [UNKNOWN]
    halt = {"haltcmd": "echo system_powerdown | nc localhost 7101"}
    assert kinds(read_line(command, halt)) == [ASKS]
    raw = Command("/bin/sh", ("/bin/sh", "-c", "${haltcmd}"), flags=("no-env-expand",))
    assert kinds(read_line(raw, halt)) == [UNKNOWN]
    words = Command("/bin/kill", ("/bin/kill", "$SIGNAL", "$MAINPID"))
    assert kinds(read_line(words, {"SIGNAL": "-s KILL"})) == [KILLS]


def test_how_long_it_waits() -> None:
    (act,) = shell("for i in $(seq 60); do kill -0 1 || exit 0; sleep 1; done").acts
    assert (act.kind, act.usec) == (WAITS, 60_000_000)
    (act,) = shell("while kill -0 1; do sleep 1; done").acts
    assert act.usec == INFINITY
    (act,) = shell("timeout 5 sleep 60").acts
    assert (act.kind, act.usec) == (SLEEPS, 5_000_000)


def test_other_properties_of_a_line() -> None:
    assert shell("pkill -9 qemu").is_by_name
    assert not shell("kill -9 1").is_by_name
    assert shell("read line; echo quit").reads
    assert shell("cat > /run/m").reads
    assert program("socat", "STDIO", "unix:/run/m").reads
    assert not shell("echo x | cat").reads


@pytest.mark.parametrize(
    "text",
    ["(" * (MAX_DEPTH + 2), "a" * (MAX_TEXT + 1), "'", '"', "`", "$(", "a >", "if x; then y", "|"],
)
def test_unsupported_shell_syntax_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_shell(text)
