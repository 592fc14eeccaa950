"""qkilld.conf: precedence, syntax, and error messages with file and line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qkilld.adapters.config import _real, load
from qkilld.model.constants import INFINITY
from qkilld.model.errors import ConfigError
from qkilld.model.policy import DEFAULT_EXECUTABLES, Config, Policy, Switches
from tests.lab import needs
from tests.lab.process import run

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


def test_without_files_the_defaults_apply(tmp_path: Path) -> None:
    assert load(tmp_path) == Config()


def test_every_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        ETC,
        "[Policy]\nGraceSec=1\nStallSec=2\nStorageStallSec=3\nMaxSec=4\nReapSec=5\nPowerdownSec=6\n"
        "Powerdown=no\nYank=off\n"
        "[Target]\nExecutables=/opt/qemu/bin/qemu-*\n",
    )
    policy = Policy(
        grace=1 * S, stall=2 * S, storage_stall=3 * S, max=4 * S, reap=5 * S, powerdown=6 * S
    )
    assert load(tmp_path) == Config(
        policy, ("/opt/qemu/bin/qemu-*",), switches=Switches(powerdown=False, yank=False)
    )


@pytest.mark.parametrize(
    ("text", "general", "web"),
    [
        ("", True, True),
        ("[Policy]\nPowerdown=no\n", False, False),
        ("[Guest web]\nPowerdown=FALSE\n", True, False),
        ("[Guest web]\nPowerdown=1\n[Policy]\nPowerdown=0\n", False, True),
        ("[Guest web]\nGraceSec=1\n[Policy]\nPowerdown=n\n", False, False),
        ("[Policy]\nPowerdown=no\nPowerdown=\n", True, True),
        ("[Guest web]\nPowerdown=no\nPowerdown=\n", True, True),
    ],
)
def test_which_guests_are_asked_first(tmp_path: Path, text: str, general: bool, web: bool) -> None:
    write(tmp_path, ETC, text)
    config = load(tmp_path)
    assert (config.asks("web"), config.asks("db"), config.asks("")) == (web, general, general)


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


@pytest.mark.parametrize(
    "target", ["../../../dev/null", "../../../../../../../../../dev/null", "../mask", "/etc/mask"]
)
def test_a_mask_may_be_any_link_that_ends_at_dev_null(tmp_path: Path, target: str) -> None:
    write(tmp_path, LIB + ".d/50-x.conf", grace(7))
    mask = write(tmp_path, ETC + ".d/50-x.conf", "")
    mask.unlink()
    mask.symlink_to(target)
    for name in ("etc/mask", "etc/qkilld/mask"):
        (tmp_path / name).symlink_to("/dev/null")
    assert load(tmp_path) == Config()


def test_a_relative_link_to_the_real_dev_null_masks(tmp_path: Path) -> None:
    """The link is as `ln -sr` makes it. It is read with / as the root, as in the daemon."""
    mask = tmp_path / "50-x.conf"
    mask.symlink_to(os.path.relpath("/dev/null", tmp_path))
    assert _real(mask, Path("/")) == Path("/dev/null")


@pytest.mark.parametrize(
    "links",
    [
        {ETC: "/usr/share/qkilld.conf"},
        {ETC: "../../usr/share/qkilld.conf"},
        {ETC: "/one", "one": "/usr/share/qkilld.conf"},
        {"etc/qkilld": "/usr/share"},
        {"etc": "/elsewhere/etc", "elsewhere/etc/qkilld": "../../../../../../usr/share"},
    ],
)
def test_links_stay_below_the_root(tmp_path: Path, links: dict[str, str]) -> None:
    write(tmp_path, "usr/share/qkilld.conf", grace(8))
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    assert load(tmp_path).policy.grace == 8 * S


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "etc/qkilld").mkdir(parents=True)
    (tmp_path / ETC).symlink_to("qkilld.conf")
    assert complaints(tmp_path) == [f"{ETC}: cannot be read: Too many levels of symbolic links"]


def test_files_are_read_in_the_order_in_which_systemd_reads_them(tmp_path: Path) -> None:
    program = str(needs.program("systemd-analyze", "systemd"))
    names = [RUN, LOCAL, LIB]
    names += [LIB + ".d/" + name for name in ("10-a.conf", "20-b.conf", "20-B.conf", "9.conf")]
    names += [LOCAL + ".d/10-a.conf", RUN + ".d/10-a.conf", RUN + ".d/30-é.conf"]
    names += [ETC + ".d/30-z.conf", ETC + ".d/.hidden.conf", ETC + ".d/30-z.conf~"]
    for name in names:
        write(tmp_path, name, f"[Target]\nExecutables=/{name}\n")
    (tmp_path / ETC).with_name("qkilld.conf.d").joinpath("20-b.conf").symlink_to("/dev/null")
    done = run([program, "cat-config", f"--root={tmp_path}", "qkilld/qkilld.conf"])
    assert done.returncode == 0, done.stderr
    theirs = re.findall(r"^Executables=(.+)$", done.stdout, flags=re.M)
    assert len(theirs) == 6
    assert list(load(tmp_path).executables) == theirs


def test_files_with_other_suffixes_are_not_read(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("text", "grace_s"),
    [
        ("\N{BYTE ORDER MARK}[Policy]\nGraceSec=7\n", 7),
        ("[Policy]\r\nGraceSec=7\r\n", 7),
        ("[Policy]\nX-Path=C:\\\\\nGraceSec=7\n", 7),
        ("[Policy]\nX-Path=C:\\ \nGraceSec=7\n", 7),
        ("[Policy]\nX-Path=C:\\\nGraceSec=7\n", 10),
        ("[Policy]\n# a comment \\\nGraceSec=7\n", 7),
        ("[Policy]\nGraceSec=1min \\\n\nStallSec=9\n", 60),
        ("[Policy]\nGraceSec=7\\", 7),
    ],
)
def test_where_lines_end(tmp_path: Path, text: str, grace_s: int) -> None:
    write(tmp_path, ETC, text)
    assert load(tmp_path).policy.grace == grace_s * S


@pytest.mark.parametrize(
    "glob",
    ["/*", "/**", "/usr/bin/?*", "/usr/bin/[a-z]*", "/usr/bin/[!x]*", "/usr/bin/[]x]", "/"],
)
def test_a_glob_must_name_the_file(tmp_path: Path, glob: str) -> None:
    write(tmp_path, ETC, f"[Target]\nExecutables={glob}\n")
    assert complaints(tmp_path) == [
        f"{ETC}:2: Executables={glob} matches any program; name the file, as in qemu-system-*"
    ]


@pytest.mark.parametrize("glob", ["/opt/*/qemu-[a-z]*", "/opt/[q]emu", "/opt/qemu-?", "/opt/q[emu"])
def test_a_glob_may_have_wildcards_beside_a_name(tmp_path: Path, glob: str) -> None:
    write(tmp_path, ETC, f"[Target]\nExecutables={glob}\n")
    assert load(tmp_path).executables == (glob,)


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
    assert found.policy_for("my db") == Policy(grace=20 * S, stall=9 * S, storage_stall=300 * S)
    assert found.policy_for("web") == Policy(grace=INFINITY, stall=9 * S)
    assert found.policy_for("other") == found.policy_for("") == Policy(grace=20 * S, stall=9 * S)


def test_a_guest_of_unknown_name_may_be_any_of_them(tmp_path: Path) -> None:
    write(tmp_path, ETC, "[Guest db]\nGraceSec=5min\nPowerdown=yes\nYank=no\n")
    write(tmp_path, ETC + ".d/1.conf", "[Guest web]\nStorageStallSec=1h\nGraceSec=1\nMaxSec=2h\n")
    write(tmp_path, ETC + ".d/2.conf", "[Policy]\nStallSec=40\nMaxSec=3h\nPowerdown=no\n")
    found = load(tmp_path)
    unnamed = Policy(grace=300 * S, stall=40 * S, storage_stall=3600 * S, max=10800 * S)
    assert found.policy_for(None) == unnamed
    assert found.policy_for("").grace == Policy().grace
    assert (found.asks(None), found.asks("")) == (True, False)
    assert (found.yanks(None), found.yanks("")) == (False, True)
    assert Config().policy_for(None) == Policy()
    assert Config().asks(None)
    assert Config().yanks(None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Policy]\nGarceSec=1\n", "2: unknown key GarceSec= in [Policy]; did you mean GraceSec=?"),
        (
            "[Policy]\nFoo=1\n",
            "2: unknown key Foo= in [Policy]; known are GraceSec= StallSec= StorageStallSec= "
            "MaxSec= ReapSec= PowerdownSec= Powerdown= Yank=",
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
        ("[Policy]\nPowerdown=maybe\n", '2: Powerdown="maybe" is neither yes nor no'),
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
            "[Target]\nExecutables=//usr/bin/qemu\n",
            '2: Executables=//usr/bin/qemu begins with "//", which never matches',
        ),
        (
            "[Policy]\nGraceSec=20\nMaxSec=10\n",
            "3: MaxSec=10s is less than GraceSec=20s: no SIGKILL can obey both",
        ),
        (
            "[Guest web]\nMaxSec=5\n",
            "2: MaxSec=5s is less than GraceSec=10s: no SIGKILL can obey both",
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
        (
            b"[Policy]\nGraceSec=\xff\n",
            f"{ETC}:2: is not UTF-8 from byte 10 of the line on; write UTF-8 text",
        ),
        (b"# caf\xe9\n", f"{ETC}:1: is not UTF-8 from byte 6 of the line on; write UTF-8 text"),
        (b"[Policy]\0\nFoo=1\n", f"{ETC}:1: has a NUL byte; write UTF-8 text"),
        (b"#" * ((1 << 20) + 1), f"{ETC}: is larger than 1 MiB"),
    ],
)
def test_binary_files_are_refused(tmp_path: Path, raw: bytes, expected: str) -> None:
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


def test_bytes_that_are_no_text_hide_no_other_complaint(tmp_path: Path) -> None:
    write(tmp_path, ETC, b"[Policy]\nGraceSec=\xff\nReapSec=soon\n")
    assert [line.partition(" ")[0] for line in complaints(tmp_path)] == [f"{ETC}:2:", f"{ETC}:3:"]


@pytest.mark.parametrize(
    "text",
    [
        "[Po\x1b[2Jlicy]\n",
        "[Policy]\nFoo\x1b[2J=1\n",
        "[Policy]\nFoo\u2028\n",
        "[Policy]\nGraceSec=\x1b[2J" + "x" * 5000,
        "[Target]\nExecutables=\x1b[2J" + "x" * 5000,
        "[" + "x" * 5000,
    ],
)
def test_a_complaint_is_one_line_and_fit_to_be_shown(tmp_path: Path, text: str) -> None:
    write(tmp_path, ETC, text)
    write(tmp_path, LIB + ".d/a\nb\x1b.conf", "[Nope]\n")
    first, second = complaints(tmp_path)
    assert first.isprintable()
    assert second.isprintable()
    assert len(first) < 1000


def test_a_directory_closed_to_the_reader_is_told(tmp_path: Path) -> None:
    """If the error was ignored, the file of the next directory would be used by mistake."""
    write(tmp_path, LIB, grace(1))
    closed = write(tmp_path, ETC, grace(2)).parent
    closed.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything.
        with pytest.raises(ConfigError) as caught:
            load(tmp_path)
    finally:
        os.seteuid(user)
        closed.chmod(0o755)
    assert f"{tmp_path / ETC}: cannot be read: Permission denied" in str(caught.value).split("\n")


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
