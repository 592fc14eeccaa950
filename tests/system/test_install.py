"""`make install` and `make uninstall`, in the container and in a DESTDIR."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qkilld.unitcheck.dropin import Change, text_of
from qkilld.unitcheck.finding import Line
from tests.lab import bus, guest, needs
from tests.lab.process import TOP, run

PYTHON = "/usr/bin/python3"
"""Debian's own Python, with Debian's packages."""
PROGRAMS = ("qkilld", "qkillctl")


def make(action: str, *variables: str, check: bool = True) -> str:
    done = subprocess.run(
        ["make", action, *variables], cwd=TOP, capture_output=True, text=True, timeout=60
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout if check else done.stderr


def tree(root: Path) -> dict[str, str]:
    """Return the type and the content of each file below `root`."""
    return {
        str(path.relative_to(root)): (
            f"-> {path.readlink()}"
            if path.is_symlink()
            else f"{path.stat().st_mode:o} "
            + ("" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest())
        )
        for path in root.rglob("*")
    }


def test_uninstall_removes_only_installed_files(lab_dir: Path) -> None:
    kept = {
        "etc/qkilld/qkilld.conf": "[Policy]\n",
        "usr/lib/qkilld/qkilld.conf.d/50-vendor.conf": "[Policy]\n",
        "usr/lib/systemd/system/other.service": "[Unit]\n",
    }
    for path, text in kept.items():
        (lab_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (lab_dir / path).write_text(text)
    wants = lab_dir / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "other.service").symlink_to("/usr/lib/systemd/system/other.service")
    before = tree(lab_dir)
    destination = f"DESTDIR={lab_dir}"
    assert "daemon-reload" not in make("install", destination)
    installed = tree(lab_dir)
    assert all(installed[path] == before[path] for path in before)
    for path in (
        *(f"usr/bin/{name}" for name in PROGRAMS),
        "usr/lib/qkilld/qkilld.conf",
        "usr/lib/qkilld/python/qkilld/interfaces/org.qkilld1.Manager.xml",
        "usr/lib/sysusers.d/qkilld.conf",
        "usr/lib/systemd/system/qkilld.service",
        "usr/lib/systemd/catalog/qkilld.catalog",
        "usr/share/dbus-1/system.d/org.qkilld1.conf",
        "usr/share/man/man8/qkilld.8",
        "usr/share/doc/qkilld/dbus/README.md",
        "usr/share/doc/qkilld/dbus/org.qkilld1.varlink",
        "usr/share/doc/qkilld/dbus/examples/guests.png",
        "usr/share/doc/qkilld/dbus/examples/stop.py",
        "usr/share/bash-completion/completions/qkillctl",
        "usr/share/fish/vendor_completions.d/qkillctl.fish",
        "usr/lib/qkilld/complete",
    ):
        assert path in installed, path
    # Install again, as for an upgrade that removes a module. The result is identical.
    manifest = lab_dir / "usr/lib/qkilld/installed-files"
    gone = "usr/lib/qkilld/python/qkilld/of_an_older_version.py"
    (lab_dir / gone).touch()
    manifest.write_text(manifest.read_text() + f"/{gone}\n")
    make("install", destination)
    assert tree(lab_dir) == installed
    # Uninstalling also removes files that systemctl enable and another interpreter have made.
    (wants / "qkilld.service").symlink_to("/usr/lib/systemd/system/qkilld.service")
    (lab_dir / "usr/lib/qkilld/python/qkilld/__pycache__/x.cpython-399.pyc").touch()
    make("uninstall", destination)
    assert tree(lab_dir) == before
    assert "not installed" in make("uninstall", destination)


def test_other_places(lab_dir: Path) -> None:
    variables = (
        f"DESTDIR={lab_dir}",
        "PREFIX=/opt/q",
        "UNITDIR=/etc/systemd/system",
        "POLKITDIR=/opt/q/actions",
        f"PYTHON={PYTHON}",
    )
    make("install", *variables)
    script = (lab_dir / "opt/q/bin/qkilld").read_text()
    assert script.startswith("#!/usr/bin/python3 -I\n")
    unit = (lab_dir / "etc/systemd/system/qkilld.service").read_text()
    assert "ExecStart=/opt/q/bin/qkilld" in unit
    assert "/usr/bin/qkill" not in unit
    pages = lab_dir / "opt/q/share/man/man8"
    for name, place in (
        ("qkilld-stop.8", "ExecStop=/opt/q/bin/qkilld-stop\n"),
        ("qemu-guest@.service.8", " /opt/q/share/doc/qkilld/guest-example.conf\n"),
    ):
        # troff writes a hyphen that is not to be broken as \-.
        assert place in (pages / name).read_text().replace("\\-", "-"), name
    for page in lab_dir.glob("opt/q/share/man/man*/*"):
        assert not re.search(r"/usr/(bin/qk|share/doc)", page.read_text()), page.name
    completion = lab_dir / "opt/q/share/zsh/site-functions/_qkillctl"
    assert "$(/opt/q/lib/qkilld/complete $kind" in completion.read_text()
    # The bus reads policies only from this directory.
    assert (lab_dir / "usr/share/dbus-1/system.d/org.qkilld1.conf").exists()
    make("uninstall", *variables)
    assert tree(lab_dir) == {}


def test_a_package_leaves_to_its_system_what_is_its_own(lab_dir: Path) -> None:
    """With PACKAGE=yes, `make install` leaves byte code, the list of installed files and the
    licence to the package manager."""
    make("install", f"DESTDIR={lab_dir}", "PACKAGE=yes")
    names = [path.name for path in lab_dir.rglob("*")]
    assert "qkillctl" in names and "qkilld.conf.5" in names
    assert not {"__pycache__", "installed-files", "LICENSE"} & set(names)


def test_the_removal_takes_back_what_adopt_has_written(lab_dir: Path) -> None:
    """Files that somebody else has written or edited are kept."""
    change = Change("it is cut off", (Line("Service", "ExecStop=/usr/bin/qkilld-stop"),))
    text = text_of("x.service", "qkillctl adopt --undo x", "1.0.0", [change])
    files = {
        "etc/systemd/system/a.service.d/50-qkilld.conf": text,
        "run/systemd/system/b@.service.d/50-qkilld.conf": text,
        "etc/systemd/system/edited.service.d/50-qkilld.conf": text + "Nice=1\n",
        "etc/systemd/system/other.service.d/50-qkilld.conf": "[Service]\nNice=1\n",
    }
    for path, content in files.items():
        (lab_dir / path).parent.mkdir(parents=True)
        (lab_dir / path).write_text(content)
    undo = [sys.executable, "-m", "qkilld.ctl.undo_adopt", "--root", str(lab_dir)]
    done = run(undo, env={"PYTHONPATH": str(TOP)})
    assert done.returncode == 1
    assert done.stdout.count("Removed") == 2
    assert "edited.service.d/50-qkilld.conf was edited" in done.stderr
    assert "other.service" not in done.stdout + done.stderr
    assert [(lab_dir / path).exists() for path in files] == [False, False, True, True]
    make("install", f"DESTDIR={lab_dir}")
    (lab_dir / "etc/systemd/system/a.service.d").mkdir()
    (lab_dir / "etc/systemd/system/a.service.d/50-qkilld.conf").write_text(text)
    make("uninstall", f"DESTDIR={lab_dir}")
    assert not (lab_dir / "etc/systemd/system/a.service.d").exists()


@pytest.mark.parametrize(("code", "calls"), [(0, [""]), (1, [""]), (4, ["", "--now"])])
def test_pacman_removes_the_package_during_a_stop(
    lab_dir: Path, code: int, calls: list[str]
) -> None:
    """The package cannot refuse its removal, so no drop-in may remain."""
    log = lab_dir / "calls"
    undo = f'#!/bin/sh\necho "$*" >>{log}\n[ "$1" = --now ] || exit {code}\n'
    for name, text in (("undo-adopt", undo), ("systemctl", "#!/bin/sh\n")):
        (lab_dir / name).write_text(text)
        (lab_dir / name).chmod(0o755)
    script = (TOP / "packaging/arch/qkilld.install").read_text()
    script = script.replace("/usr/lib/qkilld/", f"{lab_dir}/")
    run(["sh", "-c", f"{script}\npre_remove"], env={"PATH": f"{lab_dir}:/usr/bin:/bin"})
    assert log.read_text().split("\n")[:-1] == calls


@pytest.mark.parametrize("package", ["rpm", "arch"])
def test_a_removed_package_leaves_no_enabled_unit(lab_dir: Path, package: str) -> None:
    """If a unit stayed enabled, a later installation would stop guests at once. The removal does
    not stop guests, either."""
    units = lab_dir / "usr/lib/systemd"
    for place in ("system", "user"):
        (units / place).mkdir(parents=True)
        source = TOP / "units" / ("user" if place == "user" else "")
        for name in ("qkilld-guests.service", *["qemu-guest@.service"][: place == "system"]):
            shutil.copy(source / name, units / place / name)
    systemctl = ("systemctl", f"--root={lab_dir}")
    run([*systemctl, "enable", "qkilld-guests.service", "qemu-guest@web.service"])
    run([*systemctl, "--global", "enable", "qkilld-guests.service"])
    links = {path.name for path in lab_dir.rglob("*.wants/*")}
    assert links == {"qkilld-guests.service", "qemu-guest@web.service"}
    fake = 'case "$*" in\n*--now* | *guest*stop* | *stop*guest*) exit 1 ;;\n'
    fake += f'*disable*) exec {shutil.which("systemctl")} --root={lab_dir} "$@" ;;\nesac\n'
    for name, text in (("systemctl", fake), ("undo-adopt", "")):
        (lab_dir / name).write_text(f"#!/bin/sh\n{text}")
        (lab_dir / name).chmod(0o755)
    if package == "rpm":
        script = (TOP / "packaging/rpm/qkilld.spec").read_text()
        script = script.partition("%preun\n")[2].partition("%postun")[0]
        script = script.replace("%{_unitdir}", str(TOP / "units"))
        script = script.replace("%{_prefix}/lib/qkilld", str(lab_dir))
    else:
        script = (TOP / "packaging/arch/qkilld.install").read_text() + "\npre_remove\n"
        script = script.replace("/usr/lib/qkilld", str(lab_dir))
    path = f"{lab_dir}:/usr/bin:/bin"
    if package == "rpm":
        run(["sh", "-ec", script, "preun", "1"], env={"PATH": path})
        assert {path.name for path in lab_dir.rglob("*.wants/*")} == links
    run(["sh", "-ec", script, "preun", "0"], env={"PATH": path})
    assert not list(lab_dir.rglob("*.wants/*"))


@pytest.mark.parametrize("variable", ["PREFIX=usr", "BINDIR=/usr/b in", "PYTHON=python3"])
def test_a_wrong_place_is_refused(lab_dir: Path, variable: str) -> None:
    said = make("install", f"DESTDIR={lab_dir}", variable, check=False)
    assert "is not an absolute path of plain characters" in said
    assert tree(lab_dir) == {}


@pytest.fixture
def on_debian(lab_dir: Path) -> Iterator[Path]:
    """A prefix on this machine into which everything is installed, for Debian's own Python."""
    places = ("UNITDIR", "USERUNITDIR", "CATALOGDIR", "DBUSDATADIR", "POLKITDIR")
    variables = (f"PREFIX={lab_dir}", *(f"{place}={lab_dir}/{place.lower()}" for place in places))
    said = make("install", f"PYTHON={PYTHON}", *variables)
    if "apt-get install" in said:
        raise needs.Missing(said.splitlines()[0])
    assert "systemctl daemon-reload; journalctl --update-catalog" in said
    yield lab_dir
    make("uninstall", *variables)
    assert tree(lab_dir) == {}


def test_qkilld_runs_with_the_packages_of_debian(
    on_debian: Path, private_bus: bus.Bus, qemu: Callable[..., guest.Guest]
) -> None:
    target = qemu(name="web")
    with bus.daemon(private_bus, program=[on_debian / "bin/qkilld"]):
        ctl = str(on_debian / "bin/qkillctl")
        stop = ("--json", "terminate", "--wait", str(target.pid))
        done = run([ctl, "--bus", private_bus.address, *stop])
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)[0]["result"] == "exited"
