"""Garbage collection of images: what is tagged, lately used or among the last few stays, whatever else is asked."""

import pytest

from provisioning.commands.garbage import Candidate, choose_garbage

DAY_S = 86400.0
NOW_S = 100 * DAY_S
IMAGES = [
    Candidate("tagged", is_tagged=True, last_used_s=0, size_bytes=1),
    Candidate("today", is_tagged=False, last_used_s=NOW_S - DAY_S / 2, size_bytes=1),
    Candidate("older", is_tagged=False, last_used_s=NOW_S - 40 * DAY_S, size_bytes=1),
    Candidate("oldest", is_tagged=False, last_used_s=NOW_S - 50 * DAY_S, size_bytes=1),
    Candidate("future", is_tagged=False, last_used_s=NOW_S + DAY_S, size_bytes=1),
]


@pytest.mark.parametrize(
    ("within_days", "keep", "chosen"),
    [
        (30, 0, ["oldest", "older"]),
        (30, 1, ["oldest"]),
        (30, 9, []),
        (45, 0, ["oldest"]),
        (0, 0, ["oldest", "older", "today"]),
    ],
)
def test_only_what_nobody_uses_goes(within_days: int, keep: int, chosen: list[str]) -> None:
    """The longest unused go first; a tag, a use within the time and the number to keep each hold an image."""
    found = choose_garbage(IMAGES, NOW_S, keep_used_within_s=within_days * DAY_S, keep=keep)
    assert [one.digest for one in found] == chosen
