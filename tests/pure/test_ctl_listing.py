"""The JSON of qkillctl inspect."""

from __future__ import annotations

from qkilld.ctl.listing import inspection_as_json
from qkilld.model.constants import UNKNOWN


def test_what_inspect_returns_has_keys_and_null_for_unknown() -> None:
    answer = {
        "term-pending": False,
        "waiting-threads": [[7, "worker", "D", "io_schedule"]],
        "devices": [["vda", "254:0", 512, 1]],
        "sockets": [["inet", True, 9, 2]],
        "mounts": [["nfs4", 12], ["overlay", UNKNOWN]],
    }
    assert inspection_as_json(answer) == {
        "term_pending": False,
        "waiting_threads": [{"tid": 7, "name": "worker", "state": "D", "function": "io_schedule"}],
        "devices": [{"name": "vda", "number": "254:0", "bytes_written": 512, "in_flight": 1}],
        "sockets": [
            {"family": "inet", "connected": True, "send_queue_bytes": 9, "unacknowledged": 2}
        ],
        "mounts": [{"type": "nfs4", "answers": 12}, {"type": "overlay", "answers": None}],
    }
