"""qkilld: stop QEMU guests on evidence instead of after a fixed timeout."""

__version__ = "1.0.0"
