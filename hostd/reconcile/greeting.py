"""How a guest is set going: its hello, the secrets that it waits for, its configuration, and from where it is to go on.

begun -- hello, configured already or with all secrets here --> going
begun -- hello --> waiting for secrets -- their values come --> going
begun -- hello --> waiting for word of its start -- the store has it --> going
a session that ends at any time --> begun, with the next
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fleet.errors import HostFaultError, UnavailableError
from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Reason, StageName
from hostd.drivers.ports import LinkMessage
from hostd.reconcile.book import Book
from hostd.reconcile.progress import Progress, fail, reach_stage
from hostd.reconcile.secrets import Vault
from hostd.reconcile.spool import Spool
from hostd.reconcile.words import LINK_VERSION, clean, describe_configuration, parse_boot

GUEST_RESTARTED = Reason(
    "guest_restarted", "the guest began anew after its agents had started", "see the console log on the host"
)

# The kernel's boot id is a UUID of 36 characters; whatever a hostile guest says instead is cut.
BOOT_ID_CHARS_MAX = 64

Send = Callable[[SandboxId, LinkMessage], Awaitable[None]]


@dataclass(slots=True)
class _Greeting:
    """How far a guest has come in this session."""

    is_greeted: bool = False
    is_going: bool = False
    # The boot id of a guest that waits; and since when one has waited for secrets, in whatever session.
    waiting_boot_id: str | None = None
    waits_since_s: float | None = None


class Greetings:
    """The beginnings of all conversations; `take_agent` is given what a guest says of each agent in its hello."""

    def __init__(
        self,
        book: Book,
        send: Send,
        spool: Spool,
        take_agent: Callable[[SandboxId, Mapping[str, Any]], None],
        *,
        prefix_length: int,
        clock: Callable[[], float],
        may_begin: Callable[[SandboxId], bool] = lambda _sandbox_id: True,
    ) -> None:
        self._may_begin = may_begin
        self._book = book
        self._send = send
        self._spool = spool
        self._take_agent = take_agent
        self._prefix_length = prefix_length
        self._clock = clock
        self._vault = Vault()
        # From whom the values came that are held for a run: the same again is no event.
        self._received: dict[SandboxId, tuple[int, str]] = {}
        self._greetings: dict[SandboxId, _Greeting] = {}

    def begin(self, sandbox_id: SandboxId) -> None:
        """A session begins; how long the guest has waited for its secrets goes on."""
        known = self._greetings.get(sandbox_id, _Greeting())
        self._greetings[sandbox_id] = _Greeting(waits_since_s=known.waits_since_s)

    def hang_up(self, sandbox_id: SandboxId) -> None:
        """The session has ended."""
        self.begin(sandbox_id)

    def forget(self, sandbox_id: SandboxId) -> None:
        """Nothing more is said to this guest."""
        self._greetings.pop(sandbox_id, None)
        self.forget_secrets(sandbox_id)

    def forget_secrets(self, sandbox_id: SandboxId) -> None:
        """Drops the values of its secrets."""
        self._vault.drop(sandbox_id)
        self._received.pop(sandbox_id, None)

    def is_going(self, sandbox_id: SandboxId) -> bool:
        """Whether the guest has all it needs, in this session."""
        known = self._greetings.get(sandbox_id)
        return known is not None and known.is_going

    def awaits_secrets(self, order: Assignment) -> bool:
        """Whether values are missing, be it that the guest is there already or not yet."""
        is_configured = self._book.progress(order.sandbox_id).is_configured
        is_waiting = self._waiting_boot_id(order.sandbox_id) is not None
        return (is_waiting or not is_configured) and not self._vault.has_all(order)

    def awaits_word(self, sandbox_id: SandboxId) -> bool:
        """Whether a guest is there that waits, be it for its secrets or for the store to hear that it has started."""
        return self._waiting_boot_id(sandbox_id) is not None

    async def press_on(self, order: Assignment) -> None:
        """Sets a guest going that waited, if nothing is missing any more."""
        boot_id = self._waiting_boot_id(order.sandbox_id)
        if boot_id is not None and self._is_ready(order):
            await self._set_going(order, boot_id, {})

    def waits_s(self, order: Assignment) -> float | None:
        """For how many seconds the guest has waited for values that are not here; None for one that does not."""
        known = self._greetings.get(order.sandbox_id)
        if known is None or known.waits_since_s is None or self._vault.has_all(order):
            return None
        return self._clock() - known.waits_since_s

    async def take_secrets(self, order: Assignment, values: Sequence[tuple[str, bytes]], actor: str) -> None:
        """Holds the values until the guest has them, and gives them to one that waits. Safe to repeat.

        Raises InvalidSpecError when they are not those of the spec, HostFaultError `disk_failed` when it cannot be written down.
        """
        sandbox_id = order.sandbox_id
        if self._book.progress(sandbox_id).is_configured and self._waiting_boot_id(sandbox_id) is None:
            return
        self._vault.put(order, values)
        try:
            if self._received.get(sandbox_id) != (order.run, actor):
                self._book.record(order, "secrets.received", ", ".join(order.spec.secrets), actor)
                self._received[sandbox_id] = (order.run, actor)
            with suppress(UnavailableError):
                # A link that breaks meanwhile begins anew with hello, and finds the values here.
                await self.press_on(order)
        except HostFaultError:
            # The guest waits on, and says so: whoever sends them again may find the disk mended.
            self.forget_secrets(sandbox_id)
            raise
        self._book.changed()

    async def take_hello(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Takes a session's first message, and sets the guest going if nothing is missing."""
        order, progress, fields = self._book.orders.orders[sandbox_id], self._book.progress(sandbox_id), message.fields
        if fields["version"] != LINK_VERSION:
            text = f"the guest speaks link version {clean(fields['version'])}, this host {LINK_VERSION}"
            self._book.save(fail(progress, Reason("guest_unsupported", text, "use an image of this host's release")))
            return
        greeting = self._greetings[sandbox_id]
        if greeting.is_greeted:
            raise ValueError("it greets twice in one session")
        greeting.is_greeted = True
        boot_id, is_configured = clean(fields.get("boot_id", ""))[:BOOT_ID_CHARS_MAX], fields["configured"] is True
        if not is_configured and _may_have_run(progress, boot_id):
            self._book.save(fail(progress, GUEST_RESTARTED))
            return
        self._note_connection(progress, {} if is_configured else fields)
        if is_configured:
            self.forget_secrets(sandbox_id)
        elif not self._is_ready(order):
            greeting.waiting_boot_id = boot_id
            if not self._vault.has_all(order):
                greeting.waits_since_s = self._clock() if greeting.waits_since_s is None else greeting.waits_since_s
            self._book.changed()
            return
        await self._set_going(order, None if is_configured else boot_id, fields["agents"])

    def _is_ready(self, order: Assignment) -> bool:
        """Whether a guest may be configured: its secrets are here, and the store knows that it has started.

        One of which nothing was told is begun anew elsewhere when its host is lost: an agent that never restarts would run twice.
        """
        return self._vault.has_all(order) and self._may_begin(order.sandbox_id)

    def _note_connection(self, progress: Progress, fields: Mapping[str, Any]) -> None:
        now_ms = self._book.now_ms()
        for stage in parse_boot(fields, now_ms):
            progress = reach_stage(progress, stage.name, stage.at_ms)
        self._book.save(reach_stage(progress, StageName.LINK_CONNECTED, now_ms))

    async def _set_going(self, order: Assignment, boot_id: str | None, agents: Mapping[str, Any]) -> None:
        """Configures the guest with `boot_id`, None for one that is; takes over its agents, and asks for what is missing."""
        sandbox_id = order.sandbox_id
        # Of this session: should another begin meanwhile, that one has a greeting of its own.
        greeting = self._greetings[sandbox_id]
        if boot_id is not None:
            await self._configure(order, boot_id)
        for name, state in agents.items():
            self._take_agent(sandbox_id, {**state, "name": name})
        await self._send(sandbox_id, LinkMessage("resume", self._spool.describe_resume(sandbox_id)))
        greeting.is_going = True

    async def _configure(self, order: Assignment, boot_id: str) -> None:
        sandbox_id = order.sandbox_id
        progress = reach_stage(self._book.progress(sandbox_id), StageName.CONFIGURED, self._book.now_ms())
        # On the disk before the guest hears of it: from here on no other domain is ever started for this sandbox.
        self._book.save(replace(progress, is_configured=True, boot_id=boot_id))
        greeting = self._greetings[sandbox_id]
        greeting.waiting_boot_id, greeting.waits_since_s = None, None
        for secret in self._vault.messages(order):
            await self._send(sandbox_id, secret)
        fields = describe_configuration(order, progress.address, self._prefix_length, self._book.now_ms())
        for agent in fields["agents"]:
            agent["output_max_bytes"] = self._book.orders.output_room(sandbox_id, agent["name"])
        await self._send(sandbox_id, LinkMessage("configure", fields))

    def _waiting_boot_id(self, sandbox_id: SandboxId) -> str | None:
        known = self._greetings.get(sandbox_id)
        return known.waiting_boot_id if known else None


def _may_have_run(progress: Progress, boot_id: str) -> bool:
    """Whether agents may have run in a guest that knows nothing of it: then it has restarted, and they would run twice."""
    is_another = progress.is_configured and progress.boot_id != boot_id
    return is_another or any(agent.started_at_ms for agent in progress.agents)
