"""How fast one caller may change things, and what one caller's haste costs the others: nothing."""

from contextlib import suppress

import pytest

from fleet.errors import UnavailableError
from fleet.identity import Identity, Role
from scheduler.api.limits import CALLERS_MAX, WRITE_BYTES, WriteLimit
from scheduler.quotas import WRITES_AT_ONCE, WRITES_PER_S

HASTY, OTHER = Identity(Role.TENANT, "hasty"), Identity(Role.TENANT, "other")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def taken(limit: WriteLimit, caller: Identity) -> int:
    """How many changes a caller may make now."""
    count = 0
    while count <= 2 * WRITES_AT_ONCE:
        try:
            limit.take_for(caller)
        except UnavailableError as error:
            return count if (error.code, bool(error.next_step)) == ("calls_exhausted", True) else -1
        count += 1
    raise AssertionError("there is no limit")


def test_a_burst_then_a_rate() -> None:
    """So many at once, then so many a second, and never more than a burst however long a caller was still."""
    clock = Clock()
    limit = WriteLimit(clock)
    assert taken(limit, HASTY) == WRITES_AT_ONCE
    clock.now_s += 2.0
    assert taken(limit, HASTY) == 2 * WRITES_PER_S
    clock.now_s += 1e6
    assert taken(limit, HASTY) == WRITES_AT_ONCE


def test_large_records_count_as_several_changes() -> None:
    """What fills the store's history is bytes: a tenant's largest records, changed as fast as it may, are 100 KB a second of it."""
    clock = Clock()
    limit, size_bytes, written = WriteLimit(clock), 170 * 1024, 0
    for _ in range(100 * 60):
        clock.now_s += 0.01
        with suppress(UnavailableError):
            limit.take_for(HASTY)
            limit.charge_for(HASTY, size_bytes)
            written += size_bytes
    assert size_bytes < written <= (WRITES_AT_ONCE + 60 * WRITES_PER_S) * WRITE_BYTES + size_bytes


def test_callers_do_not_share() -> None:
    """One that has used up its own leaves the others' as they are."""
    limit = WriteLimit(Clock())
    taken(limit, HASTY)
    assert taken(limit, OTHER) == WRITES_AT_ONCE


def test_many_callers_take_little_memory_and_forget_nothing() -> None:
    """Callers that have been still are forgotten; one that has used up its own is not, however many come."""
    clock = Clock()
    limit = WriteLimit(clock)
    for number in range(3 * CALLERS_MAX):
        clock.now_s += 0.1
        limit.take_for(Identity(Role.TENANT, f"t-{number}"))
    taken(limit, HASTY)
    limit.take_for(OTHER)
    assert len(limit._left) <= CALLERS_MAX + 1
    with pytest.raises(UnavailableError):
        limit.take_for(HASTY)
