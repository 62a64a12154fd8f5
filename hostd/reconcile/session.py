"""Turns what guests say on their links into progress, and tells guests what to do next. Knows no socket and no libvirt.

The guest is hostile: names must be those of the spec, offsets may lie, an artifact must have its digest. What cannot be taken fails
that sandbox and nothing else; from a sandbox that is over nothing is taken any more.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from fleet.errors import ConflictError, HostFaultError, UnavailableError
from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import ENDED_AGENT_PHASES, Goal, Reason, StageName
from hostd.allowance import Allowance
from hostd.drivers.ports import GuestLinks, LinkMessage
from hostd.orders import Orders
from hostd.reconcile.book import Book
from hostd.reconcile.execs import Exec, Execs, Program
from hostd.reconcile.greeting import Greetings
from hostd.reconcile.patience import (
    SECRETS_AWAITED,
    ListeningClock,
    Waiting,
    describe_silence,
    find_lateness,
    find_overdue,
)
from hostd.reconcile.progress import (
    awaits_poweroff,
    change_agent,
    fail,
    has_stage,
    have_agents_ended,
    reach_stage,
)
from hostd.reconcile.spool import Spool
from hostd.reconcile.words import (
    clean,
    parse_agent,
    parse_failure,
    parse_whole,
)

# 16 TiB: more than any host has, so that a number stays one.
GUEST_MEMORY_MIB_MAX = 2**24

# Sixteen agents that fail at once and are started again change 64 times in their first second, and ever more slowly: the pause
# before a start doubles.
CHANGES_PER_S, CHANGES_BURST = 8.0, 80.0
# For long: each of them, started again once a minute, changes 32 times in it, after some 200 changes at first. A guest that goes on
# at the rate above would write the journal, which all tenants of a host share, full in hours.
LONG_CHANGES_PER_S, LONG_CHANGES_BURST = 1.0, 400.0
# Each program is two durable lines in the journal that all tenants of a host share: whoever begins them in a loop must not push
# the others' events out within minutes. A build that runs hundreds of them goes on at the rate.
EXECS_PER_S, EXECS_BURST = 2.0, 200.0
# A caller waits this long for its turn; one who is further in debt is told so.
EXEC_WAIT_S_MAX = 10.0
# What the driver says and not the guest.
LINK_EVENTS = frozenset({"disconnected", "broken"})

log = structlog.get_logger()


@dataclass(slots=True)
class _Live:
    """What is known of a guest only while hostd runs; a restart begins it anew from the guest's hello."""

    heard_at_s: float
    # What its agents' changes may cost: each is written durably.
    changes: Allowance
    long_changes: Allowance
    # What the programs that its owner begins may cost.
    execs: Allowance
    is_collecting: bool = False
    is_stopping: bool = False
    is_powering_off: bool = False
    memory_used_mib: int = 0
    # When the last agent ended, for hostd's own patience.
    finishes_since_s: float | None = None
    # Since when hostd listens in vain for the end of each agent whose time is over.
    overdue_since_s: dict[str, float] = field(default_factory=dict)


class Sessions:
    """The conversations with all guests of this host.

    `changed` is called when a sandbox has come further, `counted` when only more of its output is here. `may_begin` says whether
    the fleet knows that a sandbox has started: before that no agent of it runs.
    """

    def __init__(
        self,
        orders: Orders,
        links: GuestLinks,
        changed: Callable[[], None],
        now_ms: Callable[[], int],
        *,
        prefix_length: int = 16,
        clock: Callable[[], float] = time.monotonic,
        counted: Callable[[], None] = lambda: None,
        may_begin: Callable[[SandboxId], bool] = lambda _sandbox_id: True,
    ) -> None:
        self._book = Book(orders, changed, counted, now_ms)
        self._links = links
        self._now_ms = now_ms
        self._clock = ListeningClock(clock)
        self._live: dict[SandboxId, _Live] = {}
        self._spool = Spool(self._book, links.send, self._clock)
        self._execs = Execs(links.send, clock)
        self._greetings = Greetings(
            self._book,
            links.send,
            self._spool,
            self._take_agent,
            prefix_length=prefix_length,
            clock=self._clock,
            may_begin=may_begin,
        )
        self._handlers: dict[str, Callable[[SandboxId, LinkMessage], Awaitable[None]]] = {
            "connected": self._on_connected,
            "disconnected": self._on_disconnected,
            "hello": self._greetings.take_hello,
            "agent": self._on_agent,
            "heartbeat": self._on_heartbeat,
            "output": self._on_output,
            "truncated": self._on_truncated,
            "artifact": self._on_artifact,
            "exec-started": self._on_exec,
            "exec-output": self._on_exec,
            "exec-input-ack": self._on_exec,
            "exec-ended": self._on_exec,
            "failed": self._on_failed,
            "broken": self._on_failed,
        }

    def attach(self, sandbox_id: SandboxId, link_path: str) -> None:
        """Begins to listen to a guest."""
        if sandbox_id not in self._live:
            changes = Allowance(CHANGES_PER_S, CHANGES_BURST, self._clock)
            long_changes = Allowance(LONG_CHANGES_PER_S, LONG_CHANGES_BURST, self._clock)
            execs = Allowance(EXECS_PER_S, EXECS_BURST, self._clock)
            self._live[sandbox_id] = _Live(self._clock(), changes, long_changes, execs)
            self._greetings.begin(sandbox_id)
        self._spool.begin(sandbox_id)
        self._links.attach(sandbox_id, link_path, self.receive)

    async def detach(self, sandbox_id: SandboxId) -> None:
        """Ends the conversation with a guest."""
        self._execs.cut_off(sandbox_id, _no_longer_running())
        await self._links.detach(sandbox_id)
        self._live.pop(sandbox_id, None)
        self._greetings.forget(sandbox_id)
        self._spool.forget(sandbox_id)

    def attached(self) -> frozenset[SandboxId]:
        """Guests that are listened to."""
        return frozenset(self._live)

    def guest_memory_mib(self, sandbox_id: SandboxId) -> int:
        """How much memory the guest says it uses; 0 before its first heartbeat."""
        live = self._live.get(sandbox_id)
        return live.memory_used_mib if live else 0

    def silent_s(self, sandbox_id: SandboxId) -> float:
        """Seconds since the guest was last heard of, or since hostd began to listen."""
        live = self._live.get(sandbox_id)
        return self._clock() - live.heard_at_s if live else 0.0

    def awaits_word(self, sandbox_id: SandboxId) -> bool:
        """Whether a guest is there that was not set going yet."""
        return self._greetings.awaits_word(sandbox_id)

    def notice(self, sandbox_id: SandboxId) -> Reason | None:
        """What its owner should know of a sandbox that is well so far: it waits for secrets, or its guest has gone quiet."""
        order = self._book.open_order(sandbox_id)
        if order is None:
            return None
        if self._greetings.awaits_secrets(order):
            return SECRETS_AWAITED
        has_begun = any(agent.started_at_ms for agent in self._book.progress(sandbox_id).agents)
        return describe_silence(self.silent_s(sandbox_id)) if has_begun else None

    def lateness(self, sandbox_id: SandboxId) -> Reason | None:
        """Why the sandbox has failed by now, if hostd has waited too long for its guest."""
        live, order = self._live.get(sandbox_id), self._book.open_order(sandbox_id)
        if live is None or order is None:
            return None
        now_s, progress = self._clock(), self._book.progress(sandbox_id)
        if live.finishes_since_s is None and have_agents_ended(progress):
            live.finishes_since_s = now_s
            self._spool.touch(sandbox_id)
        overdue = find_overdue(order, progress, self._now_ms())
        live.overdue_since_s = {name: live.overdue_since_s.get(name, now_s) for name in overdue}
        waiting = Waiting(
            secrets_s=self._greetings.waits_s(order),
            finish_s=None if live.finishes_since_s is None else now_s - live.finishes_since_s,
            stalled_s=self._spool.stalled_s(sandbox_id),
            is_collecting=has_stage(progress, StageName.AGENTS_ENDED),
            has_begun_artifact=self._spool.has_begun_artifact(sandbox_id),
            overdue_s={name: now_s - since_s for name, since_s in live.overdue_since_s.items()},
        )
        return find_lateness(order, waiting)

    def forget_secrets(self, sandbox_id: SandboxId) -> None:
        """Drops the values of a sandbox that is over: one whose guest never came would keep them for ever."""
        self._greetings.forget_secrets(sandbox_id)

    async def take_secrets(self, order: Assignment, values: Sequence[tuple[str, bytes]], actor: str = "") -> None:
        """Holds the values of a sandbox's secrets until its guest has them; `actor` sends them. Safe to repeat.

        Raises InvalidSpecError when they are not those of its spec, ConflictError `not_running` when it is over, HostFaultError
        `disk_failed` when the host cannot write down that it has them.
        """
        if self._book.open_order(order.sandbox_id) is None:
            raise _no_longer_running()
        await self._greetings.take_secrets(order, values, actor)

    async def open_exec(self, sandbox_id: SandboxId, program: Program, actor: str = "") -> Exec:
        """Begins a program for `actor` in a guest whose agents run, and writes down that it does.

        Raises ConflictError or UnavailableError `not_running` when they do not, UnavailableError `execs_exhausted` or `link_down`.
        """
        live, order = self._live.get(sandbox_id), self._book.open_order(sandbox_id)
        if order is None or have_agents_ended(self._book.progress(sandbox_id)):
            raise _no_longer_running()
        if live is None or not any(agent.started_at_ms for agent in self._book.progress(sandbox_id).agents):
            next_step = "wait until it runs: mb status NAME"
            raise UnavailableError("not_running", f"sandbox {order.spec.name} is still starting", next_step)
        if not self._greetings.is_going(sandbox_id):
            raise _link_lost()
        await _take_turn(live.execs)
        self._book.record(order, "exec.started", program.name, actor)
        try:
            return await self._execs.open(sandbox_id, program)
        except UnavailableError as error:
            self.note_exec_end(order, program, error.code, actor)
            raise

    def abandon_exec(self, sandbox_id: SandboxId, opened: Exec) -> None:
        """The caller of a program is gone: it is ended in the guest, without waiting. Safe to repeat, and after its end."""
        self._execs.abandon(sandbox_id, opened)

    def note_exec_end(self, order: Assignment, program: Program, how: str, actor: str = "") -> None:
        """Records how a program ended for its caller; raises nothing, for it has ended."""
        try:
            self._book.record(order, "exec.ended", f"{program.name}: {how}", actor)
        except HostFaultError as error:
            log.warning("exec.unrecorded", sandbox_id=order.sandbox_id, error=error.message)

    async def receive(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Takes one message of a guest; whatever is wrong with it fails that sandbox only, and nothing is raised."""
        live, handler = self._live.get(sandbox_id), self._handlers.get(message.type)
        if live is None:
            return
        if self._book.open_order(sandbox_id) is None:
            if message.type == "hello":
                live.is_powering_off = False
                with suppress(UnavailableError):
                    await self._power_off(sandbox_id, live)
            return
        if message.type not in LINK_EVENTS:
            live.heard_at_s = self._clock()
        if handler is None:
            return
        try:
            await handler(sandbox_id, message)
            await self.press_on(sandbox_id)
        except UnavailableError:
            # The link went down meanwhile: the next session begins with hello, from which everything is resumed.
            pass
        except (OSError, HostFaultError) as error:
            reason = Reason("host_disk_failed", clean(error), "free space on the host, then submit it again")
            self._book.fail(sandbox_id, reason)
        except Exception as error:  # the rim: no guest may end more than itself, whatever it finds to say
            log.warning("guest.misspoke", sandbox_id=sandbox_id, type=clean(message.type)[:40], error=repr(error))
            text = f"a message {clean(message.type)[:40]} of the guest could not be taken: {clean(error)}"
            self._book.fail(sandbox_id, Reason("guest_link_broken", text, "see the console log on the host"))

    async def press_on(self, sandbox_id: SandboxId) -> None:
        """Tells the guest what is due by now: stop, or hand the artifact over. Safe to call at any time."""
        live, order = self._live.get(sandbox_id), self._book.open_order(sandbox_id)
        if live is not None and order is None:
            await self._power_off(sandbox_id, live)
        if live is not None and order is not None:
            await self._greetings.press_on(order)
        if live is None or order is None or not self._greetings.is_going(sandbox_id):
            return
        progress = self._book.progress(sandbox_id)
        # Noted before it is sent: a send that fails ends the session, and the next one begins with nothing noted.
        if order.goal is Goal.STOP and not live.is_stopping and not have_agents_ended(progress):
            live.is_stopping = True
            await self._links.send(sandbox_id, LinkMessage("stop"))
        if have_agents_ended(progress) and not live.is_collecting and self._spool.has_all_output(sandbox_id):
            live.is_collecting = True
            self._execs.cut_off(sandbox_id, _no_longer_running())
            if not has_stage(progress, StageName.AGENTS_ENDED):
                self._spool.touch(sandbox_id)
            self._book.save(reach_stage(progress, StageName.AGENTS_ENDED, self._now_ms()))
            await self._links.send(sandbox_id, LinkMessage("collect"))

    async def _power_off(self, sandbox_id: SandboxId, live: _Live) -> None:
        """Once the result is stored, a guest whose disk is kept brings it in order first; hostd removes the VM in any case."""
        orders = self._book.orders
        order, progress = orders.orders.get(sandbox_id), orders.progress.get(sandbox_id)
        if order is None or progress is None or live.is_powering_off:
            return
        if awaits_poweroff(progress, order.goal, self._now_ms()):
            live.is_powering_off = True
            await self._links.send(sandbox_id, LinkMessage("poweroff"))

    async def _on_connected(self, sandbox_id: SandboxId, _message: LinkMessage) -> None:
        live = self._live[sandbox_id]
        live.is_collecting, live.is_stopping = False, False
        self._greetings.begin(sandbox_id)
        self._spool.begin(sandbox_id)
        self._execs.cut_off(sandbox_id, _link_lost())

    async def _on_disconnected(self, sandbox_id: SandboxId, _message: LinkMessage) -> None:
        self._greetings.hang_up(sandbox_id)
        self._execs.cut_off(sandbox_id, _link_lost())

    async def _on_heartbeat(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        if "memory_used_mib" in message.fields:
            used_mib = parse_whole(message.fields, "memory_used_mib", GUEST_MEMORY_MIB_MAX)
            self._live[sandbox_id].memory_used_mib = used_mib

    async def _on_agent(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        self._take_agent(sandbox_id, message.fields)

    def _take_agent(self, sandbox_id: SandboxId, fields: Mapping[str, Any]) -> None:
        known = self._book.known_agent(sandbox_id, fields["name"])
        status = parse_agent(known, fields, self._now_ms())
        if status is None:
            return
        # It is configured: what it was given stands in its own memory.
        self._greetings.forget_secrets(sandbox_id)
        if status.phase in ENDED_AGENT_PHASES:
            self._spool.expect(sandbox_id, known.name, parse_whole(fields, "offset") if "offset" in fields else 0)
        progress = reach_stage(self._book.progress(sandbox_id), StageName.AGENTS_STARTED, self._now_ms())
        changed = change_agent(progress, status)
        live = self._live[sandbox_id]
        is_change = changed != self._book.progress(sandbox_id)
        if is_change and (live.changes.spend(1) or live.long_changes.spend(1)):
            raise ValueError("its agents change more often than agents can")
        self._book.save(changed)

    async def _on_output(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        await self._spool.take_output(sandbox_id, message.fields, message.payload)

    async def _on_truncated(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        self._spool.take_truncated(sandbox_id, message.fields)

    async def _on_artifact(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        await self._spool.take_artifact(sandbox_id, message.fields, message.payload)

    async def _on_exec(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        self._execs.take(sandbox_id, message)

    async def _on_failed(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        self._book.save(fail(self._book.progress(sandbox_id), parse_failure(message.fields)))


async def _take_turn(execs: Allowance) -> None:
    if execs.spend(0.0) > EXEC_WAIT_S_MAX:
        message = f"the sandbox is given more than {EXECS_PER_S:.0f} programs a second for long"
        raise UnavailableError("execs_exhausted", message, "wait a moment; run a script that runs them all")
    await asyncio.sleep(execs.spend(1.0))


def _no_longer_running() -> ConflictError:
    next_step = "mb start NAME once it is stopped; else mb destroy NAME, then mb up"
    return ConflictError("not_running", "the sandbox's agents run no more", next_step)


def _link_lost() -> UnavailableError:
    return UnavailableError("guest_link_lost", "the link to the guest is down, and no program outlives it", "try again")
