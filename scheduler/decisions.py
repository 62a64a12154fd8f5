"""What a plan decided, as it is recorded: the decisions in their order, and the digests that tell whether two are the same."""

import functools
import hashlib
from collections.abc import Sequence
from importlib import metadata

from fleet.codec import encode
from fleet.model.assignment import Assignment
from fleet.model.cycle import Decision
from fleet.model.ids import NO_HOST
from scheduler.placement.plan import Plan


def decisions_of(plan: Plan) -> tuple[Decision, ...]:
    """Placements in the order in which they were made, then refusals in theirs."""
    refused = (
        Decision(one.sandbox_id, NO_HOST, 0, refusal_codes=tuple(reason.code for reason in one.reasons))
        for one in plan.refusals
    )
    return (*map(_placed, plan.assignments), *refused)


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
def version() -> str:
    """The version of this program, whose code is part of a decision."""
    return metadata.version("bedplate")


def _placed(one: Assignment) -> Decision:
    return Decision(one.sandbox_id, one.host_id, one.placement, one.gpus)
