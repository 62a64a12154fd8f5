"""The members of one etcd, of which a program uses one at a time: when that one fails or falls silent, the next.

Any member answers for the whole cluster, so one is enough; gRPC's own balancing would keep sending a share of the calls to a member
behind a dead network until a keepalive has told, and never leaves one that is cut off from its peers but still accepts connections.
"""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from aetcd import rpc

from fleet.channels import LiveChannel


@dataclass(frozen=True, slots=True)
class MemberCondition:
    """How one member is: whether it leads the others, whether it knows who does, its size, and its alarms in etcd's words."""

    is_leader: bool
    has_leader: bool
    used_bytes: int
    troubles: tuple[str, ...]


_BROKEN = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)

log = structlog.get_logger()


class Stubs:
    """etcd's services on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.kv = rpc.KVStub(channel)
        self.watch = rpc.WatchStub(channel)
        self.lease = rpc.LeaseStub(channel)
        self.maintenance = rpc.MaintenanceStub(channel)


class Member:
    """One member: its channel, and the watches that hang on it."""

    def __init__(self, endpoint: str, channel: LiveChannel) -> None:
        self.endpoint = endpoint
        self.watches: set[Any] = set()
        # Whether it has answered since it was left last.
        self.has_answered = True
        self._channel = channel
        self._stubs = Stubs(channel.get())

    def stubs(self) -> Stubs:
        """The services, on the channel of the certificate as it is now."""
        channel = self._channel.get()
        if channel is not self._stubs.channel:
            self._stubs = Stubs(channel)
        return self._stubs

    def is_broken(self) -> bool:
        """Whether the last try to connect has failed; a look also makes it try again."""
        return self.stubs().channel.get_state(try_to_connect=True) in _BROKEN

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class Members:
    """Every member; `current` is the one to call."""

    def __init__(self, members: Sequence[Member], first: int = 0) -> None:
        """`first` is the index of the one to begin with, so that a fleet's programs spread over them."""
        self._members = tuple(members)
        self._index = first % len(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def current(self) -> Member:
        """The member to call: the one that answered last, or the next that is not known to be broken."""
        for step in range(len(self._members)):
            found = self._members[(self._index + step) % len(self._members)]
            if step == 0 and len(self._members) == 1:
                return found
            if not found.is_broken():
                if step:
                    self._move(step)
                return found
        return self._members[self._index]

    def leave(self, member: Member) -> None:
        """`member` has failed or did not answer in time: the next call goes to another, and its watches end to be resumed there."""
        if len(self._members) > 1 and member is self._members[self._index]:
            self._move(1)

    async def close(self) -> None:
        """Close every channel."""
        for member in self._members:
            await member.close()

    def _move(self, step: int) -> None:
        left = self._members[self._index]
        self._index = (self._index + step) % len(self._members)
        if left.has_answered:
            left.has_answered = False
            log.warning("etcd.left", endpoint=left.endpoint, next=self._members[self._index].endpoint)
        for call in tuple(left.watches):
            call.cancel()
