"""Which process is a QEMU, and who may stop it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.engine.checks import (
    action_for,
    check_answer,
    check_free,
    check_qemu,
    check_same,
    details_of,
    details_of_all,
    is_free,
)
from qkilld.model.access import Answer, PolkitAction
from qkilld.model.constants import Flag
from qkilld.model.errors import (
    AccessDenied,
    InteractiveAuthorizationRequired,
    NotQemu,
    ProcessChanged,
)
from qkilld.model.guest import Guest, Identity, Label, Unit
from qkilld.model.policy import DEFAULT_EXECUTABLES, is_qemu

QEMU = Identity(
    pid=4711,
    start_time=99,
    uid=1000,
    command="qemu-system-x86",
    state="S",
    executable="/usr/bin/qemu-system-x86_64",
    executable_deleted=False,
)
OWN_PID = 42


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/bin/qemu-system-x86_64", True),
        ("/usr/bin/qemu-system-aarch64", True),
        ("/usr/local/bin/qemu-system-x86_64", True),
        ("/usr/bin/kvm", True),
        ("/usr/libexec/qemu-kvm", True),
        ("/nix/store/abc-qemu-9.0/bin/qemu-system-x86_64", True),
        ("/nix/store/abc-qemu-9.0/bin/.qemu-system-x86_64-wrapped", True),
        ("/nix/store/abc-qemu-9.0/bin/qemu-kvm", True),
        ("/gnu/store/abc-qemu-9.0/bin/qemu-system-x86_64", True),
        ("/gnu/store/abc-qemu-9.0/bin/.qemu-system-x86_64-real", True),
        ("/opt/qemu-dstack/bin/qemu-system-x86_64", True),
        ("/snap/lxd/17320/bin/qemu-system-x86_64", True),
        ("/snap/multipass/1/usr/bin/qemu-system-x86_64", True),
        ("/usr/lib/xen-4.17/bin/qemu-system-i386", True),
        ("/home/linuxbrew/.linuxbrew/Cellar/qemu/8.0/bin/qemu-system-x86_64", False),
        ("/app/bin/qemu-system-x86_64", False),
        ("/tmp/.mount_qemu/usr/bin/qemu-system-x86_64", False),
        ("/usr/bin/qemu-img", False),
        ("/usr/bin/qemu-system-x86_64/evil", False),
        ("/usr/bin/qemu-system-x/../../../bin/sh", False),
        ("/home/me/usr/bin/qemu-system-x86_64", False),
        ("usr/bin/qemu-system-x86_64", False),
        ("/nix/store/a/b/bin/qemu-system-x86_64", False),
        ("/usr/sbin/sshd", False),
        ("/usr/bin/QEMU-SYSTEM-x86_64", False),
        ("/", False),
        ("", False),
    ],
)
def test_default_executables(path: str, expected: bool) -> None:
    assert is_qemu(path, DEFAULT_EXECUTABLES) is expected


def test_a_replaced_executable_is_still_a_qemu() -> None:
    check_qemu(replace(QEMU, executable_deleted=True), DEFAULT_EXECUTABLES, OWN_PID)


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (replace(QEMU, pid=1), "init"),
        (replace(QEMU, pid=OWN_PID), "qkilld itself"),
        (replace(QEMU, executable="", command="kthreadd"), "kthreadd"),
        (replace(QEMU, executable="/usr/sbin/sshd", command="sshd"), "sshd"),
    ],
)
def test_not_qemu(identity: Identity, text: str) -> None:
    with pytest.raises(NotQemu, match=text) as caught:
        check_qemu(identity, DEFAULT_EXECUTABLES, OWN_PID)
    assert "/" not in str(caught.value)


def test_another_process_by_now() -> None:
    check_same(QEMU, 99)
    with pytest.raises(ProcessChanged, match="4711"):
        check_same(QEMU, 98)


@pytest.mark.parametrize(
    ("uid", "expected"), [(0, True), (1000, True), (1001, False), (65534, False)]
)
def test_root_and_the_owner_need_no_permission(uid: int, expected: bool) -> None:
    assert is_free(uid, QEMU) is expected


@pytest.mark.parametrize(
    ("answer", "error"),
    [(Answer.DENIED, AccessDenied), (Answer.CHALLENGE, InteractiveAuthorizationRequired)],
)
def test_a_denial_tells_nothing(answer: Answer, error: type[AccessDenied]) -> None:
    with pytest.raises(error) as caught:
        check_answer(answer, "Process 4711 is")
    assert "qemu" not in str(caught.value).lower()
    check_answer(Answer.GRANTED, "Process 4711 is")


def test_sigkill_needs_an_action_of_its_own() -> None:
    assert action_for(Flag(0)) is action_for(Flag.NOWAIT) is PolkitAction.TERMINATE
    assert action_for(Flag.FORCE) is action_for(Flag.FORCE | Flag.FIXED) is PolkitAction.FORCE


def test_another_user_by_now() -> None:
    changed = replace(QEMU, uid=0)
    check_free(0, QEMU, changed)
    for uid in (1000, 1001):
        check_free(uid, QEMU, QEMU)
        with pytest.raises(ProcessChanged, match="4711"):
            check_free(uid, QEMU, changed)


def test_dialogs_get_no_markup() -> None:
    name = 'web</b>" of root\n$(pid)' + "x" * 100
    details = details_of(Guest(QEMU, Label(name, unit=Unit("a\\x2db.service"))), Flag.FORCE)
    for value in details.values():
        assert value.isprintable()
        assert not set(value) & set("<>&$\"'\\")
    assert len(details["guest"]) == 64
    assert details["target"].startswith("the QEMU guest web")
    assert details["target"].endswith("(process 4711)")
    assert (details["uid"], details["flags"]) == ("1000", "1")
    assert details.keys() == details_of_all(Flag.FORCE).keys()
    assert details_of(Guest(QEMU, Label()), Flag(0))["target"] == "the QEMU process 4711"
