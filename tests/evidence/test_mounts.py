"""mountinfo and mountstats."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qkilld.adapters.procfs import Filesystem, Mounts
from qkilld.evidence import mounts as mounts_module
from qkilld.evidence.mounts import MountStatistics
from qkilld.model.sample import Mount
from tests.evidence.trees import lay

MOUNTINFO = """\
1 0 0:1 / / rw - rootfs none rw
20 1 8:1 / / rw shared:1 - ext4 /dev/root rw
30 20 0:30 / /srv rw shared:1 master:2 - nfs4 server:/a\\040b rw,vers=4.2
31 30 0:31 / /srv/deep rw - tmpfs tmpfs rw
40 20 8:2 / /data/old rw - ext4 /dev/sdb rw
41 20 8:3 / /data rw - xfs /dev/sdc rw
50 20 8:4 / /twice rw - ext4 /dev/sdd rw
51 50 8:5 / /twice rw - ext4 /dev/sde rw
60 20 8:6 / /with\\040space rw - ext4 /dev/sdf rw
garbage
61 20
"""


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("/", "8:1"),
        ("/srvx", "8:1"),
        ("/srv", "0:30"),
        ("/srv/x", "0:30"),
        ("/srv/deep/x", "0:31"),
        ("/data/old/x", "8:3"),  # Another mount covers /data.
        ("/twice/x", "8:5"),
        ("/with space/x", "8:6"),
    ],
)
def test_the_file_system_of_a_path(tmp_path: Path, path: str, number: str) -> None:
    mounts = Mounts(7, lay(tmp_path, {"7/mountinfo": MOUNTINFO}))
    found = mounts.of_path(path.encode())
    assert found is not None
    assert found.number == number


def test_paths_of_no_file_system(tmp_path: Path) -> None:
    mounts = Mounts(7, lay(tmp_path, {"7/mountinfo": MOUNTINFO}))
    assert mounts.of_path(b"relative") is None
    assert mounts.get(61) is None
    assert mounts.get(99) is None
    assert Mounts(8, tmp_path).of_path(b"/") is None


@pytest.mark.parametrize("path", ["/", "/proc/self", "/dev/null", "/dev/shm", "/sys/kernel"])
def test_the_kernel_agrees(path: str) -> None:
    found = Mounts("self").of_path(path.encode())
    assert found is not None
    device = Path(path).stat().st_dev
    if found.kind != "btrfs":  # Its files have their own numbers.
        assert found.number == f"{os.major(device)}:{os.minor(device)}"
    assert Mounts("self").get(found.id) == found


# As nfs_show_stats and rpc_clnt_show_stats of Linux 6.1 print them.
NFS = """\
device server:/a\\040b mounted on /srv with fstype nfs4 statvers=1.1
\topts:\trw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,local_lock=none
\tage:\t9021
\timpl_id:\tname='',domain='',date='0,0'
\tcaps:\tcaps=0x3ffbffdf,wtmult=512,dtsize=1048576,bsize=0,namlen=255
\tnfsv4:\tbm0=0xf8f3b77e,bm1=0x40b0be3a,bm2=0x60803,acl=0x3,sessions,pnfs=not configured
\tsec:\tflavor=1,pseudoflavor=1
\tevents:\t3 41 0 12 1 3 55 10 0 4 0 2 0 9 1 0 0 0 1 0 0 4 0 0 0 0 0
\tbytes:\t1000 2000 4096 8192 5096 67108864 12 16384
\tRPC iostats version: 1.1  p/v: 100003/4 (nfs)
\txprt:\ttcp 897 1 2 0 3 120 120 0 121 0 2 30 60
\tper-op statistics
\t        NULL: 1 1 0 44 24 0 0 0 0
\t        READ: 30 30 0 6600 1048576 1 20 22 0
\t       WRITE: 64 65 1 67200000 9000 5 900 910 4
\t      COMMIT: 3 3 0 700 300 0 10 10 0
\t TEST_STATEID: 0 0 0 0 0 0 0 0 0

"""
BEFORE = "device proc mounted on /proc with fstype proc\n"
AFTER = "device /dev/sda mounted on / with fstype ext4\n"

FILESYSTEM = Filesystem("7", 30, 20, "0:30", b"/", b"/srv", "nfs4", b"server:/a\\040b", b"rw")
UNKNOWN = Mount("nfs4", None, None, "0:30")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BEFORE + NFS + AFTER, Mount("nfs4", 94, 67108864, "0:30")),
        (NFS, Mount("nfs4", 94, 67108864, "0:30")),
        # Before Linux 5.3
        (NFS.replace(" 910 4\n", " 910\n"), Mount("nfs4", 98, 67108864, "0:30")),
        (NFS + NFS, UNKNOWN),  # Stacked mounts.
        (NFS.replace("/srv", "/srv2") + AFTER, UNKNOWN),
        (NFS.replace("\tper-op statistics\n", ""), Mount("nfs4", None, 67108864, "0:30")),
        (NFS.replace("\tbytes:", "\tbites:"), Mount("nfs4", 94, None, "0:30")),
        (AFTER, UNKNOWN),
        ("", UNKNOWN),
        (NFS.partition("\topts")[0] + AFTER + NFS.partition("nfs4 statvers=1.1")[2], UNKNOWN),
    ],
)
def test_operations_of_an_nfs_mount(tmp_path: Path, text: str, expected: Mount) -> None:
    proc = lay(tmp_path, {"7/mountstats": text})
    assert MountStatistics(proc).of(FILESYSTEM) == expected


def test_it_is_read_once(tmp_path: Path) -> None:
    proc = lay(tmp_path, {"7/mountstats": NFS})
    statistics = MountStatistics(proc)
    assert statistics.of(FILESYSTEM).operations == 94
    (proc / "7/mountstats").unlink()
    assert statistics.of(FILESYSTEM).operations == 94
    assert MountStatistics(proc).of(FILESYSTEM) == UNKNOWN


def test_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = lay(tmp_path, {"7/mountstats": NFS})
    monkeypatch.setattr(mounts_module, "MAX_BYTES", len(NFS) - 1)
    assert MountStatistics(proc).of(FILESYSTEM) == UNKNOWN


@pytest.mark.parametrize("kind", ["fuse.sshfs", "9p", "ceph", "cifs", "zfs"])
def test_file_systems_without_counters(tmp_path: Path, kind: str) -> None:
    filesystem = FILESYSTEM._replace(kind=kind)
    text = NFS.replace("nfs4 statvers", f"{kind} statvers")
    assert MountStatistics(lay(tmp_path, {"7/mountstats": text})).of(filesystem) == Mount(
        kind, None, None, "0:30"
    )


def test_the_own_mountstats_can_be_read() -> None:
    """There is no server here, and other mounts in the kernel's text are not taken for NFS."""
    root = Mounts("self").of_path(b"/")
    assert root is not None
    disguised = root._replace(kind="nfs4")
    assert MountStatistics().of(disguised) == Mount("nfs4", None, None, root.number)
