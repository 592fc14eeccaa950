"""qkilld: stop QEMU guests on evidence instead of by the clock."""

__version__ = "0.1.0"
