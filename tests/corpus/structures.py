"""Structures of units from the field, each with the verdict expected from check-unit.

Each is as small as possible; `source` names the project and file that it resembles. Placeholders in
a text:

    {guest}     the command line of a guest with a monitor on the unix socket {monitor}
    {mute}      the command line of a guest without a monitor that qkilld can use
    {served}    like {mute}; nbdkit serves the guest's disk on the unix socket {nbd}
    {store}     the arguments of nbdkit for that disk
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from qkilld.unitcheck.comparison import UnitVerdict

SAFE, WORSE, NO_BETTER = UnitVerdict.SAFE, UnitVerdict.WORSE, UnitVerdict.NO_BETTER
UNKNOWN, MANUAL, OTHER = UnitVerdict.UNKNOWN, UnitVerdict.MANUAL, UnitVerdict.OTHER_UNIT


@dataclass(frozen=True, eq=False)
class Structure:
    unit: str
    """The unit's name."""
    source: str
    text: str
    """The content of [Service], or the properties of a scope."""
    verdict: UnitVerdict
    head: str = ""
    """The content of [Unit]."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Other files, by path or unit name."""
    starts: tuple[str, ...] = ()
    """Units to start before the check. With `runs`, they include the unit itself."""
    runs: bool = False
    """Whether `make bench-units` stops the unit's guest, before and after adopting the unit."""
    stand_in: bool = False
    """Whether a substitute with the same unit properties replaces a program that cannot run
    here."""
    stops: tuple[str, ...] = ()
    """Units that are stopped in the same transaction."""

    @property
    def is_scope(self) -> bool:
        return self.unit.endswith(".scope")


ASK: Final = "echo system_powerdown | socat - UNIX-CONNECT:{monitor}"
QUIT: Final = "echo quit | socat - UNIX-CONNECT:{monitor}"
SERVER: Final = "[Service]\nExecStart=/usr/bin/nbdkit -f -U {nbd} {store}\n"


def service(
    name: str, source: str, *lines: str, verdict: UnitVerdict = SAFE, **more: object
) -> Structure:
    text = "\n".join(lines)
    return Structure(f"{name}.service", source, text, verdict, **more)  # type: ignore[arg-type]


STRUCTURES: Final = (
    # ---- without a helper ----
    service("plain", "QEMU's wiki, a unit for one guest", "ExecStart={guest}", runs=True),
    service("mute", "the same without a monitor", "ExecStart={mute}", runs=True),
    service("short", "aleph-vm: SIGKILL after a few seconds", "ExecStart={guest}",
            "TimeoutStopSec=3", runs=True),
    service("sigkill", "a unit that is stopped like a plug is pulled", "ExecStart={guest}",
            "KillSignal=SIGKILL", runs=True),
    service("sigquit", "KillSignal=SIGQUIT, which dumps core", "ExecStart={guest}",
            "KillSignal=SIGQUIT", runs=True),
    service("no-sigkill", "lxd-like, nothing is ever killed", "ExecStart={guest}",
            "SendSIGKILL=no", runs=True),
    service("endless", "TimeoutStopSec=infinity", "ExecStart={mute}", "TimeoutStopSec=infinity",
            runs=True),
    service("kill-none", "quickemu issue: KillMode=none", "ExecStart={guest}", "KillMode=none",
            runs=True),
    service("no-deps", "DefaultDependencies=no", "ExecStart={guest}",
            head="DefaultDependencies=no\nConflicts=shutdown.target", runs=True),
    service("job-timeout", "JobTimeoutSec= of a few seconds", "ExecStart={guest}",
            head="JobTimeoutSec=20", runs=True),
    service("failure-mode", "TimeoutStopFailureMode=kill", "ExecStart={guest}",
            "TimeoutStopFailureMode=kill", runs=True),
    service("oneshot", "a guest as the command of a oneshot", "Type=oneshot",
            "ExecStart={guest}", verdict=MANUAL),
    service("restart", "Restart=always", "ExecStart={guest}", "Restart=always"),
    service(
        "on-failure",
        "OnFailure= of a monitoring site",
        "ExecStart={guest}",
        "TimeoutStopSec=20",
        head="OnFailure=alert.service",
        files={"alert.service": "[Service]\nType=oneshot\nExecStart=/bin/true\n"},
        runs=True,
    ),
    service("restart-kill", "RestartKillSignal=SIGKILL", "ExecStart={mute}",
            "RestartKillSignal=SIGKILL", "TimeoutStopSec=infinity"),
    # ---- already with the helper ----
    service("helper", "qkilld-stop(8)", "ExecStart={guest}", "ExecStop=/usr/bin/qkilld-stop",
            "NotifyAccess=exec", "TimeoutStopSec=90s", runs=True),
    service("helper-deaf", "the same without NotifyAccess=", "ExecStart={guest}",
            "ExecStop=/usr/bin/qkilld-stop", "TimeoutStopSec=90s", runs=True),
    service("helper-inet", "RestrictAddressFamilies= hides the bus from the helper",
            "ExecStart={mute}", "ExecStop=/usr/bin/qkilld-stop", "NotifyAccess=exec",
            "TimeoutStopSec=90s", "RestrictAddressFamilies=AF_INET AF_INET6", runs=True),
    service("helper-dry", "the helper as it was tried", "ExecStart={guest}",
            "ExecStop=/usr/bin/qkilld-stop --dry-run", "NotifyAccess=exec", verdict=MANUAL),
    service("helper-other", "the helper with another unit's name", "ExecStart={guest}",
            "ExecStop=/usr/bin/qkilld-stop --unit plain", "NotifyAccess=exec", verdict=MANUAL),
    service("helper-own", "the helper with its own unit's name", "ExecStart={guest}",
            "ExecStop=/usr/bin/qkilld-stop --unit %n", "NotifyAccess=exec", "TimeoutStopSec=90s"),
    service("helper-all", "a line of qkilld-guests.service in a unit", "ExecStart={guest}",
            "ExecStop=/usr/bin/qkilld-stop --all --force", "NotifyAccess=exec", verdict=MANUAL),
    service("helper-pidfile", "a pidfile that nothing writes", "ExecStart={guest}",
            "ExecStop=/usr/bin/qkilld-stop --pidfile /run/corpus/x", "NotifyAccess=exec",
            verdict=MANUAL),
    service("helper-max", "a fixed time for the helper", "ExecStart={guest}",
            "ExecStop=/usr/bin/qkilld-stop --max 3s", "NotifyAccess=exec", verdict=MANUAL),
    # ---- shut down by others: KillSignal=SIGCONT, loops, templates ----
    service("sigcont", "ArchWiki, QEMU: haltcmd in an EnvironmentFile=, KillSignal=SIGCONT",
            "EnvironmentFile=/etc/corpus-sigcont", "ExecStart={guest}",
            "ExecStop=/bin/sh -c ${{haltcmd}}", "KillSignal=SIGCONT", "TimeoutStopSec=30",
            files={"/etc/corpus-sigcont": f"haltcmd=\"{ASK}\"\n"}, runs=True),
    service("sigcont-mute", "the same with a telnet monitor, which the helper cannot use",
            "EnvironmentFile=/etc/corpus-telnet",
            "ExecStart={mute} -monitor telnet:127.0.0.1:7101,server=on,wait=off",
            "ExecStop=/bin/sh -c ${{haltcmd}}", "KillSignal=SIGCONT", "TimeoutStopSec=30",
            files={"/etc/corpus-telnet":
                   'haltcmd="echo system_powerdown | socat - TCP:127.0.0.1:7101"\n'},
            verdict=WORSE, runs=True),
    service("sigcont-endless", "the same with no limit, which is as good as can be",
            "ExecStart={mute} -monitor telnet:127.0.0.1:7102,server=on,wait=off",
            "ExecStop=/bin/sh -c 'echo system_powerdown | socat - TCP:127.0.0.1:7102'",
            "KillSignal=SIGCONT", "TimeoutStopSec=infinity", runs=True),
    service("sigcont-unknown", "the same, asked by a program that is not known",
            "ExecStart={mute} -monitor telnet:127.0.0.1:7103,server=on,wait=off",
            "ExecStop=/usr/local/bin/corpus-ask 7103", "KillSignal=SIGCONT", "TimeoutStopSec=30",
            verdict=UNKNOWN, runs=True),
    service("loop", "a gist: a loop presses the button until the guest is gone", "Type=forking",
            "PIDFile=/run/corpus/loop.pid",
            "ExecStart={guest} -daemonize -pidfile /run/corpus/loop.pid",
            f"ExecStop=/bin/sh -c 'while test -d /proc/$MAINPID; do {ASK}; sleep 1; done'",
            "TimeoutStopSec=1m", runs=True),
    service("loop-mute", "the same with a telnet monitor",
            "ExecStart={mute} -monitor telnet:127.0.0.1:7104,server=on,wait=off",
            "ExecStop=/bin/sh -c 'while test -d /proc/$MAINPID; do echo system_powerdown |"
            " socat - TCP:127.0.0.1:7104; sleep 1; done'",
            "TimeoutStopSec=1m", verdict=NO_BETTER, runs=True),
    service("ask-sleep", "the button, and a fixed time", "ExecStart={guest}",
            f"ExecStop=/bin/sh -c '{ASK}; sleep 5'", "TimeoutStopSec=30", runs=True),
    service("ask-wait", "the button, and tail --pid", "ExecStart={guest}",
            f"ExecStop=/bin/sh -c '{ASK}'",
            "ExecStop=/usr/bin/tail --pid=${{MAINPID}} -f /dev/null", runs=True),
    service("ask-kill", "the button, a fixed time, and SIGKILL", "ExecStart={guest}",
            f"ExecStop=/bin/sh -c '{ASK}; sleep 1; kill -9 $MAINPID'", runs=True),
    service("ask", "the button and nothing else: SIGTERM follows at once", "ExecStart={guest}",
            f"ExecStop=/bin/sh -c '{ASK}'", runs=True),
    service("quit", "`quit` to the monitor", "ExecStart={guest}", f"ExecStop=/bin/sh -c '{QUIT}'",
            runs=True),
    service("reads", "microvm.nix pull request 578: the stop command reads its stdin",
            "ExecStart={guest}", "ExecStop=/bin/sh -c 'read answer; echo quit'"),
    service("by-ssh", "poweroff by ssh, and a fixed time", "ExecStart={guest}",
            "ExecStop=/usr/bin/ssh guest poweroff", "ExecStop=/usr/bin/sleep 20"),
    service("unknown", "a site's own stop program", "ExecStart={guest}",
            "ExecStop=/usr/local/bin/corpus-noop", verdict=UNKNOWN, runs=True),
    service("unknown-waits", "a site's own program that asks and waits", "ExecStart={guest}",
            "ExecStop=/usr/local/bin/corpus-wait {monitor}", verdict=UNKNOWN, runs=True),
    service("unknown-fails", "a site's own program that fails, and a second one",
            "ExecStart={guest}", "ExecStop=/bin/false", "ExecStop=/usr/local/bin/corpus-noop",
            verdict=UNKNOWN, runs=True),
    service("unknown-copies", "a site's own program, and a copy of the image if it succeeds",
            "ExecStart={guest}", "ExecStop=/usr/local/bin/corpus-noop",
            "ExecStop=/bin/cp /run/corpus/web.img /srv/web.img", verdict=UNKNOWN),
    service("ask-copies", "the button, a copy of the image, and a fixed time",
            "ExecStart={guest}", f"ExecStop=/bin/sh -c '{ASK}'",
            "ExecStop=/bin/cp /run/corpus/web.img /srv/web.img", "ExecStop=/bin/sleep 10",
            verdict=WORSE),
    service("two-in-one@", "two commands in one line of a template",
            "ExecStart={guest}", f"ExecStop=/bin/sh -c '{ASK}' ; -/bin/rm -f /run/%i.mon"),
    service("kvm@", "kvm@.service of several sites: ExecStop=kvm-stop %i",
            "ExecStart={guest}", "ExecStop=/usr/local/bin/kvm-stop %i", verdict=UNKNOWN),
    service("qemu@", "ArchWiki, qemu@.service", "EnvironmentFile=/etc/conf.d/qemu.d/%i",
            "ExecStart=/usr/bin/env qemu-system-${{type}} -name %i -nographic $args",
            "ExecStop=/bin/sh -c ${{haltcmd}}", "TimeoutStopSec=30", "KillMode=none",
            verdict=UNKNOWN),
    service("microvm@", "microvm.nix, microvm@.service",
            "ExecStart=/var/lib/microvms/%i/current/bin/microvm-run",
            "ExecStop=/var/lib/microvms/%i/booted/bin/microvm-shutdown", "TimeoutSec=150",
            verdict=UNKNOWN),
    service("vmspawn@", "systemd-vmspawn@.service",
            "ExecStart=/usr/bin/systemd-vmspawn --quiet --machine=%i", "KillMode=mixed",
            "Type=notify", verdict=UNKNOWN),
    service("bhyve-like@", "a template with RequiresMountsFor= and %i in all lines",
            "ExecStart={mute} -drive file=/srv/%i.img,format=raw",
            "ExecStop=/bin/kill -TERM $MAINPID", "ExecStopPost=/bin/rm -f /run/%i",
            head="RequiresMountsFor=/srv/%i"),
    # ---- units that look like something else ----
    service("manager", "a Python manager whose guests outlive its upgrade",
            "ExecStart=/usr/bin/python3 /usr/local/bin/corpus-manager", "KillMode=process",
            verdict=WORSE, starts=("manager.service",)),
    service("atd", "at(1): a guest in atd.service", "ExecStart=/usr/sbin/atd -f",
            "KillMode=process", verdict=WORSE),
    service("incus", "incus.service", "ExecStart=/usr/libexec/incus/incusd",
            "ExecStop=/usr/libexec/incus/incusd shutdown", "KillMode=process", verdict=WORSE),
    service("virtqemud", "libvirt, virtqemud.service", "ExecStart=/usr/sbin/virtqemud",
            "KillMode=process", verdict=WORSE),
    service("lxd", "LXD, lxd.service", "ExecStart=/usr/bin/lxd", "KillMode=process",
            "SendSIGKILL=no", verdict=WORSE),
    service("docker", "moby, docker.service", "ExecStart=/usr/bin/dockerd", "KillMode=process",
            verdict=WORSE),
    service("ganeti", "ganeti.service", "ExecStart=/usr/sbin/ganeti-noded", "KillMode=process",
            verdict=WORSE),
    service("our-vms", "libvirt in a unit of a site's own name",
            "ExecStart=/usr/sbin/libvirtd --timeout 120", verdict=WORSE),
    service("pve-like", "Proxmox VE: a Perl daemon",
            "ExecStart=/usr/bin/perl -T /usr/bin/pvedaemon start", verdict=WORSE),
    service("snap.multipass.multipassd", "multipass's snap",
            "ExecStart=/usr/bin/snap run multipass.multipassd", verdict=WORSE),
    service("podman", "podman.service", "ExecStart=/usr/bin/podman system service",
            "KillMode=process", verdict=WORSE),
    service("crio", "a guest in a unit that has a manager's name", "ExecStart={guest}"),
    service("dstack", "dstack: /opt/qemu-dstack",
            "ExecStart=/opt/qemu-dstack/bin/qemu-system-x86_64 -S"),
    service("kata", "Kata Containers", "ExecStart=/opt/kata/bin/qemu-system-x86_64 -S"),
    service("snap", "LXD's snap", "ExecStart=/snap/lxd/17320/bin/qemu-system-x86_64 -S"),
    service("guix", "GNU Guix", "ExecStart=/gnu/store/0c1-qemu-8.0/bin/qemu-system-x86_64 -S"),
    service("nix", "NixOS", "ExecStart=/nix/store/0c1-qemu-8.0/bin/qemu-kvm -S"),
    service("xen", "Debian's Xen", "ExecStart=/usr/lib/xen-4.17/bin/qemu-system-i386 -S"),
    service("brew", "Homebrew on Linux: a place that a user can write to",
            "ExecStart=/home/linuxbrew/.linuxbrew/Cellar/qemu/8.0/bin/qemu-system-x86_64 -S",
            verdict=MANUAL),
    service("flatpak", "flatpak's /app", "ExecStart=/app/bin/qemu-system-x86_64 -S",
            verdict=MANUAL),
    service("appimage", "an AppImage's mount",
            "ExecStart=/tmp/.mount_qemuAb/usr/bin/qemu-system-x86_64 -S", verdict=MANUAL),
    service("virsh-start@", "libvirt: virsh start %i", "Type=oneshot", "RemainAfterExit=yes",
            "ExecStart=/usr/bin/virsh start %i", "ExecStop=/usr/bin/virsh shutdown %i",
            verdict=OTHER),
    service("su", "su - USER -c: pam_systemd moves it into a session scope",
            "ExecStart=/bin/su - nobody -s /bin/sh -c \"exec qemu-system-x86_64 -S\"",
            verdict=OTHER),
    service("podman-machine", "podman machine start", "Type=oneshot", "RemainAfterExit=yes",
            "ExecStart=/usr/bin/podman machine start", "ExecStop=/usr/bin/podman machine stop",
            verdict=OTHER),
    service("systemd-run", "systemd-run starts it in a scope of its own",
            "ExecStart=/usr/bin/systemd-run --scope {guest}", verdict=OTHER),
    service("by-ssh-elsewhere", "a guest of another host",
            "ExecStart=/usr/bin/ssh vmhost qemu-system-x86_64 -S", verdict=OTHER),
    service("sysv", "an init script that is called kvm", "Type=forking", "KillMode=process",
            "RemainAfterExit=yes", "ExecStart=/etc/init.d/kvm start",
            "ExecStop=/etc/init.d/kvm stop", verdict=UNKNOWN),
    service("daemonized", "a oneshot that leaves QEMU running", "Type=oneshot",
            "RemainAfterExit=yes", "ExecStart={guest} -daemonize", runs=True),
    service("multipass", "multipass start", "Type=oneshot", "RemainAfterExit=yes",
            "ExecStart=/snap/bin/multipass start web", verdict=OTHER),
    service("no-qemu", "any service without a guest", "ExecStart=/usr/bin/sleep infinity",
            verdict=UNKNOWN, starts=("no-qemu.service",)),
    service("quickemu", "quickemu", "Type=forking", "ExecStart=/usr/bin/quickemu --vm web.conf",
            verdict=UNKNOWN),
    service("respawn", "a shell that starts QEMU again",
            "ExecStart=/bin/sh -c 'while true; do {guest}; done'"),
    service("shell", "a shell around it, KillMode=mixed",
            "ExecStart=/bin/sh -c '{guest}; true'", "KillMode=mixed", runs=True),
    service("shell-process", "a shell around it, KillMode=process",
            "ExecStart=/bin/sh -c '{guest}; true'", "KillMode=process", runs=True),
    service("trap", "a script that turns SIGTERM into the button, KillMode=mixed",
            "ExecStart=/bin/sh /usr/local/bin/corpus-trap {monitor} {mute}", "KillMode=mixed",
            verdict=UNKNOWN, runs=True, stand_in=True),
    service("unshare", "a PID namespace of its own",
            "ExecStart=/usr/bin/unshare --fork --pid --mount-proc {guest}", runs=True),
    # ---- dependencies of the disks ----
    service("on-nbd", "lguest.service: its disk is served by lval.service",
            "ExecStart={served}", starts=("on-nbd-server.service",),
            files={"on-nbd-server.service": SERVER}, stops=("on-nbd-server.service",), runs=True),
    service("on-nbd-ordered", "the same, ordered", "ExecStart={served}",
            head="After=on-nbd-ordered-server.service",
            starts=("on-nbd-ordered-server.service",),
            files={"on-nbd-ordered-server.service": SERVER},
            stops=("on-nbd-ordered-server.service",), runs=True),
    service("iscsi", "the host's iSCSI", "ExecStart={guest}"
            " -drive file=/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-iqn.x-lun-1,format=raw"),
    service("drbd", "ganeti: DRBD", "ExecStart={guest} -drive file=/dev/drbd/by-res/web/0,if=none"),
    service("rbd-host", "Ceph by the kernel", "ExecStart={guest} -drive file=/dev/rbd/rbd/web"),
    service("nbd-host", "nbd-client", "ExecStart={guest} -drive file=/dev/nbd0,format=raw"),
    service("multipath", "multipathd", "ExecStart={guest} -drive file=/dev/mapper/mpatha"),
    service("rbd", "-blockdev rbd beside a netdev on a unix socket",
            "ExecStart={guest} -blockdev driver=rbd,pool=p,image=i,node-name=d"
            " -netdev stream,id=n,addr.type=unix,addr.path=/run/corpus/passt"),
    service("readconfig", "a disk that only a -readconfig file has",
            "ExecStart={guest} -readconfig /etc/corpus-disk.cfg",
            files={"/etc/corpus-disk.cfg": '[drive "d"]\n  file = "nbd://storage.example/d"\n'}),
    service("json", "a graph of -blockdev in JSON",
            """ExecStart={guest} -blockdev '{{"driver":"raw","node-name":"d","file":"""
            """{{"driver":"host_device","filename":"/dev/drbd/by-res/web/0"}}}}'"""),
    service("smbios", "NoCloud's URL in -smbios, which is not storage",
            "ExecStart={guest} -smbios \"type=1,serial=ds=nocloud-net;s=http://10.0.2.2/\""),
    service("nbd-elsewhere", "an NBD server elsewhere",
            "ExecStart={guest} -drive file=nbd://storage.example/disk"),
    # ---- stop lines that kill ----
    service("kill-n", "kill -n 9", "ExecStart={guest}",
            "ExecStop=/bin/bash -c 'kill -n 9 $MAINPID'", runs=True),
    service("kill-signal", "kill --signal 9", "ExecStart={guest}",
            "ExecStop=/bin/kill --signal 9 $MAINPID", runs=True),
    service("kill-quit", "kill -QUIT", "ExecStart={guest}", "ExecStop=/bin/kill -QUIT $MAINPID",
            runs=True),
    service("destroy", "virsh destroy", "ExecStart={guest}", "ExecStop=/usr/bin/virsh destroy web"),
    service("docker-kill", "docker kill", "ExecStart={guest}", "ExecStop=/usr/bin/docker kill web"),
    service("killall", "killall -9 by name", "ExecStart={guest}",
            "ExecStop=/usr/bin/killall -9 qemu-system-x86_64"),
    service("pkill", "pkill -TERM by name", "ExecStart={guest}", "ExecStop=/usr/bin/pkill -f web"),
    service("kill-term", "kill -TERM, the default of many units", "ExecStart={guest}",
            "ExecStop=/bin/kill -s TERM $MAINPID", runs=True),
    service("socat-system", "a program that socat runs", "ExecStart={guest}",
            "ExecStop=/usr/bin/socat \"SYSTEM:kill -9 $MAINPID\" STDOUT", runs=True),
    service("socat-exec", "a power button that socat runs", "ExecStart={guest}",
            "ExecStop=/usr/bin/socat \"EXEC:echo system_powerdown\" UNIX-CONNECT:{monitor}",
            runs=True),
    service("cgroup-kill", "cgroup.kill", "ExecStart={guest}",
            "ExecStop=/bin/sh -c 'echo 1 > /sys/fs/cgroup/system.slice/cgroup-kill.service/"
            "cgroup.kill'"),
    service("start-stop-daemon", "a script of Debian's init, as a unit", "ExecStart={guest}",
            "ExecStop=/sbin/start-stop-daemon --stop --retry 1 --pid $MAINPID", runs=True),
    service("xargs-kill", "kill through xargs", "ExecStart={guest}",
            "ExecStop=/bin/sh -c 'echo $MAINPID | xargs kill -9'", runs=True),
    service("netns-kill", "a network namespace", "ExecStart={guest}",
            "ExecStop=/sbin/ip netns exec web kill -9 $MAINPID"),
    service("savevm", "a state that -loadvm returns to", "ExecStart={guest}",
            "ExecStop=/bin/sh -c 'printf \"savevm a\\nquit\\n\" | socat - UNIX-CONNECT:{monitor}'",
            verdict=UNKNOWN),
    service("copies-back", "an image in memory, copied back when the guest is gone",
            "ExecStart={guest}", "ExecStop=/bin/kill $MAINPID",
            "ExecStop=/bin/sh -c 'while kill -0 $MAINPID; do sleep 0.1; done'",
            "ExecStop=/bin/cp /run/corpus/web.img /srv/web.img"),
    service("commits", "an overlay that is committed when the guest is gone",
            "ExecStart={guest}", f"ExecStop=/bin/sh -c '{QUIT}'",
            "ExecStop=/usr/bin/qemu-img commit /srv/overlay.qcow2"),
    service("commits-in-shell", "the same by the shell around QEMU, which ignores SIGTERM",
            "ExecStart=/bin/sh -c 'trap \"\" TERM; {guest}; qemu-img commit /srv/o.qcow2'",
            verdict=UNKNOWN),
    service("kills-others", "every QEMU of the host, after each stop", "ExecStart={guest}",
            "ExecStopPost=-/usr/bin/pkill -9 qemu-system", verdict=MANUAL),
    service("kills-others-first", "every QEMU of the host, before each start",
            "ExecStartPre=-/usr/bin/killall -9 qemu-system-x86_64", "ExecStart={guest}",
            verdict=MANUAL),
    # ---- sandboxes ----
    service("no-exec", "NoExecPaths=", "ExecStart={guest}", "NoExecPaths=/",
            "ExecPaths=/usr/bin/qemu-system-x86_64 /usr/lib /lib /lib64"),
    service("empty-root", "a file system with the necessary parts only", "ExecStart={guest}",
            "TemporaryFileSystem=/", "BindPaths=/usr /lib /lib64 /bin /etc /run/corpus"),
    service("inet-only", "RestrictAddressFamilies=AF_INET AF_INET6", "ExecStart={mute}",
            "RestrictAddressFamilies=AF_INET AF_INET6", runs=True),
    service("no-bus", "InaccessiblePaths=/run/dbus", "ExecStart={guest}",
            "InaccessiblePaths=/run/dbus", runs=True),
    service("own-root", "RootDirectory=", "ExecStart={guest}", "RootDirectory=/srv/root"),
    service("theirs", "a user's unit with an EnvironmentFile= that the user may write",
            "ExecStart={mute}", "User=nobody", "EnvironmentFile=-/home/nobody/env",
            "RestrictAddressFamilies=AF_INET", verdict=NO_BETTER),
    service("user", "User= and a strict sandbox", "ExecStart={mute}", "User=nobody",
            "ProtectProc=invisible", "PrivateUsers=yes"),
    # ---- hostile ----
    service("hostile-quote", "quotes that do not close in the stop line", "ExecStart={guest}",
            "ExecStop=/bin/sh -c 'kill -9 \"'", verdict=UNKNOWN),
    service("hostile-long", "a stop line of 60 kB", "ExecStart={guest}",
            "ExecStop=/bin/sh -c '" + "true;" * 12000 + "'"),
    service("hostile-deep", "shells within shells", "ExecStart={guest}",
            "ExecStop=/bin/sh -c '" + "(" * 40 + "true" + ")" * 40 + "'", verdict=UNKNOWN),
    service("hostile-name", "a line break in the guest's name", "ExecStart={guest} -name \"a\\nb\"",
            "ExecStop=/bin/kill -9 $MAINPID"),
    # ---- scopes ----
    Structure("run-plain.scope", "systemd-run --scope", "TimeoutStopSec=5", SAFE,
              starts=("run-plain.scope",), runs=True),
    Structure("100.scope", "Proxmox VE, qemu-server: its scope and pve-guests.service",
              "KillMode=process\nSendSIGKILL=no\nTimeoutStopSec=infinity\n"
              "Before=pve-guests.service", SAFE, starts=("pve-guests.service", "100.scope"),
              files={"pve-guests.service":
                     "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
                     "ExecStop=/usr/local/bin/corpus-wait {monitor}\n"},
              runs=True, stand_in=True),
    Structure("vmpcmk.scope", "pacemaker: resources have to outlive their scopes",
              "TimeoutStopSec=10\nBefore=pacemaker.service", SAFE,
              starts=("pacemaker.service", "vmpcmk.scope"),
              files={"pacemaker.service":
                     "[Service]\nExecStart=/usr/bin/sleep infinity\n"
                     "ExecStop=/usr/local/bin/corpus-wait {monitor}\n"},
              runs=True, stand_in=True),
    Structure("machine-qemu-1-web.scope", "libvirt and libvirt-guests.service",
              "Before=libvirt-guests.service\nTimeoutStopSec=90", SAFE,
              starts=("libvirt-guests.service", "machine-qemu-1-web.scope"),
              files={"libvirt-guests.service":
                     "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
                     "ExecStop=/usr/local/bin/corpus-wait {monitor}\nTimeoutStopSec=0\n"},
              runs=True, stand_in=True),
    Structure("docker-0c1d.scope", "docker: the entry script turns SIGTERM into the button",
              "TimeoutStopSec=10", SAFE,
              starts=("docker-0c1d.scope",), stand_in=True),
)  # fmt: skip
