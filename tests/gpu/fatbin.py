"""Takes the machine code of other architectures than one out of a CUDA library, whose layout stays: most of it is then zeros.

NVIDIA documents only a fat binary's outer header (``fatbinary_section.h`` of the CUDA toolkit); an entry's is as onnxruntime-gpu
1.31.1's libraries have it. What does not read as such to its last byte is left alone.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Magic number, version, this header's bytes, those of all entries.
HEADER = struct.Struct("<IHHQ")
MAGIC, VERSION = 0xBA55ED50, 1
# Of an entry: kind, version, its header's bytes, its content's, 12 bytes of other things, architecture.
ENTRY = struct.Struct("<HHIQ12xI")
KINDS = (1, 2)  # PTX, machine code
LIBRARY = "libonnxruntime_providers_cuda.so"


class Entry(NamedTuple):
    """Where an entry lies in the library, with its header, and what it is for: 90 for devices of compute capability 9.0."""

    start: int
    end: int
    architecture: int


def keep_only(library: bytearray, architecture: int) -> None:
    """Keep the entries of one architecture, where a fat binary has any. Raises ValueError when none in the library has."""
    seen: set[int] = set()
    for start, entries in fat_binaries(library):
        seen.update(entry.architecture for entry in entries)
        kept = b"".join(library[entry.start : entry.end] for entry in entries if entry.architecture == architecture)
        if kept:
            first, end = entries[0].start, entries[-1].end
            library[first:end] = kept.ljust(end - first, b"\0")
            HEADER.pack_into(library, start, MAGIC, VERSION, HEADER.size, len(kept))
    if architecture not in seen:
        raise ValueError(
            f"no machine code for {architecture}; there is some for {', '.join(map(str, sorted(seen))) or 'nothing'}"
        )


def fat_binaries(library: bytearray) -> Iterator[tuple[int, list[Entry]]]:
    """Each fat binary's start and entries."""
    magic, at = struct.pack("<I", MAGIC), 0
    while (at := library.find(magic, at)) >= 0:
        entries = _entries(library, at)
        if entries:
            yield at, entries
        at = entries[-1].end if entries else at + 1


def _entries(library: bytearray, start: int) -> list[Entry]:
    """Of a fat binary; none where there is something else."""
    if start + HEADER.size > len(library):
        return []
    _, version, header_bytes, size = HEADER.unpack_from(library, start)
    at, end = start + HEADER.size, start + HEADER.size + size
    if (version, header_bytes) != (VERSION, HEADER.size) or end > len(library):
        return []
    entries = []
    while at + ENTRY.size <= end:
        kind, _, own_bytes, content_bytes, architecture = ENTRY.unpack_from(library, at)
        entries.append(Entry(at, at + own_bytes + content_bytes, architecture))
        if kind not in KINDS or own_bytes < ENTRY.size:
            return []
        at = entries[-1].end
    return entries if at == end else []


def slim_wheel(wheel: Path, architecture: int) -> None:
    """Rewrite a wheel with one architecture's machine code in ONNX Runtime's CUDA library. RECORD keeps the old digest: pip does
    not look at it."""
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as rewritten:
        for member in whole.infolist():
            content = whole.read(member)
            if member.filename.endswith(LIBRARY):
                library = bytearray(content)
                keep_only(library, architecture)
                content = bytes(library)
            rewritten.writestr(member, content, zipfile.ZIP_DEFLATED)
    slim.replace(wheel)
