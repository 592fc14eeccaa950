"""Who is a QEMU, who may stop it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.judgement.target import check_caller, check_qemu, check_same, is_qemu
from qkilld.model.errors import AccessDenied, NotQemu, ProcessChanged
from qkilld.model.guest import Identity
from qkilld.model.policy import DEFAULT_EXECUTABLES

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
    ("uid", "allowed"), [(0, True), (1000, True), (1001, False), (65534, False)]
)
def test_callers(uid: int, allowed: bool) -> None:
    if allowed:
        check_caller(uid, QEMU)
        return
    with pytest.raises(AccessDenied) as caught:
        check_caller(uid, QEMU)
    # Who may not touch it does not learn what it is.
    assert "qemu" not in str(caught.value).lower()
