"""Takes certificates away: of a host by its name, of anybody by the authority's list. Writes; every program reads."""

from collections.abc import Callable
from typing import Any

import structlog

from bedplate.host.v1 import enrolment_pb2
from fleet.codec import encode
from fleet.errors import NotFoundError, UnavailableError
from fleet.model.enrolment import HostBar, Revocation
from fleet.model.host import HostCordon
from fleet.model.ids import HostId, is_dns_label
from fleet.revocation import REVOCATIONS_MAX, Revocations, read_list, revoked, serial_of
from fleet.store.keyspace import REVOKED, TOKENS, barred_key, cordon_key, host_issued, revoked_key
from fleet.store.port import TRANSACTION_OPS_MAX, Delete, Put, Store, Unmoved, Write
from fleet.store.revoked import read_revocations
from scheduler.api.hosts import check_reason
from scheduler.state import FleetState

CORDON_REASON = "its certificates were revoked"

log = structlog.get_logger()


class Revoker:
    """The revoking half of EnrolmentService."""

    def __init__(self, store: Store, state: FleetState, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._state = state
        self._now_ms = now_ms

    async def revoke_host(self, request: Any, by: str) -> Any:
        """Bars whatever was issued to a host until now, voids its tokens and cordons it. Safe to repeat.

        First the bar and the tokens, then the serials: nothing that was signed before escapes the listing, and nothing is signed
        on a bar that has moved or a token that is gone.
        """
        reason, host_id = check_reason(request.reason), HostId(request.host_id)
        await self._check_known(host_id)
        now_ms = self._now_ms()
        writes: list[Write] = [
            Put(barred_key(host_id), encode(HostBar(host_id, now_ms, by, reason))),
            Put(cordon_key(host_id), encode(HostCordon(host_id, by, now_ms, reason or CORDON_REASON))),
        ]
        await self._write([*writes, *(Delete(key) for key in await self._tokens_of(host_id))])
        serials = await self._issued_to(host_id)
        await self._write(
            [Put(revoked_key(serial), encode(Revocation(serial, by, now_ms, reason))) for serial in serials]
        )
        log.info("host.revoked", host_id=host_id, by=by, serials=len(serials))
        return enrolment_pb2.RevokeHostResponse(serials=serials)

    async def publish(self, crl: bytes, ca: bytes, by: str) -> Any:
        """Puts the serials of a signed list into the store; those that are there stay as they are."""
        listed = read_list(crl, ca)
        known = {entry.key for entry in (await self._store.list_prefix(REVOKED)).entries}
        new = {revoked_key(f"{serial:x}"): serial for serial in listed if revoked_key(f"{serial:x}") not in known}
        if len(known) + len(new) > REVOCATIONS_MAX:
            message = f"more than {REVOCATIONS_MAX} certificates would be revoked"
            raise UnavailableError("revocations_exhausted", message, "make a new authority")
        writes: list[Write] = [
            Put(key, encode(Revocation(f"{serial:x}", by, int(listed[serial].timestamp() * 1000))))
            for key, serial in new.items()
        ]
        await self._write(writes)
        log.info("revocations.published", by=by, added=len(new), known=len(listed) - len(new))
        return enrolment_pb2.PublishRevocationsResponse(added=len(new), known=len(listed) - len(new))

    async def check_unrevoked(self, certificate: bytes, host_id: HostId) -> tuple[Unmoved, Unmoved]:
        """The conditions that a host's certificate is not revoked; raises NotPermittedError when the store says that it is."""
        keys = revoked_key(serial_of(certificate)), barred_key(host_id)
        entries = [await self._store.get(key) for key in keys]
        known = Revocations()
        known.replace(*read_revocations(entry for entry in entries if entry is not None))
        if known.is_revoked(certificate):
            raise revoked()
        first, second = (
            Unmoved(key, entry.mod_revision if entry else 0) for key, entry in zip(keys, entries, strict=True)
        )
        return first, second

    async def _check_known(self, host_id: HostId) -> None:
        if host_id in self._state.fresh().hosts or (is_dns_label(host_id) and await self._issued_to(host_id)):
            return
        message = f"no host {host_id[:80]!r} is registered or has a certificate from a scheduler"
        raise NotFoundError("host_unknown", message, "mb host ls shows those there are")

    async def _issued_to(self, host_id: HostId) -> list[str]:
        listing = await self._store.list_prefix(host_issued(host_id))
        return [entry.key.rpartition("/")[2] for entry in listing.entries]

    async def _tokens_of(self, host_id: HostId) -> list[str]:
        # A token's id is the host's id, a hyphen and 8 digits: longer rests are tokens of hosts with longer names.
        prefix = f"{TOKENS}{host_id}-"
        return [
            entry.key
            for entry in (await self._store.list_prefix(prefix)).entries
            if "-" not in entry.key.removeprefix(prefix)
        ]

    async def _write(self, writes: list[Write]) -> None:
        for start in range(0, len(writes), TRANSACTION_OPS_MAX):
            await self._store.transact([], writes[start : start + TRANSACTION_OPS_MAX])
