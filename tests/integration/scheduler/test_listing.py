"""Listings hold the scheduler's only thread: one caller's are few at a time and cut into pieces, so that others have their turn."""

import asyncio
import datetime
from collections.abc import Callable
from time import monotonic
from typing import Any

from bedplate.sandbox.v1 import service_pb2
from fleet.certificates import create_authority, issue_certificate
from fleet.errors import UnavailableError
from fleet.identity import Identity, Role
from fleet.store.keyspace import ROOT
from fleet.store.memory import MemoryStore
from fleet.store.mirror import Mirror
from scheduler.api.creations import Creations
from scheduler.api.limits import WriteLimit
from scheduler.api.sandboxes import LISTED_AT_ONCE, LISTINGS_MAX, SandboxService
from scheduler.quotas import Quotas
from scheduler.state import FleetState
from scheduler.submissions import Submissions
from tests.integration.scheduler.parts import running
from tests.unit.scheduler.build import DEMO, NOW_MS, record, record_puts

NOW = datetime.datetime.now(datetime.UTC)
AUTHORITY = create_authority(NOW)
SANDBOXES = 3 * LISTED_AT_ONCE


class Call:
    """What a server knows of one call: the caller's certificate, and whom to tell of its end."""

    def __init__(self, tenant: str) -> None:
        self._certificate = issue_certificate(AUTHORITY, Identity(Role.TENANT, tenant), NOW).certificate
        self._listeners: list[Callable[[Any], None]] = []

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate]}

    def add_done_callback(self, listener: Callable[[Any], None]) -> None:
        self._listeners.append(listener)

    def end(self) -> None:
        for listener in self._listeners:
            listener(self)


async def list_all(service: SandboxService, tenant: str) -> int:
    """How many sandboxes were listed; -1 when it was too many listings."""
    call = Call(tenant)
    try:
        answer = await service.ListSandboxes(service_pb2.ListSandboxesRequest(), call)
        return len(answer.sandboxes)
    except UnavailableError as error:
        return -1 if error.code == "calls_exhausted" else -2
    finally:
        call.end()


async def test_long_listings_stand_in_nobodys_way() -> None:
    """Another tenant's is answered before those that came first; past a few at a time they are refused, and not for good."""
    store = MemoryStore(monotonic)
    for number in range(SANDBOXES):
        await store.transact([], record_puts(record(number)))
    mirror = Mirror(store, ROOT)
    state = FleetState(mirror)
    writes = WriteLimit(monotonic)
    creations = Creations(store, state, lambda: NOW_MS, writes, submissions=Submissions(), quotas=Quotas())
    service = SandboxService(store, state, lambda: NOW_MS, writes, creations)
    async with running(mirror.run()):
        while not mirror.is_fresh:
            await mirror.changed().wait()
        answered: list[tuple[str, int]] = []

        async def ask(tenant: str) -> None:
            answered.append((tenant, await list_all(service, tenant)))

        await asyncio.gather(*(ask(DEMO) for _ in range(LISTINGS_MAX + 1)), ask("other"))
        assert answered == [(DEMO, -1), ("other", 0), *[(DEMO, SANDBOXES)] * LISTINGS_MAX]
        assert await list_all(service, DEMO) == SANDBOXES
