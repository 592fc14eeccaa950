"""A daemon that also serves Varlink."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.bus import Bus, Daemon
from tests.lab.scratch import scratch
from tests.lab.varlink import VarlinkClient

StartDaemon = Callable[..., Daemon]


@dataclass
class VarlinkService:
    """A daemon and its socket."""

    daemon: Daemon
    path: Path

    def client(self, uid: int | None = None) -> VarlinkClient:
        return VarlinkClient(self.path, uid)


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with scratch("v") as directory:
        directory.chmod(0o711)
        yield directory / "org.qkilld1"


@pytest.fixture
def service(private_bus: Bus, start_daemon: StartDaemon, socket_path: Path) -> VarlinkService:
    daemon = start_daemon("--varlink", str(socket_path))
    daemon.wait_for("serves the bus at")  # It serves Varlink earlier than the bus.
    return VarlinkService(daemon, socket_path)


@pytest.fixture
def varlink(service: VarlinkService) -> Iterator[VarlinkClient]:
    with service.client() as client:
        yield client
