"""Find the records of a writer guest in an image."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.process import run
from tests.lab.scratch import scratch

BLOCK: Final = 4096
_HEADER: Final = struct.Struct("<8sQQ")
_MAGIC: Final = b"QKLABREC"
_MASK: Final = 2**64 - 1


def records(image: Path | str, format: str = "qcow2") -> set[int]:
    """Return the numbers of the valid records in an image. No process may have the image open.

    A block that is marked as a record but has a wrong checksum does not count.
    """
    with scratch("r") as directory:
        raw = directory / "raw"
        qemu_img = needs.program("qemu-img", "qemu-utils")
        run([qemu_img, "convert", "-f", format, "-O", "raw", image, raw], check=True, timeout=600)
        return _scan(raw)


def _scan(raw: Path) -> set[int]:
    found = set()
    with raw.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < size:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:  # Only a hole follows.
                break
            offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            file.seek(start - start % BLOCK)
            while file.tell() < offset and len(block := file.read(BLOCK)) == BLOCK:
                magic, number, checksum = _HEADER.unpack_from(block)
                if magic == _MAGIC and checksum == _fnv1a(block[_HEADER.size :]):
                    found.add(number)
    return found


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return value
