#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A window that lists the guests of this host and stops one, with its progress (GTK 3)."""

import sys
import time

import gi

gi.require_version("Gtk", "3.0")
from gi.repository import Gio, GLib, Gtk  # noqa: E402

NAME, PATH = "org.qkilld1", "/org/qkilld1"
GUEST, JOB = "org.qkilld1.Guest", "org.qkilld1.Job"
FORCE, POWERDOWN, NEVER = 1, 4, 2**64 - 1
DOING = {"flushing": "writes out its data", "storage-wait": "waits for its storage"}


class Row(Gtk.ListBoxRow):
    """One guest of the list."""

    def __init__(self, window, guest):
        super().__init__()
        self.window, self.guest, self.job = window, guest, None
        self.state = Gtk.Label(xalign=0)
        self.button = Gtk.Button(label="Stop", valign=Gtk.Align.CENTER)
        self.button.connect("clicked", lambda _: self.stop())
        name = Gtk.Label(xalign=0)
        name.set_markup(f"<b>{GLib.markup_escape_text(self.get('Name') or '(no name)')}</b>")
        about = Gtk.Label(label=f"pid {self.get('PID')}  {self.get('Unit')}", xalign=0)
        words = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, hexpand=True)
        for label in (name, about, self.state):
            words.add(label)
        box = Gtk.Box(spacing=12, margin=8)
        box.add(words)
        box.pack_end(self.button, False, False, 0)
        self.add(box)

    def get(self, name):
        return self.guest.get_cached_property(name).unpack()

    def stop(self):
        # Without the start time, this would stop another process that has this id by now.
        options = {"start-time": GLib.Variant("t", self.get("StartTime"))}
        body = GLib.Variant("(uta{sv})", (self.get("PID"), FORCE | POWERDOWN, options))
        flags = Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION
        self.button.set_sensitive(False)
        self.window.manager.call("TerminateWithOptions", body, flags, 150_000, None, self.started)

    def started(self, manager, result):
        try:
            manager.call_finish(result)
        except GLib.Error as error:
            self.state.set_text(error.message)
            self.button.set_sensitive(True)

    def show_job(self, job):
        values = {name: job.get_cached_property(name) for name in ("Result", "Phase", "Verdict")}
        result, phase, verdict = (value.unpack() if value else "" for value in values.values())
        self.button.set_sensitive(bool(result))
        if result:
            self.state.set_text(result)
            return
        left = job.get_cached_property("DeadlineUSec").unpack()
        rung = job.get_cached_property("NextRung").unpack()
        still = job.get_cached_property("NextRungStallUSec").unpack() / 1e6
        doing = "shuts down" if phase == "powerdown" else DOING.get(verdict, verdict)
        if left == NEVER:
            self.state.set_text(doing)
        elif still and left / 1e6 - time.monotonic() > still - 6:
            self.state.set_text(f"{doing}; {rung} only after {still:.0f} s without progress")
        else:
            seconds = max(0, left / 1e6 - time.monotonic())
            self.state.set_text(f"{doing}; {rung} in {seconds:.0f} s")


class Window(Gtk.Window):
    def __init__(self, stop_at_once):
        super().__init__(title="QEMU guests", default_width=520, default_height=300)
        self.rows, self.stop_at_once = {}, stop_at_once
        self.list = Gtk.ListBox(selection_mode=Gtk.SelectionMode.NONE)
        self.add(self.list)
        self.connect("destroy", Gtk.main_quit)
        self.manager = Gio.DBusProxy.new_for_bus_sync(
            Gio.BusType.SYSTEM, 0, None, NAME, PATH, "org.qkilld1.Manager", None
        )
        self.objects = Gio.DBusObjectManagerClient.new_for_bus_sync(
            Gio.BusType.SYSTEM, 0, NAME, PATH, None, None, None
        )
        self.objects.connect("object-added", lambda _, one: self.added(one))
        self.objects.connect("object-removed", lambda _, one: self.removed(one))
        for one in self.objects.get_objects():
            self.added(one)
        GLib.timeout_add(500, self.tick)

    def added(self, one):
        if guest := one.get_interface(GUEST):
            row = self.rows[one.get_object_path()] = Row(self, guest)
            self.list.add(row)
            row.show_all()
            if row.get("Name") == self.stop_at_once:
                row.stop()

    def removed(self, one):
        if row := self.rows.pop(one.get_object_path(), None):
            self.list.remove(row)
            if row.get("Name") == self.stop_at_once:
                print(f"{self.stop_at_once} is gone")
                Gtk.main_quit()

    def tick(self):
        jobs = [each for one in self.objects.get_objects() if (each := one.get_interface(JOB))]
        for row in self.rows.values():
            own = (row.get("PID"), row.get("StartTime"))
            for job in jobs:
                names = ("PID", "StartTime")
                if own == tuple(job.get_cached_property(name).unpack() for name in names):
                    row.show_job(job)
        return True


window = Window(sys.argv[1] if len(sys.argv) > 1 else "")
window.show_all()
Gtk.main()
