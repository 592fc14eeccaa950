"""Named tuples that are cheap to define.

typing.NamedTuple compiles the annotation of each field, and the first compilation in a program
creates the classes of Python's syntax trees. Together, this takes 0.2 MB. Only mypy checks that
fields with a default come last.
"""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:

    class _Builder(type):
        def __new__(cls, name, bases, namespace):
            if not bases:
                return super().__new__(cls, name, bases, namespace)
            fields = namespace["__annotations__"]
            defaults = [namespace[field] for field in fields if field in namespace]
            module = namespace["__module__"]
            made = namedtuple(name, fields, defaults=defaults, module=module)
            for attribute in namespace.keys() - fields.keys():
                setattr(made, attribute, namespace[attribute])
            return made

    class NamedTuple(metaclass=_Builder):
        """The base of classes whose annotations are the fields, like typing.NamedTuple."""
