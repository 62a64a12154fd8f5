"""Many sandboxes of one spec: their names and ids, and how they are asked for until each has its answer."""

from __future__ import annotations  # the client imports gRPC

import asyncio
import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fleet.errors import BedplateError, InvalidSpecError, UnavailableError
from fleet.model.admission import GROUP_SIZE_MAX
from fleet.model.ids import SANDBOX_ID_LENGTH, SandboxId, is_dns_label
from fleet.model.sandbox import SandboxSpec

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client

# What one call may ask for.
COPIES_MAX = 256

Creation = tuple[SandboxId, SandboxSpec]


def copies_of(spec: SandboxSpec, first_id: SandboxId, count: int, *, is_gang: bool) -> list[Creation]:
    """`count` sandboxes NAME-0, NAME-1 … with ids that follow from `first_id`; with `is_gang` as one group.

    Raises InvalidSpecError for a name too long to be numbered, for a gang that is too large, and for one of what is in a group.
    """
    last = f"{spec.name}-{count - 1}"
    if not is_dns_label(last):
        raise InvalidSpecError("name_too_long", f"{last} is longer than 63 characters", "choose a shorter --name")
    if is_gang and count > GROUP_SIZE_MAX:
        message = f"{count} are more than the {GROUP_SIZE_MAX} that are placed all at once"
        raise InvalidSpecError("group_too_large", message, "use a smaller --count, or leave out --gang")
    if is_gang and spec.placement.group:
        message = f"the jcard has them in group {spec.placement.group} already"
        raise InvalidSpecError("group_named", message, "leave out --gang, or [placement] group")
    if is_gang:
        spec = replace(spec, placement=replace(spec.placement, group=f"up-{first_id}", group_size=count))
    return [(_id_of(first_id, number), replace(spec, name=f"{spec.name}-{number}")) for number in range(count)]


async def create_copies(
    client: Client, creations: Sequence[Creation], delays_s: Sequence[float], say: Callable[[str], None]
) -> list[Sandbox | BedplateError]:
    """What became of each, in their order; those that nobody could answer are asked for again after each delay."""
    made: dict[SandboxId, Sandbox | BedplateError] = {}
    for delay_s in (*delays_s, None):
        left = [one for one in creations if isinstance(made.get(one[0]), UnavailableError | None)]
        try:
            answers: Sequence[Sandbox | BedplateError] = await client.create_sandboxes(left)
        except UnavailableError as error:
            answers = [error] * len(left)
        made |= {sandbox_id: answer for (sandbox_id, _), answer in zip(left, answers, strict=True)}
        lost = next((one for one in made.values() if isinstance(one, UnavailableError)), None)
        if lost is None or delay_s is None:
            break
        say(f"{lost.message}; asking again")
        await asyncio.sleep(delay_s)
    return [made[sandbox_id] for sandbox_id, _ in creations]


def _id_of(first_id: SandboxId, number: int) -> SandboxId:
    """The same request has the same ids: what was asked for before is not made twice."""
    digest = hashlib.sha256(f"{first_id}-{number}".encode()).digest()
    return SandboxId(base64.b32encode(digest).decode("ascii").lower()[:SANDBOX_ID_LENGTH])
