"""Renews this host's certificate before it ends: a new key, a request under the old certificate, the files replaced in one step.

    good --less than a third of its life left--> due --a scheduler signs--> files replaced --> good
                                                  └--none does--> tried again, warned of

What uses the certificate takes the new files up by itself (fleet.credentials). Knows no other part of hostd.
"""

import asyncio
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from bedplate.host.v1 import enrolment_pb2, enrolment_pb2_grpc
from fleet.certificates import certificate_span, parse_identity
from fleet.credentials import install
from fleet.enrolment import make_request
from fleet.errors import BedplateError, UnavailableError
from fleet.identity import SCHEDULER_SERVER_NAME, Identity, KeyPair, Role, TlsFiles
from fleet.model.ids import HostId
from fleet.rpc import open_channel, translated

# A third of a year is time for whatever keeps a host from its scheduler; and of an hour's certificate it is 20 minutes.
DUE_SHARE = 3
# A look reads two files, so a replaced certificate is known within a minute; one of minutes is looked at as often as it needs, but
# never in a loop without a pause.
LOOK_INTERVAL_S_MAX, LOOK_INTERVAL_S_MIN = 60.0, 0.5
LOOKS_PER_LIFE = 60
CALL_TIMEOUT_S = 15.0

log = structlog.get_logger()


class Renewal:
    """The certificate of one host, renewed by the first of `schedulers` ("ip:port") that does."""

    def __init__(
        self, host_id: HostId, tls: TlsFiles, schedulers: Sequence[str], now: Callable[[], datetime.datetime]
    ) -> None:
        self._identity = Identity(Role.HOST, host_id)
        self._tls = tls
        self._schedulers = schedulers
        self._now = now

    async def run(self) -> None:
        """Looks until cancelled; an error is logged and the next look tries again."""
        while True:
            try:
                await self.look()
            except BedplateError as error:
                log.warning("certificate.unrenewed", code=error.code, error=error.message, next_step=error.next_step)
            await asyncio.sleep(self._pause_s())

    async def look(self) -> bool:
        """Renews the certificate if it is due; whether it did. Raises the BedplateError of the last scheduler that was asked."""
        begins, ends = self._span()
        if self._now() < ends - (ends - begins) / DUE_SHARE:
            return False
        if not self._schedulers:
            message = f"{self._tls.certificate} ends at {ends:%Y-%m-%d %H:%M} UTC, and no scheduler is named that could renew it"
            raise UnavailableError("certificate_ending", message, "set schedulers in hostd.toml, or install a new one")
        await self._renew()
        return True

    async def _renew(self) -> None:
        key, csr = make_request(self._identity)
        error: BedplateError | None = None
        for address in self._schedulers:
            try:
                chain = await self._ask(address, csr)
            except BedplateError as failure:
                log.info("renewal.refused", scheduler=address, code=failure.code, error=failure.message)
                error = failure
                continue
            self._install(KeyPair(chain.certificate, key))
            return
        assert error is not None
        raise error

    async def _ask(self, address: str, csr: bytes) -> Any:
        request = enrolment_pb2.RenewCertificateRequest(csr=csr)
        async with open_channel(address, self._tls, SCHEDULER_SERVER_NAME) as channel:
            stub: Any = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
            with translated(f"scheduler {address}"):
                return await stub.RenewCertificate(request, timeout=CALL_TIMEOUT_S)

    def _install(self, pair: KeyPair) -> None:
        if parse_identity(pair.certificate) != self._identity:
            message = "a scheduler has signed a certificate of another identity"
            raise UnavailableError("renewal_mistaken", message, "see the scheduler's log")
        install(self._tls, pair)
        log.info("certificate.renewed", ends=certificate_span(pair.certificate)[1].isoformat())

    def _pause_s(self) -> float:
        try:
            begins, ends = self._span()
        except BedplateError:
            return LOOK_INTERVAL_S_MAX
        share_s = (ends - begins).total_seconds() / LOOKS_PER_LIFE
        return min(max(share_s, LOOK_INTERVAL_S_MIN), LOOK_INTERVAL_S_MAX)

    def _span(self) -> tuple[datetime.datetime, datetime.datetime]:
        content = self._tls.load()[1].certificate
        try:
            return certificate_span(content)
        except ValueError as error:
            message = f"{self._tls.certificate} is damaged"
            raise UnavailableError("certificate_unusable", message, "install it again") from error
