"""An iSCSI target in user space (tgtd), on loopback. It can be frozen, ended, and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.process import end, run, spawn
from tests.lab.scratch import scratch

_NAME: Final = "iqn.2000-01.lab:disk"


@dataclass
class IscsiStore:
    """A target with one disk, which is a file."""

    file: Path
    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def node(self) -> dict[str, object]:
        """Return the node for QEMU's block layer; needs qemu-block-extra."""
        where = {"transport": "tcp", "portal": f"127.0.0.1:{self.port}"}
        return {"driver": "iscsi", "target": _NAME, "lun": 1, **where}

    def freeze(self) -> None:
        """Stop the target with SIGSTOP, so that it does not even answer keepalives."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def leave(self) -> None:
        assert self.process is not None
        end(self.process)

    def start(self) -> None:
        """Start the target, for the first time or after leave(); return when it is usable."""
        program = needs.program("tgtd", "tgt")
        portal = f"portal=127.0.0.1:{self.port}"
        control = self.directory / "control"
        environment = dict(os.environ) | {"TGT_IPC_SOCKET": str(control)}
        with (self.directory / "said").open("ab") as said:
            argv = [str(program), "-f", "-C", "0", "--iscsi", portal]
            self.process = spawn(argv, stdout=said, stderr=said, env=environment)
        admin = [str(needs.program("tgtadm", "tgt")), "--lld", "iscsi", "--op"]
        target = ["--mode", "target", "--tid", "1"]
        unit = ["--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", str(self.file)]
        deadline = time.monotonic() + 30
        for words in (
            ["new", *target, "-T", _NAME],
            ["new", *unit],
            ["bind", *target, "-I", "ALL"],
        ):
            while (done := run([*admin, *words], env=environment)).returncode:
                said_text = (self.directory / "said").read_text()
                assert self.process.poll() is None, f"tgtd: {said_text}"
                assert time.monotonic() < deadline, f"tgtadm: {done.stderr}{said_text}"
                # Nothing announces its control socket.
                time.sleep(0.05)


@contextlib.contextmanager
def iscsi_store(file: Path) -> Iterator[IscsiStore]:
    """Run a target for a file, whose size must not change. Raises needs.Missing."""
    needs.root("an iSCSI target")
    with scratch("i") as directory, contextlib.ExitStack() as stack:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        store = IscsiStore(file, directory, port)
        store.start()
        stack.callback(lambda: store.process and end(store.process))
        yield store
