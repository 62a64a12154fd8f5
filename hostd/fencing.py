"""The fence of this host: its VMs run while its lease is sure, are paused before it may have ended, and killed after.

What hostd has told the guard is what counts: a renewal that the guard does not know of does not lengthen anything. After a new
lease nothing runs on before the orders of that lease are read, for the scheduler may have placed a sandbox elsewhere meanwhile.
"""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import replace

import structlog

from fleet.errors import BedplateError, HostFaultError
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, Reason
from fleet.store.lease import Pause
from hostd.drivers.ports import Guard, Hypervisor
from hostd.orders import Orders
from hostd.reconcile.fence import HOST_FENCED, HOST_RESTARTED, KILL_AFTER_MS, Stance, find_stance
from hostd.reconcile.progress import fail, is_over
from hostd.reconcile.state import DomainState

# The pause comes 3 s before the lease may end: it is seen to six times by then.
LOOK_INTERVAL_S = 0.5
# More calls under way at once make libvirt no faster.
AT_ONCE = 8

log = structlog.get_logger()


class Fence:
    """Pauses and kills this host's VMs when time says so; tells whether one may begin."""

    def __init__(
        self,
        orders: Orders,
        hypervisor: Hypervisor,
        guard: Guard,
        now_ms: Callable[[], int],
        nudge: Callable[[], None],
        *,
        pause: Pause = asyncio.sleep,
    ) -> None:
        self._orders = orders
        self._hypervisor = hypervisor
        self._guard = guard
        self._now_ms = now_ms
        self._nudge = nudge
        self._pause = pause
        armed_ms = guard.armed_until_ms()
        # An earlier hostd's VMs have the time that it left them; where it left no word, they are paused until the lease is here.
        self._sure_until_ms = now_ms() if armed_ms is None else armed_ms - KILL_AFTER_MS
        # No word of this boot: what had begun, and has no domain any more, ended with the boot before.
        self._is_new_boot = armed_ms is None
        self._is_settled = False
        self._has_fenced = False
        self._stance = Stance.RUN
        hypervisor.set_gate(self.may_begin)

    def may_begin(self) -> bool:
        """Whether a VM may start or run on: the lease is sure, and its orders are read."""
        return self._is_settled and find_stance(self._now_ms(), self._sure_until_ms) is Stance.RUN

    def lease_taken(self) -> None:
        """A new lease stands: what was ordered before it says nothing any more."""
        self._is_settled = False

    def lease_renewed(self, sure_until_ms: int) -> None:
        """The lease is sure until then, once the guard knows it."""
        self.look()
        try:
            self._guard.arm(sure_until_ms + KILL_AFTER_MS)
        except HostFaultError as error:
            log.error("guard.unarmed", code=error.code, error=error.message)
            return
        self._sure_until_ms, self._has_fenced = sure_until_ms, False
        self._nudge()

    def orders_read(self) -> None:
        """All that was ordered up to the present lease is in the orders: what they still want here may run on."""
        self._is_settled = True
        self._nudge()

    def look(self, domains: Collection[SandboxId] | None = None) -> None:
        """Past the kill, whatever had been configured here has failed, whoever ended its VM; after a boot, what has no domain."""
        if domains is not None and self._is_new_boot:
            self._is_new_boot = False
            for sandbox_id in sorted(self._orders.orders.keys() - set(domains)):
                self._fail(sandbox_id, HOST_RESTARTED)
        if not self._has_fenced and find_stance(self._now_ms(), self._sure_until_ms) is Stance.KILL:
            self._has_fenced = True
            for sandbox_id in sorted(self._orders.orders):
                self._fail(sandbox_id, HOST_FENCED)

    async def run(self) -> None:
        """Sees to it until cancelled."""
        while True:
            self.look()
            stance = find_stance(self._now_ms(), self._sure_until_ms)
            if stance is not self._stance:
                log.warning("fence.moved", before=self._stance, after=stance)
                self._stance = stance
                self._nudge()
            if stance is not Stance.RUN:
                try:
                    await self._hold(stance)
                except BedplateError as error:
                    log.error("fence.failed", stance=stance, code=error.code, error=error.message)
            await self._pause(LOOK_INTERVAL_S)

    async def _hold(self, stance: Stance) -> None:
        found = sorted((await self._hypervisor.list_domains()).items())
        for start in range(0, len(found), AT_ONCE):
            # All at once, so that one that hangs holds up no other.
            await asyncio.gather(*(self._hold_one(stance, *one) for one in found[start : start + AT_ONCE]))

    async def _hold_one(self, stance: Stance, sandbox_id: SandboxId, state: DomainState) -> None:
        # A renewal may have come while libvirt was at work.
        if find_stance(self._now_ms(), self._sure_until_ms) is not stance:
            return
        try:
            if stance is Stance.KILL and state is not DomainState.DEAD:
                await self._hypervisor.remove_domain(sandbox_id)
                log.warning("sandbox.fenced", sandbox_id=sandbox_id)
            elif stance is Stance.PAUSE and state is DomainState.RUNNING:
                await self._hypervisor.pause_domain(sandbox_id)
                log.warning("sandbox.paused", sandbox_id=sandbox_id)
        except BedplateError as error:
            log.error("fence.failed", sandbox_id=sandbox_id, code=error.code, error=error.message)

    def _fail(self, sandbox_id: SandboxId, reason: Reason) -> None:
        order, progress = self._orders.orders[sandbox_id], self._orders.progress.get(sandbox_id)
        if progress is None or order.goal is Goal.REMOVE or is_over(progress, order.goal):
            return
        # No agent has run of what was not configured: it may begin again here, and its start was no failure of its own.
        begun = fail(progress, reason) if progress.is_configured else replace(progress, starts=0)
        try:
            self._orders.put_progress(begun)
        except HostFaultError as error:
            log.error("progress.unwritten", sandbox_id=sandbox_id, error=error.message)
            self._orders.hold_progress(begun)
