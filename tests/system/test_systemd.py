"""Reading the units of a real systemd."""

from __future__ import annotations

import json
from typing import Any

from tests.lab.container import Container

_ASK = """
import asyncio, dataclasses, json, sys
from qkilld.bus.connection import connect
from qkilld.bus.systemd import Systemd
from qkilld.model.errors import QkilldError

async def main():
    connection = await connect()
    try:
        asked = getattr(Systemd(connection), sys.argv[1])
        answer = await asked(*map(json.loads, sys.argv[2:]))
        if dataclasses.is_dataclass(answer):
            answer = dataclasses.asdict(answer)
        print(json.dumps(answer))
    except QkilldError as error:
        print(json.dumps([type(error).__name__, str(error)]))
    finally:
        connection.close()

asyncio.run(main())
"""


def ask(container: Container, method: str, *arguments: object) -> Any:
    given = (json.dumps(argument) for argument in arguments)
    answer: Any = json.loads(container.python("-c", _ASK, method, *given).stdout)
    return answer


def test_everything_of_a_service(container: Container) -> None:
    container.write(
        "/etc/systemd/system/facts.service",
        "[Unit]\nAfter=basic.target\n[Service]\nUser=nobody\nNotifyAccess=exec\nKillMode=mixed\n"
        "ExecStart=/bin/sleep infinity\nExecStop=-+/bin/true one 'two three'\nTimeoutStopSec=7\n"
        "SendSIGKILL=no\nKillSignal=SIGINT\nRuntimeMaxSec=1h\nFinalKillSignal=SIGABRT\n"
        "Restart=on-failure\nTimeoutStopFailureMode=abort\nPIDFile=/run/facts.pid\n"
        "[Unit]\nJobTimeoutSec=1min\n",
    )
    container.run("systemctl", "daemon-reload")
    container.run("systemctl", "start", "facts.service")
    facts = ask(container, "unit", "facts.service")
    assert isinstance(facts, dict)
    pid = int(container.property("facts.service", "MainPID"))
    assert (
        facts
        | {
            "id": "facts.service",
            "load_state": "loaded",
            "active_state": "active",
            "fragment": "/etc/systemd/system/facts.service",
            "control_group": "/system.slice/facts.service",
            "kill_mode": "mixed",
            "kill_signal": 2,
            "sends_sigkill": False,
            "timeout_stop": 7_000_000,
            "type": "simple",
            "main_pid": pid,
            "notify_access": "exec",
            "user": "nobody",
            "runtime_max": 3_600_000_000,
            "default_dependencies": True,
            "job_timeout": 60_000_000,
            "final_kill_signal": 6,
            "timeout_failure_mode": "abort",
            "restart": "on-failure",
            "pid_file": "/run/facts.pid",
            "names": ["facts.service"],
        }
        == facts
    )
    assert facts["exec_stop"] == [
        {
            "path": "/bin/true",
            "arguments": ["/bin/true", "one", "two three"],
            "ignores_failure": True,
            "flags": ["privileged"],
            "pid": 0,
        }
    ]
    assert "basic.target" in facts["after"]
    assert ask(container, "unit_of", pid) == facts
    assert sorted(ask(container, "list_units", "fact?.service", "dbus.serv*")) == [
        "dbus.service",
        "facts.service",
    ]
    ask(container, "stop", "facts.service")


def test_a_scope(container: Container) -> None:
    run = ("systemd-run", "--scope", "--unit=facts.scope", "--property=TimeoutStopSec=3")
    with container.spawn(*run, "sleep", "infinity") as process:
        assert process.stdout is not None
        process.stdout.readline()  # Running scope as unit: facts.scope
        facts = ask(container, "unit", "facts.scope")
        assert isinstance(facts, dict)
        assert (facts["active_state"], facts["transient"]) == ("active", True)
        assert (facts["timeout_stop"], facts["main_pid"], facts["type"]) == (3_000_000, 0, "")


def test_unknown_units_have_errors(container: Container) -> None:
    for name in ("nosuch.service", "nosuch.scope"):
        assert ask(container, "unit", name) == [
            "NoSuchUnit",
            f'systemd knows no unit "{name}"',
        ]
    for name in ("nosuch", "basic.target", "a b.service", "../x.service", ""):
        (kind, _) = ask(container, "unit", name)
        assert kind == "InvalidArgs", name
    assert ask(container, "start", "nosuch.service")[0] == "NoSuchUnit"


def test_which_mounts_a_target_orders(container: Container) -> None:
    options = {"wanted": "_netdev", "nofail": "_netdev,nofail", "manual": "noauto"}
    lines = [f"server:/x /srv/order/{name} nfs {text} 0 0\n" for name, text in options.items()]
    container.write("/etc/fstab", "".join(lines))
    try:
        container.run("systemctl", "daemon-reload")
        found = {
            name: ask(container, "is_before", f"srv-order-{name}.mount", "remote-fs.target")
            for name in (*options, "unknown")
        }
        assert found == {"wanted": True, "nofail": False, "manual": True, "unknown": None}
    finally:
        container.write("/etc/fstab", "")
        container.run("systemctl", "daemon-reload")
