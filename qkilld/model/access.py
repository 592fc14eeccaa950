"""What a caller may have to be authorized for, and what polkit says of it."""

from __future__ import annotations

from enum import Enum, StrEnum


class Action(StrEnum):
    """The actions of packaging/org.qkilld1.policy. Who holds FORCE holds TERMINATE, too."""

    TERMINATE = "org.qkilld1.terminate"
    FORCE = "org.qkilld1.force"
    INSPECT = "org.qkilld1.inspect"


class Answer(Enum):
    """Whether a caller may do something that is not theirs by right."""

    GRANTED = "granted"
    DENIED = "denied"
    """Also where nobody could be asked, or no answer came."""
    CHALLENGE = "challenge"
    """Not as it stands; it may be if somebody is asked, which the caller did not allow."""
