"""A journal entry, and the ids of all kinds of entries.

engine.events and stop.helper_events write the texts; packaging/qkilld.catalog explains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import Enum, IntEnum

from qkilld.model.dataclass import dataclass
from qkilld.model.guest import Guest


class Priority(IntEnum):
    """syslog(3)."""

    ERR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


class MessageId(Enum):
    """128-bit ids that never change: sd_journal_print(3), sd-id128(3)."""

    JOB_STARTED = "93375c572f1241ecb4db7298ec382174"
    SIGNAL_SENT = "ccad3eab18e747ca8bd4d129b46e422b"
    GUEST_ASKED = "3d0d1fbc3c2e4f0a8d2b6f7b1f0b9c55"
    ASKING_ENDED = "b0a6a3d1a4d94c0e9f0c7a5e6b1d2f48"
    DISKS_FLUSHED = "5c1e0b6f2a8d4f0f9d3a7be41c96d2e8"
    STORAGE_CUT_OFF = "e2f6b14c7a0d4f5c8f39d60ab1c75e94"
    SIGNAL_REFUSED = "62abee31bee64db4a88fd9002b90364c"
    PROCESS_CHANGED = "7ea1d952ce8b470985d1d75d1eeb5924"
    JOB_JOINED = "c8c755af4e2845c19090e03b3e3a13f9"
    JOB_HELD = "a851f57cd0b7424ebf499d2dd53e0f98"
    JOB_RELEASED = "22673d96e4b847b79f61214935d7ade4"
    JOB_EXTENDED = "751f26c2bdeb494fabe9468dfb1d6f67"
    JOB_FORCED = "fe4506d5abf84ff1bd46b11e479f4a20"
    JOB_RESUMED = "575356985b7542e3a54687417a1c5574"
    VERDICT_TURNED = "b5f7ec2ec2a74611bdca05783a342ee5"
    JOB_ENDED = "133dbb3477ca47cead6af608bc47d331"
    STOPS_ENDED = "0f3b9a6c52d74e1f8c7e2d90b5a1464d"
    WAITER_GONE = "1f5ff25c6abd4224b9ae4c60a4145f06"
    STOP_ALONE = "c1f0507f40cf4584baa4ffa57f19fca8"
    STOP_LIMITED = "93527dfc2b7c4c21b6169eafece6a83b"
    STOP_GIVEN_UP = "ef381959bfb844e5834fb0c03d6fe765"
    STOP_KEPT = "6a0b7ed1b3e24c0f9b1c7a4c2f6e58d3"
    STOP_OVERRUN = "125b2a8d9523474a8fd4b435ae168ab9"
    SURVIVOR_GONE = "510528c7fbaf4685a07faadc86df8447"
    DAEMON_STARTED = "880a8eefeebd4e2aaa3c6396bda9897d"
    DAEMON_STOPPING = "032598709f0d4d6cae7cfd4082fc0502"
    BUS_LOST = "60d83e4c547c45cfacf4e19d579c9823"
    TRACES_FAILED = "c6c3ace9256b422fb10fff9c5c2c71b3"
    STATE_SET_ASIDE = "d92afc3557914f139c26cb181452269e"
    STATE_FAILED = "3c8417b2ed8447dcbd17c90d388a29a8"
    NOT_WRITTEN = "af473aa7d5fa445597ef271d27b2ab95"
    MEMORY_NOT_LOCKED = "69983a44334c4f53b5ca8811a33f4297"
    NOT_STOPPED = "f27725a9e32549bc841e54b783885a6e"
    NOT_IDENTIFIED = "1734c2cfe08d4bdaaea7b91f55ed69fe"
    ENTRIES_DROPPED = "3428b7c108d846ea9d4277fb84d3000f"
    INTERNAL_ERROR = "d633f10750c743be8ac731e94b8805a9"


@dataclass(frozen=True, slots=True)
class Event:
    id: MessageId
    priority: Priority
    message: str
    """One printable line."""
    guest: Guest | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
