"""The parts of a D-Bus library that qkilld uses: outgoing messages, their types, authentication.

The library is dbus-next. If dbus-next is missing or cannot be imported, as under Python 3.15, the
library is dbus-fast, its maintained successor with the same API. Connecting and parsing are done in
bus.transport, bus.framing and bus.values, because both libraries keep every signature that they
have ever parsed, and their releases connect in different ways.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Prevent both libraries from importing GLib for an event loop that is not used here. This saves
# memory, which is locked while jobs run.
sys.modules.setdefault("gi", None)  # type: ignore[arg-type]


def _add_bare_package(name: str) -> None:
    """Allow importing modules of a package without running its __init__.py, which imports all
    modules and so takes 0.7 MB of memory and 5 ms."""
    spec = PathFinder.find_spec(name)
    if name not in sys.modules and spec is not None and spec.submodule_search_locations:
        package = ModuleType(name)
        package.__path__ = spec.submodule_search_locations
        sys.modules[name] = package


if TYPE_CHECKING:
    from dbus_next._private.address import get_bus_address, parse_address
    from dbus_next._private.marshaller import Marshaller
    from dbus_next.auth import AuthExternal
    from dbus_next.constants import BusType, MessageFlag, MessageType, NameFlag, RequestNameReply
    from dbus_next.errors import AuthError, InvalidAddressError
    from dbus_next.message import Message
    from dbus_next.signature import Variant
else:
    _add_bare_package("dbus_next")
    try:
        from dbus_next._private.address import get_bus_address, parse_address
        from dbus_next._private.marshaller import Marshaller
        from dbus_next.auth import AuthExternal
        from dbus_next.constants import (
            BusType,
            MessageFlag,
            MessageType,
            NameFlag,
            RequestNameReply,
        )
        from dbus_next.errors import AuthError, InvalidAddressError
        from dbus_next.message import Message
        from dbus_next.signature import Variant
    except Exception as dbus_next_error:
        # A library that is too old for its Python can raise any exception.
        try:
            from dbus_fast._private.address import get_bus_address, parse_address
            from dbus_fast._private.marshaller import Marshaller
            from dbus_fast.auth import AuthExternal
            from dbus_fast.constants import (
                BusType,
                MessageFlag,
                MessageType,
                NameFlag,
                RequestNameReply,
            )
            from dbus_fast.errors import AuthError, InvalidAddressError
            from dbus_fast.message import Message
            from dbus_fast.signature import Variant
        except Exception as dbus_fast_error:
            raise ImportError(
                f"neither dbus-next ({dbus_next_error}) nor dbus-fast ({dbus_fast_error}) can be "
                "used; install one of them (Debian: python3-dbus-next, python3-dbus-fast)"
            ) from None

__all__ = [
    "AuthError",
    "AuthExternal",
    "BusType",
    "InvalidAddressError",
    "Message",
    "MessageFlag",
    "MessageType",
    "NameFlag",
    "RequestNameReply",
    "Variant",
    "encode",
    "encode_body",
    "get_bus_address",
    "parse_address",
]


def encode(message: Message) -> bytes | bytearray:
    """Encode a message, whose serial must be set. The caller must send the message's
    descriptors."""
    encoded: bytes | bytearray = message._marshall(bool(message.unix_fds))
    return encoded


def encode_body(signature: str, body: list[Any]) -> bytearray:
    """Encode values as they are in the body of a message, in little-endian byte order."""
    encoded: bytearray = Marshaller(signature, body).marshall()
    return encoded
