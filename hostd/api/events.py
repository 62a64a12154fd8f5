"""Serves this host's journal: of one sandbox, of a tenant's, or of all. The scheduler has resolved and authorised the request."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from bedplate.sandbox.v1 import event_pb2_grpc
from fleet.codec import to_message
from hostd.api.changes import Changes
from hostd.journal import Cursor, Journal


class EventService(event_pb2_grpc.EventServiceServicer):
    """Reads the journal, and goes on with what is appended."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._changes = Changes()
        journal.on_append(self._changes.nudge)

    async def ReadEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802 (the stub's names)
        """Events since `since_ms` in the order they happened; with `follow` until the caller goes."""
        words = [word for word in (request.sandbox, request.tenant) if word]
        cursor = Cursor()
        while True:
            appended = self._changes.subscribe()
            events, reached = await asyncio.to_thread(self._journal.read, cursor, *words)
            for event in events:
                # The words may stand anywhere in a line; whose it is, its fields say.
                is_asked = request.sandbox in ("", event.sandbox_id) and request.tenant in ("", event.tenant)
                if is_asked and event.at_ms >= request.since_ms:
                    yield to_message(event)
            if reached != cursor:
                cursor = reached
            elif request.follow:
                await appended.wait()
            else:
                return
