"""How long qkillctl terminate --powerdown waits for a guest of libvirt."""

from __future__ import annotations

import asyncio
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from qkilld.ctl import libvirt_guest, unit_context
from qkilld.model.constants import INFINITY
from qkilld.model.policy import Config, Policy
from qkilld.monitor.libvirt import Domain

SHORT = Policy(powerdown=50_000)
LONG = Policy(powerdown=INFINITY)


@pytest.mark.parametrize(
    ("span", "config"),
    [
        (50_000, Config(LONG)),
        (None, Config(SHORT)),
        (None, Config(LONG, guests={"web": SHORT})),
    ],
)
def test_it_waits_for_the_configured_time(
    span: int | None, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def config_of(session: object) -> Config:
        return config

    monkeypatch.setattr(unit_context, "config_of", config_of)
    monkeypatch.setattr(libvirt_guest, "domain_of", lambda pid: Domain("web", "qemu:///system"))
    monkeypatch.setattr(libvirt_guest, "shut_down", lambda domain: "")
    session: Any = SimpleNamespace(bus=SimpleNamespace(is_remote=False), json=True)

    async def stop(pid: int) -> libvirt_guest.LibvirtShutdown:
        async with asyncio.timeout(20):
            return await libvirt_guest.shut_down_by_libvirt(
                session, pid, wait=True, span=span, only=True
            )

    with subprocess.Popen(["sleep", "infinity"]) as process:
        try:
            shutdown = asyncio.run(stop(process.pid))
        finally:
            process.kill()
    assert (shutdown.result, shutdown.receipt["guest-asked"]) == ("survived", "ignored")
    assert shutdown.receipt["elapsed-usec"] >= 50_000
