"""What left a sandbox or was denied, as its host saw it: one bounded file for each sandbox, which goes with the sandbox.

    <state>/sandboxes/<id>/network.log      one JSON line for each event; full, it becomes network.log.old, and that is gone

Denials are never sampled: alike ones of one look are one event with their number. What the kernel has counted is in the file
beside what was told of it, so that a hostd that starts again tells the rest, and nothing twice.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import structlog

from fleet.errors import HostFaultError
from fleet.model.assignment import Assignment
from fleet.model.egress import NetworkEvent, NetworkEventKind
from fleet.model.ids import SandboxId
from fleet.model.units import KIB
from hostd.files import disk_faults

NAME = "network.log"
# Two of them are kept: some 8,000 events, and little beside the smallest disk.
LOG_BYTES_MAX = 512 * KIB
# Seven causes, each at most once a look: whoever says more than this is no listing of ours.
CAUSES_MAX = 64

_DEFAULTS = {one.name: one.default for one in fields(NetworkEvent)}

log = structlog.get_logger()


@dataclass(slots=True)
class _Book:
    """Where a sandbox's file has come to: the last event's number, and what of each cause was counted and told."""

    seq: int = 0
    totals: dict[str, int] = field(default_factory=dict)


class Traffic:
    """The network logs of this host's sandboxes; `folder` says where each has its files. One process writes them."""

    def __init__(self, folder: Callable[[SandboxId], Path], now_ms: Callable[[], int]) -> None:
        self._folder = folder
        self._now_ms = now_ms
        self._books: dict[SandboxId, _Book] = {}
        self._listeners: list[Callable[[], None]] = []

    def on_append(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every append."""
        self._listeners.append(listener)

    def note_drops(self, order: Assignment, drops: Mapping[str, int], *, is_last: bool = False) -> None:
        """Records what the kernel has dropped of a sandbox since its rules were made, by cause, as far as it is new.

        `is_last`: the rules are gone, the next count begins at 0. Raises HostFaultError `disk_failed`; the next look then tells it.
        """
        if not self._folder(order.sandbox_id).is_dir():
            # It is being removed, and its log is gone with it.
            return
        book = self._book(order.sandbox_id)
        counted = dict(sorted(drops.items())[:CAUSES_MAX])
        lines: list[dict[str, Any]] = []
        totals, seq = dict(book.totals), book.seq
        for cause, packets in counted.items():
            known = book.totals.get(cause, 0)
            # A counter that went back belongs to rules that were made anew.
            new = packets - known if packets >= known else packets
            if new:
                seq, totals[cause] = seq + 1, packets
                lines.append({"event": _given(self._frames(order, seq, cause, new)), "total": packets})
        if is_last and totals:
            totals = {}
            lines.append({"totals": totals, "seq": seq})
        if lines:
            self._append(order.sandbox_id, lines, book)
            book.seq, book.totals = seq, totals
            for listener in self._listeners:
                listener()

    def newest(self, sandbox_id: SandboxId) -> int:
        """The number of a sandbox's last event; 0 when it has none."""
        return self._book(sandbox_id).seq

    def read(self, sandbox_id: SandboxId, after_seq: int = 0) -> list[NetworkEvent]:
        """The events that are kept, past a number, in their order; at most the two files. Blocks on the disk."""
        path = self._folder(sandbox_id) / NAME
        with disk_faults(path):
            lines = [*_read_lines(_old(path)), *_read_lines(path)]
        events = (_to_event(line) for line in lines)
        return [event for event in events if event is not None and event.seq > after_seq]

    def forget(self, known: Callable[[SandboxId], bool]) -> None:
        """Lets go of what it remembers of sandboxes that are not known any more; their files are gone with them."""
        self._books = {sandbox_id: book for sandbox_id, book in self._books.items() if known(sandbox_id)}

    def _frames(self, order: Assignment, seq: int, cause: str, packets: int) -> NetworkEvent:
        return NetworkEvent(
            sandbox_id=order.sandbox_id,
            tenant=order.tenant,
            seq=seq,
            at_ms=self._now_ms(),
            kind=NetworkEventKind.FRAMES,
            is_denied=True,
            reason=cause,
            count=packets,
        )

    def _book(self, sandbox_id: SandboxId) -> _Book:
        if sandbox_id not in self._books:
            path = self._folder(sandbox_id) / NAME
            with disk_faults(path):
                _cut_torn_tail(path)
                self._books[sandbox_id] = _fold([*_read_lines(_old(path)), *_read_lines(path)])
        return self._books[sandbox_id]

    def _append(self, sandbox_id: SandboxId, lines: list[dict[str, Any]], book: _Book) -> None:
        path = self._folder(sandbox_id) / NAME
        content = _render(lines)
        with disk_faults(path):
            size = path.stat().st_size if path.exists() else 0
            if size and size + len(content) > LOG_BYTES_MAX:
                path.replace(_old(path))
                # What was counted so far begins the new file: the old one is gone at the next change.
                content, size = _render([{"totals": book.totals, "seq": book.seq}]) + content, 0
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # What an append that failed has left is overwritten.
                os.ftruncate(handle, size)
                if os.pwrite(handle, content, size) < len(content):
                    raise HostFaultError("disk_failed", f"{path}: it takes no more", "free space on the host")
            except (OSError, HostFaultError):
                os.ftruncate(handle, size)
                raise
            finally:
                os.close(handle)


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _given(event: NetworkEvent) -> dict[str, Any]:
    return {name: value for name, value in asdict(event).items() if _DEFAULTS[name] != value}


def _render(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is bounded by LOG_BYTES_MAX; what is unreadable is passed over and told in the log."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines, damaged = [], 0
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and _is_line(value):
            lines.append(value)
        else:
            damaged += 1
    if damaged:
        log.error("traffic.lines_unreadable", path=str(path), lines=damaged)
    return lines


def _is_line(value: dict[str, Any]) -> bool:
    """Whether it is one that this module writes: numbers where it reads numbers."""
    totals = value.get("totals", {})
    numbers = [value.get("total", 0), value.get("seq", 0), *(totals.values() if isinstance(totals, dict) else [None])]
    event = value.get("event", {})
    if not isinstance(event, dict) or not all(isinstance(number, int) for number in numbers):
        return False
    return all(isinstance(event.get(name, 0), int) for name in ("seq", "at_ms", "count"))


def _fold(lines: list[dict[str, Any]]) -> _Book:
    book = _Book()
    for line in lines:
        event = _to_event(line)
        if event is not None:
            book.seq = max(book.seq, event.seq)
            book.totals[event.reason] = line.get("total", 0)
        elif "totals" in line:
            book.seq = max(book.seq, line.get("seq", 0))
            book.totals = dict(line["totals"])
    return book


def _to_event(line: dict[str, Any]) -> NetworkEvent | None:
    given = line.get("event")
    if not isinstance(given, dict):
        return None
    try:
        return NetworkEvent(**{name: given[name] for name in given if name in _DEFAULTS})
    except TypeError:
        return None


def _cut_torn_tail(path: Path) -> None:
    """A line that a crash has cut short would swallow the next one."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        log.warning("traffic.tail_cut", path=str(path), bytes=len(content) - end)
        os.truncate(path, end)
