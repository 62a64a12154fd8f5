"""Which images may go. PURE: what is known of each image in, the ones to remove out, with the reason each other one stays."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image as garbage collection sees it; `last_used_s` is when a VM last started from it, or when it arrived."""

    digest: str
    is_tagged: bool
    last_used_s: float
    size_bytes: int


def choose_garbage(
    images: Iterable[Candidate], now_s: float, *, keep_used_within_s: float, keep: int
) -> list[Candidate]:
    """The images to remove, the longest unused first.

    Never one that a tag points at, nor one that was used within `keep_used_within_s` (VMs from it may still run), nor one of
    the `keep` most recently used of the rest. A time in the future counts as now.
    """
    old = [one for one in images if not one.is_tagged and now_s - one.last_used_s >= keep_used_within_s]
    old.sort(key=lambda one: (one.last_used_s, one.digest))
    return old[: len(old) - keep] if keep else old
