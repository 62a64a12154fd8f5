"""Keeps a program's Revocations equal to what the store says."""

from collections.abc import Iterable

import structlog

from fleet.codec import decode
from fleet.errors import BedplateError
from fleet.model.enrolment import HostBar
from fleet.model.ids import HostId
from fleet.revocation import Revocations
from fleet.store.keyspace import BARRED, REVOKED
from fleet.store.mirror import Mirror
from fleet.store.port import KeyValue, Store

# A bar that cannot be read bars for ever: opaque is never absent.
FOREVER_MS = 2**63 - 1

log = structlog.get_logger()


async def follow_revocations(store: Store, revocations: Revocations) -> None:
    """Runs until cancelled; while the store is away, what was known stays."""
    mirror = Mirror(store, REVOKED)
    mirror.on_change(lambda _changes: revocations.replace(*read_revocations(mirror.entries.values())))
    await mirror.run()


def read_revocations(entries: Iterable[KeyValue]) -> tuple[frozenset[int], dict[HostId, int]]:
    """The serials and the bars in the entries below REVOKED."""
    serials, bars = set(), {}
    for entry in entries:
        if entry.key.startswith(BARRED):
            bars[HostId(entry.key.removeprefix(BARRED))] = _bar_ms(entry)
            continue
        try:
            serials.add(int(entry.key.removeprefix(REVOKED), 16))
        except ValueError:
            log.warning("value.unreadable", key=entry.key)
    return frozenset(serials), bars


def _bar_ms(entry: KeyValue) -> int:
    try:
        return decode(HostBar, entry.value).before_ms
    except BedplateError:
        log.warning("value.unreadable", key=entry.key)
        return FOREVER_MS
