"""What a plan decided, as it is recorded: the decisions in their order, and the digests that tell whether two are the same."""

import functools
import hashlib
from collections.abc import Sequence
from importlib import metadata

from fleet.codec import encode
from fleet.model.cycle import Decision
from scheduler.placement.settings import Settings


def digest_of(decisions: Sequence[Decision]) -> str:
    """One for each sequence of decisions."""
    whole = hashlib.sha256()
    for one in decisions:
        content = encode(one)
        whole.update(len(content).to_bytes(4, "big") + content)
    return whole.hexdigest()


def seed_of(cycle: str) -> int:
    """The seed of the cycle of that name."""
    return int.from_bytes(hashlib.sha256(cycle.encode()).digest()[:8], "big")


@functools.cache
def settings_digest(settings: Settings) -> str:
    """One for each setting that decisions depend on."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()


@functools.cache
def version() -> str:
    """The version of this program, whose code is part of a decision."""
    return metadata.version("bedplate")
