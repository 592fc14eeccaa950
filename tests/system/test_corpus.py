"""The verdict on each unit of the corpus, with a real systemd."""

from __future__ import annotations

import json

from tests.corpus import units
from tests.corpus.guest import RECORDS, KeptRecords
from tests.corpus.measure import measure
from tests.corpus.structures import STRUCTURES
from tests.lab.container import Container


def test_the_corpus_is_what_it_says() -> None:
    assert len(STRUCTURES) >= 60
    assert len({structure.unit for structure in STRUCTURES}) == len(STRUCTURES)
    assert sum(structure.runs for structure in STRUCTURES) >= 25
    assert all(structure.source for structure in STRUCTURES)


def test_every_verdict(installed: Container) -> None:
    with units.idle_units(installed, STRUCTURES):
        found = units.judge(installed, (structure.unit for structure in STRUCTURES))
        verdicts = {name: document.get("verdict", document) for name, document in found.items()}
    expected = {structure.unit: structure.verdict.value for structure in STRUCTURES}
    wrong = {name: (verdicts[name], word) for name, word in expected.items()
             if verdicts[name] != word}  # fmt: skip
    assert not wrong, json.dumps({name: found[name] for name in wrong}, indent=1)
    for name, document in found.items():
        for occasion in ("stop", "restart", "shutdown"):
            steps = document["now"][occasion]["steps"]
            assert all(step["by"] and step["does"] for step in steps), name


def test_the_host_before_the_service_is_enabled(installed: Container) -> None:
    wanted = ("100.scope", "no-sigkill.service")
    chosen = [structure for structure in STRUCTURES if structure.unit in wanted]
    program = "/usr/local/sbin/pacemakerd"
    installed.run("cp", "/usr/bin/sleep", program)
    with units.idle_units(installed, chosen):
        installed.run("systemctl", "start", "no-sigkill.service")
        keeper = ("--unit=our-cluster.service", "--property=Type=exec", program, "infinity")
        installed.run("systemd-run", *keeper)
        try:
            done = installed.run("qkillctl", "--json", "check-host", check=False)
            said = installed.run("qkillctl", "check-host", check=False).stdout
        finally:
            installed.run("systemctl", "stop", "no-sigkill.service", "our-cluster.service")
            installed.run("rm", program)
    document = json.loads(done.stdout)
    guests = {each["unit"]: (each["stopped_by"], each["keepers"]) for each in document["guests"]}
    assert guests["100.scope"] == ("keeper", ["pve-guests.service"])
    assert guests["no-sigkill.service"] == ("systemd", [])
    assert done.returncode == document["exit_code"] == 8
    # The project of our-cluster.service is known by its program.
    keepers = {each["unit"]: each["project"] for each in document["keepers"]}
    assert keepers["our-cluster.service"] == "pacemaker"
    assert keepers["pve-guests.service"] == "Proxmox VE"
    assert "pve-guests.service" in document["order"][0]
    assert "qkillctl adopt no-sigkill.service" in said


def test_a_host_with_six_of_them_powers_off() -> None:
    """This test stops only six units. `make bench-units` stops all."""
    names = ("plain", "sigkill", "sigcont", "loop", "on-nbd")
    wanted = {*(f"{name}.service" for name in names), "100.scope"}
    said: list[str] = []
    chosen = [each for each in STRUCTURES if each.unit in wanted]
    rows = measure(chosen, ["poweroff"], said.append)
    assert len(rows) == 6
    for row in rows:
        assert row.is_measured("poweroff"), said
        assert not row.is_worse("poweroff"), row
        guest = 0 if row.structure.unit == "on-nbd.service" else RECORDS
        assert row.kept["poweroff", True] == KeptRecords(RECORDS, guest), row
    before = {row.structure.unit: row.kept["poweroff", False] for row in rows}
    assert before["sigkill.service"].disks < RECORDS, "nothing could have been lost"
    assert before["100.scope"] == KeptRecords(RECORDS, RECORDS), "its keeper shuts it down"
