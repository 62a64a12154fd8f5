"""What the scheduler knows: its mirror of the store as a snapshot that moves on with it. Decides nothing."""

import asyncio

from fleet.errors import UnavailableError
from fleet.model.ids import HostId, SandboxId
from fleet.store.mirror import Changes, Mirror
from scheduler.contents import Contents, Written
from scheduler.placement.cluster import Cluster
from scheduler.placement.settings import Settings
from scheduler.placement.snapshot import Snapshot
from scheduler.placement.upkeep import ClusterUpkeep

# A write is in the mirror within milliseconds; longer than this, and the caller is told instead of left waiting.
SEEN_TIMEOUT_S = 5.0


class FleetState:
    """The newest snapshot of `mirror`, which someone else runs.

    A snapshot is a view that moves on with the store: read it without awaiting in between, or take a new one afterwards.
    """

    def __init__(self, mirror: Mirror, settings: Settings | None = None) -> None:
        self._mirror = mirror
        self.written = Written()
        self.settings = settings or Settings()
        self._upkeep = ClusterUpkeep(self.settings.weights)
        self._contents = Contents(self.written, self._upkeep)
        mirror.on_change(self._follow)

    def snapshot(self) -> Snapshot:
        """The store as last seen, also while it is away."""
        if self._contents.snapshot.revision != self._mirror.revision:
            return self._contents.advance(self._mirror.revision)
        return self._contents.snapshot

    def cluster(self, now_ms: int) -> Cluster:
        """The hosts as the snapshot has them; whoever takes of it undoes that before the next await."""
        return self._upkeep.refresh(self.snapshot(), now_ms)

    def fresh(self) -> Snapshot:
        """The store as it is now; raises UnavailableError `store_unavailable` while it is away."""
        if not self._mirror.is_fresh:
            raise UnavailableError(
                "store_unavailable", "the scheduler cannot reach its store", "try again; check etcd and the way to it"
            )
        return self.snapshot()

    @property
    def is_fresh(self) -> bool:
        """Whether the store is followed now."""
        return self._mirror.is_fresh

    def changed(self) -> asyncio.Event:
        """The event of the next change, also of `is_fresh`: take it, look, then wait for it."""
        return self._mirror.changed()

    async def seen(self, revision: int) -> Snapshot:
        """The snapshot once it has `revision`; raises UnavailableError `store_behind` after SEEN_TIMEOUT_S."""
        await self._mirror.wait_for(revision, SEEN_TIMEOUT_S)
        return self.snapshot()

    async def see(self, key: str) -> None:
        """Returns when `key` is in the snapshot as the store has it now; raises UnavailableError."""
        await self._mirror.see(key, SEEN_TIMEOUT_S)

    def take_touched(self) -> tuple[set[SandboxId], set[HostId]]:
        """The sandboxes and the hosts about which something may be due since this was asked last."""
        contents = self._contents
        touched, stirred = contents.touched, contents.stirred
        contents.touched, contents.stirred = set(), set()
        return touched, stirred

    def _follow(self, changes: Changes) -> None:
        entries = self._mirror.entries
        for key, before in changes.items():
            self._contents.put(key, before, entries.get(key))
        self._contents.advance(self._mirror.revision)
