"""SchedulerService: which schedulers serve, and which of them leads, to operators."""

from typing import Any

from bedplate.host.v1 import scheduler_pb2, scheduler_pb2_grpc
from fleet.codec import decode, to_message
from fleet.errors import InvalidSpecError
from fleet.model.scheduler import Scheduler, SchedulerRecord
from fleet.store.keyspace import LEADER, SCHEDULERS
from fleet.store.port import KeyValue, Store


class SchedulerService(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Reads it from the store whenever it is asked."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def ListSchedulers(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 (the stub's names)
        """Every scheduler whose lease is alive, by name; raises StoreUnavailableError."""
        leader = await self._store.get(LEADER)
        name = leader.value.decode("utf-8", "replace") if leader else ""
        listing = await self._store.list_prefix(SCHEDULERS)
        found = [record for entry in listing.entries if (record := _read(entry)) is not None]
        schedulers = [Scheduler(record, record.name == name) for record in sorted(found, key=lambda one: one.name)]
        return scheduler_pb2.ListSchedulersResponse(schedulers=[to_message(one) for one in schedulers])


def _read(entry: KeyValue) -> SchedulerRecord | None:
    try:
        return decode(SchedulerRecord, entry.value)
    except InvalidSpecError:
        # Of another version: what cannot be read is not told.
        return None
