"""When one user has taken as many descriptors as possible, some are left for others."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from tests.evidence.until import until
from tests.lab.bus import CallError, Client, Daemon
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID

JOB = "org.qkilld1.Job"
LIMIT = 100
LONG = ("t", 600_000_000)

Make = Callable[..., Guest]
Start = Callable[..., Daemon]


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))


def wait_sample(client: Client, job: str) -> None:
    """Wait until the daemon has read evidence of the guest."""
    until(lambda: client.properties(job, JOB)["Verdict"], lambda verdict: verdict != "unknown")


def kill(client: Client, job: str) -> str:
    client.call("Force", path=job, interface=JOB)
    return client.wait(job)[0]


def test_root_and_running_jobs_have_a_reserve(start_daemon: Start, fake_qemu: Make) -> None:
    """No running guest is reported as gone."""
    daemon = start_daemon(before=few_descriptors)
    guests = [fake_qemu(uid=OTHER_UID, stubborn=True) for _ in range(40)]
    roots = fake_qemu(stubborn=True)
    with daemon.bus.client(uid=OTHER_UID) as user, daemon.bus.client() as root:
        jobs = []
        with pytest.raises(CallError, match="short of file descriptors") as caught:
            for guest in guests:
                jobs.append(user.terminate(guest.pid, grace_usec=LONG))
                if len(jobs) % 4 == 0:
                    wait_sample(user, jobs[-1])
        assert caught.value.name == "org.qkilld1.Error.Busy"
        # With so many jobs, files are closed between samples, so each job has only two descriptors.
        assert len(jobs) > LIMIT // 4
        with pytest.raises(CallError, match="short of file descriptors"):
            user.call("Inspect", "u", guests[-1].pid)
        assert root.call("Inspect", "u", guests[-1].pid)[0]["verdict"][1] != "gone"
        assert kill(root, root.terminate(roots.pid, grace_usec=LONG)) == "killed"
        assert [kill(user, job) for job in jobs] == ["killed"] * len(jobs)
        # Now there are free descriptors again.
        assert kill(user, user.terminate(guests[-1].pid)) == "killed"
    assert "Internal error" not in daemon.stderr.text()
