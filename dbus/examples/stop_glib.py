#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop a guest by its process id and show its progress: python3 stop_glib.py PID (GLib)."""

import sys

from gi.repository import Gio, GLib

NAME, PATH = "org.qkilld1", "/org/qkilld1"
NO_FLAGS = Gio.DBusProxyFlags.NONE
FORCE = 1
NEVER = GLib.MAXINT32  # ms; no timeout for Wait, which takes as long as the stop


def main(pid: int) -> int:
    bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
    manager = Gio.DBusProxy.new_sync(bus, NO_FLAGS, None, NAME, PATH, "org.qkilld1.Manager", None)
    try:
        path = manager.Terminate("(ut)", pid, FORCE)
    except GLib.Error as error:
        print(f"not stopped: {error.message}")
        return 1
    job = Gio.DBusProxy.new_sync(bus, NO_FLAGS, None, NAME, path, "org.qkilld1.Job", None)

    def changed(proxy, values, invalidated):
        for key, value in values.unpack().items():
            if key in ("Phase", "Verdict", "NextRung"):
                print(f"{key}: {value}")

    job.connect("g-properties-changed", changed)
    loop = GLib.MainLoop()
    answer = []

    def ended(proxy, result):
        answer.append(proxy.call_finish(result).unpack())
        loop.quit()

    job.call("Wait", None, Gio.DBusCallFlags.NONE, NEVER, None, ended)
    loop.run()
    result, receipt = answer[0]
    print(f"{result} after {receipt['elapsed-usec'] / 1e6:.3f} s")
    return 0 if result == "exited" else 3


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
