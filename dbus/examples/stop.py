#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop a guest by its name and show its progress: python3 stop.py NAME (dbus-fast, asyncio)."""

import asyncio
import sys

try:
    from dbus_fast import BusType, DBusError, Variant
    from dbus_fast.aio import MessageBus
except ImportError:  # its predecessor, with the same API
    from dbus_next import BusType, DBusError, Variant
    from dbus_next.aio import MessageBus

NAME, PATH = "org.qkilld1", "/org/qkilld1"
FORCE, POWERDOWN = 1, 4


async def main(name: str) -> int:
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    introspection = await bus.introspect(NAME, PATH)
    root = bus.get_proxy_object(NAME, PATH, introspection)
    manager = root.get_interface("org.qkilld1.Manager")
    objects = root.get_interface("org.freedesktop.DBus.ObjectManager")

    guests = [
        interfaces["org.qkilld1.Guest"]
        for interfaces in (await objects.call_get_managed_objects()).values()
        if "org.qkilld1.Guest" in interfaces
    ]
    found = [guest for guest in guests if guest["Name"].value == name]
    if len(found) != 1:
        print(f"{len(found)} guests have this name")
        return 7
    pid, start_time = found[0]["PID"].value, found[0]["StartTime"].value

    # Without the start time, this would stop another process that has this id by now.
    options = {"start-time": Variant("t", start_time), "reason": Variant("s", "stop.py")}
    try:
        path = await manager.call_terminate_with_options(pid, FORCE | POWERDOWN, options)
    except DBusError as error:
        print(f"not stopped: {error.text} ({error.type})")
        return 1

    job_object = bus.get_proxy_object(NAME, path, await bus.introspect(NAME, path))
    properties = job_object.get_interface("org.freedesktop.DBus.Properties")
    job = job_object.get_interface("org.qkilld1.Job")

    def changed(interface: str, values: dict, invalidated: list) -> None:
        for key in ("Phase", "Verdict", "NextRung"):
            if key in values:
                print(f"{key}: {values[key].value}")

    properties.on_properties_changed(changed)
    # Wait takes as long as the stop.
    result, receipt = await job.call_wait()
    print(f"{result} after {receipt['elapsed-usec'].value / 1e6:.3f} s")
    if "data-at-risk" in receipt and receipt["data-at-risk"].value:
        for code, text in receipt["at-risk"].value:
            print(f"data at risk: {code}: {text}")
    return 0 if result == "exited" else 3


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1])))
