"""When output arrived: beside each output file, a bounded list of times and the offsets at which they began.

An entry is two 64-bit numbers, big endian: milliseconds since 1970, and the offset of the first byte that arrived then. At most one
a second. In a list that is full every two entries become one, so that an old moment is found less exactly.
"""

import os
import struct
from pathlib import Path

_ENTRY = struct.Struct(">QQ")
# Output that comes later than this after an entry gets one of its own.
RESOLUTION_MS = 1000
# Nine hours of output without a pause before anything is thinned out; 512 KiB.
ENTRIES_MAX = 32 * 1024
# What one search for line ends holds in memory.
_BLOCK_BYTES = 64 * 1024


def moments_path(output_path: Path) -> Path:
    """Where the moments of an output file are kept; no agent has such a name."""
    return output_path.with_name(f".{output_path.name}.moments")


def note_moment(output_path: Path, offset: int, at_ms: int) -> None:
    """Notes that the byte at `offset` arrives now; raises OSError. Two system calls when the second has an entry already."""
    path = moments_path(output_path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        count = os.fstat(descriptor).st_size // _ENTRY.size
        if count:
            last_ms, _ = _ENTRY.unpack(os.pread(descriptor, _ENTRY.size, (count - 1) * _ENTRY.size))
            if at_ms < last_ms + RESOLUTION_MS:
                return
        os.pwrite(descriptor, _ENTRY.pack(at_ms, offset), count * _ENTRY.size)
    finally:
        os.close(descriptor)
    if count + 1 >= ENTRIES_MAX:
        _thin(path)


def find_moment(output_path: Path, since_ms: int) -> int:
    """The offset from which on output arrived at `since_ms` or later, to a second; the file's end when none did."""
    size_bytes = output_path.stat().st_size if output_path.exists() else 0
    path = moments_path(output_path)
    if not path.exists():
        return 0
    content = path.read_bytes()
    for at_ms, offset in _ENTRY.iter_unpack(content[: len(content) // _ENTRY.size * _ENTRY.size]):
        if at_ms + RESOLUTION_MS > since_ms:
            return min(int(offset), size_bytes)
    return size_bytes


def find_tail(output_path: Path, lines: int) -> int:
    """The offset at which the last `lines` lines begin; a last line without its end counts. Reads from the end."""
    if not output_path.exists():
        return 0
    with output_path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        position, wanted = end, lines
        while position > 0:
            start = max(0, position - _BLOCK_BYTES)
            stream.seek(start)
            block = stream.read(position - start)
            index = len(block)
            while (index := block.rfind(b"\n", 0, index)) >= 0:
                if start + index == end - 1:
                    continue
                wanted -= 1
                if wanted == 0:
                    return start + index + 1
            position = start
    return 0


def _thin(path: Path) -> None:
    entries = list(_ENTRY.iter_unpack(path.read_bytes()))
    temporary = path.with_name(path.name + ".new")
    # The offset of the first with the time of the second: whoever asks for less than that time still gets all that came after it.
    pairs = [(entries[index + 1][0], entries[index][1]) for index in range(0, len(entries) - 1, 2)]
    temporary.write_bytes(b"".join(_ENTRY.pack(*entry) for entry in pairs))
    temporary.replace(path)
