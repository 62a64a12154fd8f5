"""Which sources give way, as a table."""

import pytest

from fleet.model.ids import Digest, Tenant
from hostd.room import HeldSource, choose

ACME, OTHER = Tenant("acme"), Tenant("other")


def held(name: str, used_at_s: float, tenant: Tenant = ACME, size_bytes: int = 10) -> HeldSource:
    return HeldSource(tenant, Digest(name), size_bytes, used_at_s)


OLD, NEW, FOREIGN = held("old", 1.0), held("new", 2.0), held("foreign", 0.5, OTHER)


@pytest.mark.parametrize(
    ("over_bytes", "shortage_bytes", "gone"),
    [
        (0, 0, []),
        (-5, -5, []),
        (1, 0, ["old"]),
        (10, 0, ["old"]),
        (11, 0, ["old", "new"]),
        (100, 0, ["old", "new"]),
        (0, 1, ["foreign"]),
        (0, 11, ["foreign", "old"]),
        (1, 5, ["foreign", "old"]),
    ],
)
def test_the_longest_unused_go_first(over_bytes: int, shortage_bytes: int, gone: list[str]) -> None:
    """For a tenant's quota only its own go, for the disk anyone's; no more than it takes."""
    assert [one.digest for one in choose([NEW, OLD, FOREIGN], ACME, over_bytes, shortage_bytes)] == gone
