"""Connect to a monitor on TCP or an abstract socket, and pass the connection to the daemon, which
cannot reach the monitor itself.

The helper runs in the network namespace of its unit, which is usually that of the guest. If the
guest is in another namespace, only a helper that runs as root can enter that namespace.
"""

from __future__ import annotations

import threading
from typing import Final

from qkilld.adapters import procfs
from qkilld.debug_log import ignore, note
from qkilld.model.errors import QkilldError
from qkilld.monitor.reach import connect_passable
from qkilld.stop.guest_stop import GuestStop

TIMEOUT_S: Final = 3.0
"""The limit for all steps together, because a hostile process can delay each step."""


def connect_monitor(stop: GuestStop) -> None:
    """Connect to the guest's monitor if the daemon cannot do so itself, and set stop.monitor."""
    lock = threading.Lock()
    late = False

    def work() -> None:
        pid, connection = stop.process.pid, None
        with ignore(f"reading what process {pid} listens on", OSError, QkilldError):
            connection = connect_passable(procfs.read_identity(pid))
        with lock:
            if connection is not None and not late and not stop.process.exited():
                stop.monitor = connection.detach()
            elif connection is not None:
                connection.close()

    # Do this in a thread, because `work` changes the thread's network namespace, and may block.
    thread = threading.Thread(target=work, name="monitor", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # The system allows no more threads.
        note("starting a thread to connect to a monitor", error)
        return
    thread.join(TIMEOUT_S)
    with lock:
        late = True
