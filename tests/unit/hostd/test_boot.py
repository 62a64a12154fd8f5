"""What a guest says of its boot becomes stages in order, or is refused."""

from typing import Any

import pytest

from hostd.reconcile.words import UPTIME_MS_MAX, parse_boot

NOW_MS = 1_000_000_000


def test_a_boot_becomes_three_stages() -> None:
    """Kernel, init and root lie before now, as far apart as the guest's clock says."""
    found = parse_boot({"boot": {"uptime_ms": 4000, "init_ms": 2500, "root_ms": 3000}}, NOW_MS)
    assert [(stage.name, NOW_MS - stage.at_ms) for stage in found] == [
        ("kernel_started", 4000),
        ("init_started", 1500),
        ("root_mounted", 1000),
    ]


def test_no_stage_lies_in_the_future() -> None:
    """A guest whose init began after its hello lies: it is told as now."""
    found = parse_boot({"boot": {"uptime_ms": 10, "init_ms": 5000, "root_ms": 6000}}, NOW_MS)
    assert max(stage.at_ms for stage in found) == NOW_MS


def test_nothing_said_is_nothing_noted() -> None:
    """An older guest says nothing of its boot."""
    assert parse_boot({}, NOW_MS) == ()


@pytest.mark.parametrize("value", [-1, UPTIME_MS_MAX + 1, 1.5, "1", None, True])
@pytest.mark.parametrize("name", ["uptime_ms", "init_ms", "root_ms"])
def test_what_is_no_time_is_refused(name: str, value: Any) -> None:
    """Each number is checked like any stranger's."""
    with pytest.raises(ValueError, match=name):
        parse_boot({"boot": {"uptime_ms": 1, "init_ms": 1, "root_ms": 1, name: value}}, NOW_MS)
