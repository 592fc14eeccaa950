"""qkilld.conf: precedence, syntax, and every complaint with its file and line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qkilld.adapters.config import load
from qkilld.model.errors import ConfigError
from qkilld.model.policy import DEFAULT_EXECUTABLES, Config, Policy
from qkilld.model.words import INFINITY

S = 1_000_000
ETC, RUN = "etc/qkilld/qkilld.conf", "run/qkilld/qkilld.conf"
LOCAL, LIB = "usr/local/lib/qkilld/qkilld.conf", "usr/lib/qkilld/qkilld.conf"
SHIPPED = Path(__file__).parents[2] / "packaging/qkilld.conf"


def write(root: Path, name: str, text: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def grace(seconds: int) -> str:
    return f"[Policy]\nGraceSec={seconds}\n"


def complaints(root: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(root)
    return str(caught.value).replace(f"{root}/", "").split("\n")


def test_nothing_there_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path) == Config()


def test_every_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        ETC,
        "[Policy]\nGraceSec=1\nStallSec=2\nStorageStallSec=3\nMaxSec=4\nReapSec=5\nPowerdownSec=6\n"
        "[Target]\nExecutables=/opt/qemu/bin/qemu-*\n",
    )
    policy = Policy(1 * S, 2 * S, 3 * S, 4 * S, 5 * S, 6 * S)
    assert load(tmp_path) == Config(policy, ("/opt/qemu/bin/qemu-*",))


def test_only_the_highest_main_file_counts(tmp_path: Path) -> None:
    for number, name in enumerate((LIB, LOCAL, RUN, ETC), 1):
        write(tmp_path, name, grace(number))
        assert load(tmp_path).policy.grace == number * S
    write(tmp_path, ETC, "")
    assert load(tmp_path) == Config()


def test_drop_ins_lie_over_the_main_file_by_name_whatever_their_directory(tmp_path: Path) -> None:
    write(tmp_path, ETC, grace(1) + "StallSec=1\n")
    write(tmp_path, LIB + ".d/50-a.conf", grace(2))
    assert load(tmp_path).policy == Policy(grace=2 * S, stall=1 * S)
    write(tmp_path, ETC + ".d/10-b.conf", grace(3))
    assert load(tmp_path).policy.grace == 2 * S
    write(tmp_path, RUN + ".d/60-c.conf", grace(4))
    assert load(tmp_path).policy.grace == 4 * S


def test_of_equal_names_the_highest_directory_counts(tmp_path: Path) -> None:
    for number, name in enumerate((LIB, LOCAL, RUN, ETC), 1):
        write(tmp_path, name + ".d/50-x.conf", grace(number))
        assert load(tmp_path).policy.grace == number * S


@pytest.mark.parametrize("how", ["empty", "null"])
def test_a_drop_in_can_be_masked(tmp_path: Path, how: str) -> None:
    write(tmp_path, LIB + ".d/50-x.conf", grace(7))
    mask = write(tmp_path, ETC + ".d/50-x.conf", "")
    if how == "null":
        mask.unlink()
        mask.symlink_to("/dev/null")
    assert load(tmp_path) == Config()


def test_links_stay_below_the_root(tmp_path: Path) -> None:
    write(tmp_path, "usr/share/mine.conf", grace(8))
    (tmp_path / "etc/qkilld").mkdir(parents=True)
    (tmp_path / ETC).symlink_to("/usr/share/mine.conf")
    assert load(tmp_path).policy.grace == 8 * S


def test_what_is_no_drop_in_is_left_alone(tmp_path: Path) -> None:
    for name in ("README", "50-x.conf.bak", ".hidden.conf", "50-x.conf~"):
        write(tmp_path, ETC + ".d/" + name, "nonsense")
    assert load(tmp_path) == Config()


def test_syntax(tmp_path: Path) -> None:
    write(
        tmp_path,
        ETC,
        "# comment\n; comment\n\n  [Policy]  \n"
        "  GraceSec =  1min \\\n# a comment in between\n   30s\n"
        "StallSec=5\nStallSec=\n"
        "X-Mine=anything\nReapSec=1\nReapSec=2\n"
        "[X-Section]\nAnything=goes\n"
        "[Target]\nExecutables=/a/qemu-* /b/qemu-*\nExecutables=/c/qemu-*\n",
    )
    found = load(tmp_path)
    assert found.policy == Policy(grace=90 * S, reap=2 * S)
    assert found.executables == ("/a/qemu-*", "/b/qemu-*", "/c/qemu-*")


def test_an_empty_assignment_takes_a_list_back(tmp_path: Path) -> None:
    write(tmp_path, ETC, "[Target]\nExecutables=/a/qemu\n")
    write(tmp_path, ETC + ".d/1.conf", "[Target]\nExecutables=\nExecutables=/b/qemu\n")
    assert load(tmp_path).executables == ("/b/qemu",)
    write(tmp_path, ETC + ".d/2.conf", "[Target]\nExecutables=\n")
    assert load(tmp_path).executables == DEFAULT_EXECUTABLES


def test_guests_lie_over_the_policy_whatever_the_order(tmp_path: Path) -> None:
    write(tmp_path, ETC, "[Guest my db]\nStorageStallSec=5min\n[Policy]\nGraceSec=20\n")
    write(tmp_path, ETC + ".d/9.conf", "[Policy]\nStallSec=9\n[Guest  web ]\nGraceSec=infinity\n")
    found = load(tmp_path)
    assert found.policy_for("my db") == Policy(20 * S, 9 * S, 300 * S)
    assert found.policy_for("web") == Policy(INFINITY, 9 * S)
    assert found.policy_for("other") == found.policy_for("") == Policy(20 * S, 9 * S)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Policy]\nGarceSec=1\n", "2: unknown key GarceSec= in [Policy]; did you mean GraceSec=?"),
        (
            "[Policy]\nFoo=1\n",
            "2: unknown key Foo= in [Policy]; known are GraceSec= StallSec= StorageStallSec= "
            "MaxSec= ReapSec= PowerdownSec=",
        ),
        (
            "[Target]\nGraceSec=1\n",
            "2: unknown key GraceSec= in [Target]; known are Executables=",
        ),
        (
            "\n[Polcy]\nGraceSec=1\n",
            "2: unknown section [Polcy]; known are [Policy], [Target], [Guest NAME]",
        ),
        ("[Guest]\n", "1: [Guest] lacks the guest's name: [Guest NAME]"),
        ("[Policy\nGraceSec=1\n", '1: "[Policy" lacks its "]"'),
        ("GraceSec=1\n", "1: GraceSec= stands before any [Section]"),
        ("[Policy]\nGraceSec\n", '2: "GraceSec" is not Key=Value, nor a [Section]'),
        (
            "[Policy]\nGraceSec=soon\n",
            '2: GraceSec="soon" is not a time span; write 10, 1.5s, "2min 30s" or infinity',
        ),
        ("[Policy]\nGraceSec=600000y\n", '2: GraceSec="600000y" is too long a time span'),
        (
            "[Target]\nExecutables=bin/qemu\n",
            "2: Executables=bin/qemu is not an absolute path",
        ),
        (
            "[Target]\nExecutables=/usr/bin/*\n",
            "2: Executables=/usr/bin/* matches any program; name the file, as in qemu-system-*",
        ),
        (
            "[Target]\nExecutables=/usr/../bin/qemu\n",
            '2: Executables=/usr/../bin/qemu has a "..", which never matches',
        ),
        (
            "[Policy]\nGraceSec=20\nMaxSec=10\n",
            "3: MaxSec=10s is less than GraceSec=20s: no SIGKILL can keep both",
        ),
        (
            "[Guest web]\nMaxSec=5\n",
            "2: MaxSec=5s is less than GraceSec=10s: no SIGKILL can keep both",
        ),
        ("[Policy]\n\\\nFoo=\\\n1\n", "2: unknown key Foo= in [Policy]; known are "),
    ],
)
def test_complaints(tmp_path: Path, text: str, expected: str) -> None:
    write(tmp_path, ETC, text)
    (complaint,) = complaints(tmp_path)
    assert complaint.startswith(f"{ETC}:{expected}")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"[Policy]\n\xff\n", f"{ETC}: line 2 is not UTF-8"),
        (b"[Policy]\0\n", f"{ETC}: has a NUL byte"),
        (b"#" * ((1 << 20) + 1), f"{ETC}: is larger than 1 MiB"),
    ],
)
def test_what_is_no_text(tmp_path: Path, raw: bytes, expected: str) -> None:
    write(tmp_path, ETC, raw)
    assert complaints(tmp_path) == [expected]


def test_all_that_is_wrong_in_all_files_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, ETC, "[Policy]\nGraceSec=soon\nFoo=1\n")
    write(tmp_path, LIB + ".d/1.conf", "[Nope]\n")
    found = complaints(tmp_path)
    assert [line.partition(" ")[0] for line in found] == [
        f"{ETC}:2:",
        f"{ETC}:3:",
        f"{LIB}.d/1.conf:1:",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / ETC).mkdir(parents=True)
    (tmp_path / (LIB + ".d")).mkdir(parents=True)
    os.mkfifo(tmp_path / (LIB + ".d") / "1.conf")
    (tmp_path / (LIB + ".d") / "2.conf").symlink_to("nowhere")
    assert complaints(tmp_path) == [
        f"{ETC}: is not a regular file",
        f"{LIB}.d/1.conf: is not a regular file",
        f"{LIB}.d/2.conf: cannot be read: No such file or directory",
    ]


def test_the_shipped_file_shows_the_defaults(tmp_path: Path) -> None:
    text = SHIPPED.read_text()
    write(tmp_path, LIB, text)
    assert load(tmp_path) == Config()
    uncommented = re.sub(r"^#(?=\w+=)", "", text, flags=re.M)
    assert uncommented.count("Sec=") == text.count("Sec=")
    write(tmp_path, LIB, uncommented)
    assert load(tmp_path) == Config()
    assert sum(line.endswith("infinity") or "=" in line for line in uncommented.split("\n")) >= 8
