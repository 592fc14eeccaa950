"""polkit's actions and answers, and the rights of callers."""

from __future__ import annotations

from enum import Enum, IntEnum, StrEnum

from qkilld.model.guest import Identity
from qkilld.model.named_tuple import NamedTuple


class PolkitAction(StrEnum):
    """The actions of packaging/org.qkilld1.policy. FORCE implies TERMINATE."""

    TERMINATE = "org.qkilld1.terminate"
    FORCE = "org.qkilld1.force"
    INSPECT = "org.qkilld1.inspect"


class Answer(Enum):
    """polkit's answer for a caller who does not own the process."""

    GRANTED = "granted"
    DENIED = "denied"
    """polkit denied the request, could not be asked, or did not answer."""
    CHALLENGE = "challenge"
    """polkit could ask for a password, but the caller did not allow that."""


class Rank(IntEnum):
    """The right by which a caller stops a process or steers its job."""

    OWNER = 0
    """The caller owns the process."""
    AUTHORIZED = 1
    """polkit authorized the caller."""
    ROOT = 2


class Steerer(NamedTuple):
    """A caller who was permitted to steer a job."""

    uid: int
    rank: Rank


def rank_of(uid: int, identity: Identity) -> Rank:
    """Return the rank of a caller who was permitted to stop this process."""
    if uid == 0:
        return Rank.ROOT
    return Rank.OWNER if uid == identity.uid else Rank.AUTHORIZED
