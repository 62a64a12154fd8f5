"""The reconciler: looks at orders and host, and spawns one worker for each sandbox that is not as it should be.

It takes no input: a nudge says "look", never "what". A pass that fails is followed by the next; what a worker could not do,
the next pass sees. Bounded: WORKERS_MAX at once, one for each sandbox, retries spaced by BACKOFF_S.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface

import structlog

from fleet.errors import BedplateError, HostFaultError, InvalidSpecError, NotFoundError
from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, NetworkMode, Reason, SandboxStatus, StageName
from hostd.orders import Orders
from hostd.reconcile.apply import Applier, Drivers
from hostd.reconcile.diff import BEGINNINGS, Action, Desired, Step, diff, is_released
from hostd.reconcile.fence import FenceView, NoFence
from hostd.reconcile.patience import GUEST_SILENT, SILENCE_S_MAX
from hostd.reconcile.progress import begin, fail, is_over, is_run_due, keeps_disk, reach_stage, stop
from hostd.reconcile.session import Sessions
from hostd.reconcile.state import Observed

# Every pass also runs unasked, so that a lost event costs seconds and not correctness.
PASS_INTERVAL_S = 5.0
# Starting a VM is bound by disk and CPU: more at once makes all of them slower.
WORKERS_MAX = 4
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
# How often a start may fail for a reason that could pass before the sandbox fails with it.
START_ATTEMPTS_MAX = 5
# Beyond the longest grace period of its agents, a stop that still has no artifact is cut short.
STOP_EXTRA_S = 120.0

# Where sandboxes get their addresses when the operator names no other network: one host's guests never meet another's.
DEFAULT_BRIDGE = IPv4Interface("10.77.0.1/16")

# What trying again does not heal.
HOPELESS = frozenset({"image_corrupt", "image_missing", "image_unsupported", "source_corrupt"})
STOP_FORCED = Reason(
    "stop_forced",
    "the guest did not stop in time and was cut off; its changes are lost",
    "its output is there: mb logs NAME; submit it again",
)

log = structlog.get_logger()


@dataclass(slots=True)
class _Trouble:
    """A sandbox whose worker failed: how often in a row, with what, and when to try again (monotonic seconds)."""

    attempts: int
    error: BedplateError
    retry_at_s: float


class Reconciler:
    """Makes this host look like its orders."""

    def __init__(
        self,
        orders: Orders,
        drivers: Drivers,
        applier: Applier,
        sessions: Sessions,
        now_ms: Callable[[], int],
        *,
        bridge: IPv4Interface = DEFAULT_BRIDGE,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = PASS_INTERVAL_S,
    ) -> None:
        self._interval_s = interval_s
        self._orders = orders
        self._drivers = drivers
        self._applier = applier
        self._sessions = sessions
        self._now_ms = now_ms
        self._bridge = bridge
        self._clock = clock
        self._nudged = asyncio.Event()
        self._slots = asyncio.Semaphore(WORKERS_MAX)
        self._busy: set[SandboxId] = set()
        # Sandboxes on which a worker has been at work since the drivers last looked, or while they did.
        self._unseen: set[SandboxId] = set()
        self._trouble: dict[SandboxId, _Trouble] = {}
        self._stopping_since_s: dict[SandboxId, float] = {}
        self._listeners: list[Callable[[], None]] = []
        self._fence: FenceView = NoFence()
        self.observed: Observed | None = None

    def nudge(self) -> None:
        """Look again soon."""
        self._nudged.set()

    def obey(self, fence: FenceView) -> None:
        """From now on no VM begins that `fence` does not let begin."""
        self._fence = fence

    def on_pass(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every pass and every worker."""
        self._listeners.append(listener)

    def trouble(self, sandbox_id: SandboxId) -> Reason | None:
        """Why the sandbox's last worker failed, while it is being retried; or what else its owner should know meanwhile."""
        found = self._trouble.get(sandbox_id)
        if found is None:
            return self._sessions.notice(sandbox_id)
        return Reason(found.error.code, found.error.message, found.error.next_step)

    def accept(self, order: Assignment, told: SandboxStatus | None = None) -> None:
        """Takes an order over, durably; a sandbox new to this host gets an address, unless `told` says that it ran before.

        Raises HostFaultError `addresses_exhausted`, `remains_present` or `disk_failed`; the order is then not taken.
        """
        self._clear_way(order)
        if order.goal is not Goal.REMOVE and order.sandbox_id not in self._orders.progress:
            address = "" if order.spec.network.mode is NetworkMode.NONE else str(self._free_address())
            # Before the order: progress without an order is cleared away, an order without progress would wait for ever.
            self._orders.put_progress(begin(order, address, "", told))
        self._orders.put_order(order)
        self._note_stop(order)
        self.nudge()

    def _clear_way(self, order: Assignment) -> None:
        """A further placement here begins with nothing: what an earlier one left goes first, wholly."""
        known = self._orders.orders.get(order.sandbox_id)
        if known is None or known.placement >= order.placement or order.sandbox_id not in self._orders.progress:
            return
        if known.goal is not Goal.REMOVE:
            self._orders.put_order(replace(known, goal=Goal.REMOVE))
        self.nudge()
        message = f"an earlier placement of {order.sandbox_id} is still here"
        raise HostFaultError("remains_present", message, "it is removed first; then the new one is taken")

    def is_released(self, sandbox_id: SandboxId) -> bool:
        """Whether nothing of the sandbox's VM is left, by a look that no worker has made stale."""
        return self.observed is not None and sandbox_id not in self._unseen and self._is_down(sandbox_id, self.observed)

    async def run(self) -> None:
        """Passes until cancelled."""
        async with asyncio.TaskGroup() as workers:
            while True:
                self._nudged.clear()
                try:
                    await self.run_pass(workers)
                except BedplateError as error:
                    log.warning("pass.failed", code=error.code, error=error.message)
                self._tell()
                try:
                    async with asyncio.timeout(self._wait_s()):
                        await self._nudged.wait()
                except TimeoutError:
                    continue

    async def run_pass(self, workers: asyncio.TaskGroup) -> None:
        """One look at everything; raises the BedplateError of a driver that cannot look."""
        busy_before = frozenset(self._busy)
        observed = await self._observe()
        # What the fence has ended did not die by itself.
        self._fence.look(observed.domains)
        self.observed, self._unseen = observed, set(busy_before)
        # What a worker changed while the drivers looked may have been seen before or after: it waits for the next pass.
        for sandbox_id in sorted((observed.sandbox_ids() | frozenset(self._orders.orders)) - busy_before):
            try:
                self._decide(sandbox_id, observed, workers)
            except HostFaultError as error:
                # What is decided goes to the disk first. One that fails there is tried again, and holds up no other.
                self._note_trouble(sandbox_id, error)
        for sandbox_id in sorted(self._sessions.attached() - busy_before):
            # Beside the pass: a guest that does not read delays only itself.
            workers.create_task(self._press_on(sandbox_id))

    def _decide(self, sandbox_id: SandboxId, observed: Observed, workers: asyncio.TaskGroup) -> None:
        self._check_limits(sandbox_id)
        actions = diff(self._desired(sandbox_id), observed, sandbox_id)
        if actions and self._may_try(sandbox_id):
            self._busy.add(sandbox_id)
            self._unseen.add(sandbox_id)
            workers.create_task(self._work(sandbox_id, actions, self._orders.orders.get(sandbox_id)))
        elif not actions:
            self._settle(sandbox_id, observed)

    async def _work(self, sandbox_id: SandboxId, actions: Sequence[Action], order: Assignment | None) -> None:
        started = time.monotonic()
        done: list[str] = []
        # Only starts wait for each other: a removal never stands behind a source that is slow to come.
        is_start = any(action.step is Step.ENSURE_DOMAIN for action in actions)
        try:
            async with self._slots if is_start else nullcontext():
                for action in actions:
                    if self._orders.orders.get(sandbox_id) != order:
                        # Decided for an order that is none any more: the next pass decides again.
                        break
                    if action.step in BEGINNINGS and not self._fence.may_begin():
                        break
                    await self._applier.apply(action)
                    done.append(str(action.step))
            self._trouble.pop(sandbox_id, None)
        except Exception as error:  # the rim: a failure stops that sandbox only
            self._note_trouble(sandbox_id, error if isinstance(error, BedplateError) else _surprise(error))
        finally:
            self._busy.discard(sandbox_id)
            duration_ms = round((time.monotonic() - started) * 1000, 1)
            log.info("sandbox.reconciled", sandbox_id=sandbox_id, steps=done, duration_ms=duration_ms)
            self.nudge()
            self._tell()

    async def _observe(self) -> Observed:
        observed = Observed(
            domains=dict(await self._drivers.hypervisor.list_domains()),
            network=await self._drivers.network.observe(),
            scratch_disks=await self._drivers.disks.list_scratch(),
            folders=self._orders.folders(),
            links=self._sessions.attached(),
        )
        await self._drivers.network.ensure_bridge()
        return observed

    def _desired(self, sandbox_id: SandboxId) -> Desired | None:
        order, progress = self._orders.orders.get(sandbox_id), self._orders.progress.get(sandbox_id)
        if order is None or progress is None:
            return None
        return Desired(order, progress, self._now_ms(), self._fence.may_begin())

    def _is_down(self, sandbox_id: SandboxId, observed: Observed) -> bool:
        desired = self._desired(sandbox_id)
        # What is being removed has its disk until it is gone; its vCPUs and memory are free before, and stay so.
        has_kept_disk = desired is not None and (
            desired.order.goal is Goal.REMOVE or keeps_disk(desired.progress, desired.order.goal)
        )
        return is_released(observed, sandbox_id, has_kept_disk=has_kept_disk)

    def _note_stop(self, order: Assignment) -> None:
        progress = self._orders.progress.get(order.sandbox_id)
        if progress is None or order.goal is not Goal.STOP or is_run_due(progress, order):
            return
        stopping = stop(progress, self._now_ms())
        if stopping != progress:
            self._stopping_since_s.setdefault(order.sandbox_id, self._clock())
            self._orders.put_progress(stopping)

    def _check_limits(self, sandbox_id: SandboxId) -> None:
        if sandbox_id in self._orders.orders:
            # Noted when the order came, unless the disk failed just then.
            self._note_stop(self._orders.orders[sandbox_id])
        desired = self._desired(sandbox_id)
        if desired is None or is_over(desired.progress, desired.order.goal):
            self._sessions.forget_secrets(sandbox_id)
            self._stopping_since_s.pop(sandbox_id, None)
            return
        progress = desired.progress
        if progress.stopping_since_ms and self._is_stop_late(desired.order):
            progress = fail(progress, STOP_FORCED)
        if self._sessions.silent_s(sandbox_id) > SILENCE_S_MAX:
            progress = fail(progress, GUEST_SILENT)
        if (lateness := self._sessions.lateness(sandbox_id)) is not None:
            progress = fail(progress, lateness)
        if progress != desired.progress:
            self._orders.put_progress(progress)

    def _is_stop_late(self, order: Assignment) -> bool:
        """Whether this hostd has waited long enough; the host's clock may be set, and a step of it must cost nobody's changes."""
        since_s = self._stopping_since_s.setdefault(order.sandbox_id, self._clock())
        grace_s = max(agent.grace_period_s for agent in order.spec.agents)
        return self._clock() - since_s > grace_s + STOP_EXTRA_S

    def _settle(self, sandbox_id: SandboxId, observed: Observed) -> None:
        self._trouble.pop(sandbox_id, None)
        desired = self._desired(sandbox_id)
        if (
            desired is not None
            and is_over(desired.progress, desired.order.goal)
            and self._is_down(sandbox_id, observed)
        ):
            progress = reach_stage(desired.progress, StageName.RELEASED, self._now_ms())
            if progress != desired.progress:
                self._orders.put_progress(progress)

    async def _press_on(self, sandbox_id: SandboxId) -> None:
        try:
            await self._sessions.press_on(sandbox_id)
        except BedplateError as error:
            log.info("guest.unreached", sandbox_id=sandbox_id, code=error.code)
        except (
            Exception
        ) as error:  # the rim: whatever one guest brings about ends no other, and the next pass presses on again
            log.error("guest.unpressed", sandbox_id=sandbox_id, exc_info=error)

    def _note_trouble(self, sandbox_id: SandboxId, error: BedplateError) -> None:
        known = self._trouble.get(sandbox_id)
        attempts = known.attempts + 1 if known else 1
        delay_s = BACKOFF_S[min(attempts, len(BACKOFF_S)) - 1]
        self._trouble[sandbox_id] = _Trouble(attempts, error, self._clock() + delay_s)
        log.warning("sandbox.troubled", sandbox_id=sandbox_id, code=error.code, error=error.message, attempts=attempts)
        desired = self._desired(sandbox_id)
        if desired is None or is_over(desired.progress, desired.order.goal):
            return
        if isinstance(error, InvalidSpecError | NotFoundError) or (
            isinstance(error, HostFaultError) and (error.code in HOPELESS or attempts >= START_ATTEMPTS_MAX)
        ):
            # The state disk's faults have one name for users, wherever they are met (session.receive).
            code = "host_disk_failed" if error.code == "disk_failed" else error.code
            failed = fail(desired.progress, Reason(code, error.message, error.next_step))
            try:
                self._orders.put_progress(failed)
            except HostFaultError as unwritten:
                log.error("progress.unwritten", sandbox_id=sandbox_id, error=unwritten.message)
                self._orders.hold_progress(failed)

    def _may_try(self, sandbox_id: SandboxId) -> bool:
        trouble = self._trouble.get(sandbox_id)
        return sandbox_id not in self._busy and (trouble is None or self._clock() >= trouble.retry_at_s)

    def _wait_s(self) -> float:
        due = [trouble.retry_at_s - self._clock() for trouble in self._trouble.values()]
        return max(0.05, min([self._interval_s, *due]))

    def _free_address(self) -> IPv4Address:
        taken = {str(self._bridge.ip), *(progress.address for progress in self._orders.progress.values())}
        for address in self._bridge.network.hosts():
            if str(address) not in taken:
                return address
        message = f"no address is left in {self._bridge.network}"
        raise HostFaultError("addresses_exhausted", message, "give the host a larger network.address")

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()


def _surprise(error: Exception) -> HostFaultError:
    log.error("worker.crashed", exc_info=error)
    return HostFaultError("worker_crashed", f"an unexpected error: {error!r}"[:200], "report it with the host's log")
