"""What happened to sandboxes on this host, in the order it happened: append-only, durable before it is acted on, bounded.

    <state>/journal/<seq of its first event, 20 digits>.log     segments; docs/journal.md has the format

A torn tail is cut when the journal is opened, for nothing in it was ever acted on. A line that is unreadable in the middle is a
damaged disk: it is passed over and told in the log, for what evidence is left is worth more than a host that does not start.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import structlog

from fleet.errors import HostFaultError
from fleet.model.event import Event
from fleet.model.units import MIB
from hostd.files import disk_faults, sync_folder

SUFFIX = ".log"
# Some 25,000 events each: a month of a busy host in all, and little beside one sandbox's disk.
SEGMENT_BYTES_MAX = 8 * MIB
SEGMENTS_MAX = 8
# A detail is cut to DETAIL_CHARS_MAX characters of at most 12 bytes (escaped astral ones); everything else is shorter than 1 KiB.
LINE_BYTES_MAX = 16 * 1024
DETAIL_CHARS_MAX = 500
# What one look at the journal reads at most, so that a reader of everything holds no more than this.
READ_BYTES = MIB

_DEFAULTS = {field.name: field.default for field in fields(Event)}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the journal: a segment by its first event's number, and an offset in it."""

    segment: int = 0
    offset: int = 0


class Journal:
    """One host's journal; `origin` is what its events name as theirs, "host/<id>". One process writes it."""

    def __init__(self, folder: Path, origin: str) -> None:
        self.origin = origin
        self._dir = folder
        self._listeners: list[Callable[[], None]] = []
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        segments = self._segments()
        self._segment = segments[-1] if segments else 1
        self._size = 0
        self._next_seq = self._segment
        if segments:
            self._mend()

    def on_append(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every append."""
        self._listeners.append(listener)

    def append(self, events: Sequence[Event]) -> None:
        """Writes events durably, with this journal's origin and numbers of its own; raises HostFaultError `disk_failed`.

        All of them are in it afterwards, or none.
        """
        if not events:
            return
        numbered = [
            replace(event, origin=self.origin, seq=self._next_seq + index, detail=event.detail[:DETAIL_CHARS_MAX])
            for index, event in enumerate(events)
        ]
        content = b"".join(map(encode_line, numbered))
        if self._size and self._size + len(content) > SEGMENT_BYTES_MAX:
            self._begin_segment()
        self._write(content)
        self._next_seq += len(events)
        for listener in self._listeners:
            listener()

    def read(self, cursor: Cursor, *words: str) -> tuple[list[Event], Cursor]:
        """The events from `cursor` on whose lines hold all `words` (ids, tenants), and where to go on; READ_BYTES at most.

        Blocks on the disk. At the end of what there is the cursor stays. Segments that are gone meanwhile are passed over.
        """
        segments = [segment for segment in self._segments() if segment >= cursor.segment]
        if not segments:
            return [], cursor
        offset = cursor.offset if segments[0] == cursor.segment else 0
        try:
            with self._path(segments[0]).open("rb") as stream:
                stream.seek(offset)
                content = stream.read(READ_BYTES)
        except FileNotFoundError:
            return [], Cursor(segments[0] + 1)
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return [], Cursor(segments[1]) if len(segments) > 1 else Cursor(segments[0], offset)
        needles = [json.dumps(word).encode() for word in words]
        lines = [line for line in whole.splitlines() if all(needle in line for needle in needles)]
        return [event for line in lines if (event := decode_line(line))], Cursor(segments[0], offset + len(whole))

    def _write(self, content: bytes) -> None:
        path = self._path(self._segment)
        with disk_faults(path):
            is_new = not path.exists()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # What an append that failed has left is overwritten, or cut.
                os.ftruncate(descriptor, self._size)
                _write_all(descriptor, content, self._size)
                os.fdatasync(descriptor)
            except OSError:
                os.ftruncate(descriptor, self._size)
                raise
            finally:
                os.close(descriptor)
        if is_new:
            sync_folder(self._dir)
        self._size += len(content)

    def _begin_segment(self) -> None:
        self._segment, self._size = self._next_seq, 0
        for segment in self._segments()[: -(SEGMENTS_MAX - 1)]:
            with disk_faults(self._path(segment)):
                self._path(segment).unlink(missing_ok=True)

    def _mend(self) -> None:
        """Finds where the last segment ends, cuts its torn tail, and goes on counting after all that it holds."""
        path = self._path(self._segment)
        with disk_faults(path):
            content = path.read_bytes()
        lines = list(_lines(content))
        end = max((stop for stop, event in lines if event is not None), default=0)
        if end < len(content):
            log.warning("journal.tail_cut", path=str(path), bytes=len(content) - end)
            with disk_faults(path):
                os.truncate(path, end)
        damaged = sum(1 for stop, event in lines if event is None and stop < end)
        if damaged:
            log.error("journal.lines_unreadable", path=str(path), lines=damaged)
        self._size = end
        self._next_seq = max([self._segment, *(event.seq + 1 for _, event in lines if event is not None)])

    def _segments(self) -> list[int]:
        names = [path.name.removesuffix(SUFFIX) for path in self._dir.glob("*" + SUFFIX)]
        return sorted(int(name) for name in names if name.isdecimal())

    def _path(self, segment: int) -> Path:
        return self._dir / f"{segment:020d}{SUFFIX}"


def encode_line(event: Event) -> bytes:
    """An event as its line: CRC-32 of the JSON in 8 hex digits, a space, the JSON without what is at its default."""
    given = {name: value for name, value in asdict(event).items() if _DEFAULTS[name] != value}
    content = json.dumps(given, separators=(",", ":")).encode()
    line = b"%08x %s\n" % (zlib.crc32(content), content)
    if len(line) > LINE_BYTES_MAX:
        raise HostFaultError("event_too_long", f"an event of {len(line)} bytes", "report it")
    return line


def decode_line(line: bytes) -> Event | None:
    """The event of a line, None when it has none that is whole."""
    checksum, _, content = line.rstrip(b"\n").partition(b" ")
    if len(line) > LINE_BYTES_MAX or checksum != b"%08x" % zlib.crc32(content):
        return None
    try:
        given: Any = json.loads(content)
        return Event(**{name: given[name] for name in given if name in _DEFAULTS})
    except (ValueError, TypeError):
        return None


def _lines(content: bytes) -> Iterator[tuple[int, Event | None]]:
    """Each line's end with its event; a last line without its newline is none."""
    offset = 0
    while (stop := content.find(b"\n", offset) + 1) > 0:
        yield stop, decode_line(content[offset:stop])
        offset = stop


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)
