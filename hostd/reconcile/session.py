"""Turns what guests say on their links into progress, and tells guests what to do next. Knows no socket and no libvirt.

The guest is hostile: names must be those of the spec, offsets may lie, an artifact must have its digest. What cannot be taken fails
that sandbox and nothing else; from a sandbox that is over nothing is taken any more. Output is not fsynced: it is acknowledged once
the page cache has it, which a crash of hostd survives; a crash of the host ends the VM too.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from fleet.errors import HostFaultError, UnavailableError
from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import AgentPhase, AgentStatus, Artifact, Goal, Reason, StageName
from hostd.drivers.ports import GuestLinks, LinkMessage
from hostd.files import disk_faults, sync_folder
from hostd.orders import Orders
from hostd.reconcile.progress import (
    Progress,
    awaits_poweroff,
    change_agent,
    fail,
    find_agent,
    have_agents_ended,
    is_over,
    reach_stage,
)
from hostd.reconcile.words import (
    LINK_VERSION,
    clean,
    describe_configuration,
    parse_agent,
    parse_artifact,
    parse_failure,
    parse_whole,
)

GUEST_RESTARTED = Reason(
    "guest_restarted", "the guest began anew after its agents had started", "see the console log on the host"
)
ARTIFACT_CORRUPT = Reason(
    "artifact_corrupt",
    "the artifact does not have the digest the guest told",
    "its output is there: mb logs NAME; submit it again",
)

# The kernel's boot id is a UUID of 36 characters; whatever a hostile guest says instead is cut.
BOOT_ID_CHARS_MAX = 64

log = structlog.get_logger()


@dataclass(slots=True)
class _Live:
    """What is known of a guest only while hostd runs; a restart begins it anew from the guest's hello."""

    heard_at_s: float
    has_hello: bool = False
    is_collecting: bool = False
    is_stopping: bool = False
    is_powering_off: bool = False
    # Final output lengths, as told; the agent is done with when the host holds as much.
    final_bytes: dict[str, int] | None = None
    artifact: Artifact | None = None


class Sessions:
    """The conversations with all guests of this host.

    `changed` is called when a sandbox has come further, `counted` when only more of its output is here.
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
    ) -> None:
        self._orders = orders
        self._links = links
        self._changed = changed
        self._counted = counted
        self._now_ms = now_ms
        self._prefix_length = prefix_length
        self._clock = clock
        self._live: dict[SandboxId, _Live] = {}
        self._handlers: dict[str, Callable[[SandboxId, Mapping[str, Any], bytes], Awaitable[None]]] = {
            "connected": self._on_connected,
            "hello": self._on_hello,
            "agent": self._on_agent,
            "output": self._on_output,
            "truncated": self._on_truncated,
            "artifact": self._on_artifact,
            "failed": self._on_failed,
            "broken": self._on_failed,
        }

    def attach(self, sandbox_id: SandboxId, link_path: str) -> None:
        """Begins to listen to a guest."""
        self._live.setdefault(sandbox_id, _Live(self._clock()))
        self._links.attach(sandbox_id, link_path, self.receive)

    async def detach(self, sandbox_id: SandboxId) -> None:
        """Ends the conversation with a guest."""
        await self._links.detach(sandbox_id)
        self._live.pop(sandbox_id, None)

    def attached(self) -> frozenset[SandboxId]:
        """Guests that are listened to."""
        return frozenset(self._live)

    def silent_s(self, sandbox_id: SandboxId) -> float:
        """Seconds since the guest was last heard of, or since hostd began to listen."""
        live = self._live.get(sandbox_id)
        return self._clock() - live.heard_at_s if live else 0.0

    async def receive(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Takes one message of a guest; whatever is wrong with it fails that sandbox only, and nothing is raised."""
        live, handler = self._live.get(sandbox_id), self._handlers.get(message.type)
        if live is None:
            return
        if self._open_order(sandbox_id) is None:
            if message.type == "hello":
                live.is_powering_off = False
                with suppress(UnavailableError):
                    await self._power_off(sandbox_id, live)
            return
        live.heard_at_s = self._clock()
        if handler is None:
            return
        try:
            await handler(sandbox_id, message.fields, message.payload)
            await self.press_on(sandbox_id)
        except UnavailableError:
            # The link went down meanwhile: the next session begins with hello, from which everything is resumed.
            pass
        except (OSError, HostFaultError) as error:
            self._fail(
                sandbox_id, Reason("host_disk_failed", clean(error), "free space on the host, then submit it again")
            )
        except Exception as error:  # the rim: no guest may end more than itself, whatever it finds to say
            log.warning("guest.misspoke", sandbox_id=sandbox_id, type=message.type, error=repr(error))
            text = f"a message {message.type} of the guest could not be taken: {clean(error)}"
            self._fail(sandbox_id, Reason("guest_link_broken", text, "see the console log on the host"))

    async def press_on(self, sandbox_id: SandboxId) -> None:
        """Tells the guest what is due by now: stop, or hand the artifact over. Safe to call at any time."""
        live, order = self._live.get(sandbox_id), self._open_order(sandbox_id)
        if live is not None and order is None:
            await self._power_off(sandbox_id, live)
        if live is None or order is None or not live.has_hello:
            return
        progress = self._progress(sandbox_id)
        # Noted before it is sent: a send that fails ends the session, and the next one begins with nothing noted.
        if order.goal is Goal.STOP and not live.is_stopping and not have_agents_ended(progress):
            live.is_stopping = True
            await self._links.send(sandbox_id, LinkMessage("stop"))
        if have_agents_ended(progress) and not live.is_collecting and _has_all_output(progress, live):
            live.is_collecting = True
            self._save(reach_stage(progress, StageName.AGENTS_ENDED, self._now_ms()))
            await self._links.send(sandbox_id, LinkMessage("collect"))

    async def _power_off(self, sandbox_id: SandboxId, live: _Live) -> None:
        """Once the result is stored, a guest whose disk is kept brings it in order first; hostd removes the VM in any case."""
        order, progress = self._orders.orders.get(sandbox_id), self._orders.progress.get(sandbox_id)
        if order is None or progress is None or live.is_powering_off:
            return
        if awaits_poweroff(progress, order.goal, self._now_ms()):
            live.is_powering_off = True
            await self._links.send(sandbox_id, LinkMessage("poweroff"))

    async def _on_connected(self, sandbox_id: SandboxId, _fields: Mapping[str, Any], _payload: bytes) -> None:
        live = self._live[sandbox_id]
        live.has_hello, live.is_collecting, live.is_stopping = False, False, False
        live.final_bytes, live.artifact = {}, None

    async def _on_hello(self, sandbox_id: SandboxId, fields: Mapping[str, Any], _payload: bytes) -> None:
        order, progress = self._orders.orders[sandbox_id], self._progress(sandbox_id)
        if fields["version"] != LINK_VERSION:
            text = f"the guest speaks link version {clean(fields['version'])}, this host {LINK_VERSION}"
            self._save(fail(progress, Reason("guest_unsupported", text, "use an image of this host's release")))
            return
        boot_id, is_configured = clean(fields.get("boot_id", ""))[:BOOT_ID_CHARS_MAX], fields["configured"] is True
        if not is_configured and _may_have_run(progress, boot_id):
            self._save(fail(progress, GUEST_RESTARTED))
            return
        self._save(reach_stage(progress, StageName.LINK_CONNECTED, self._now_ms()))
        if not is_configured:
            await self._configure(order, boot_id)
        for name, state in fields["agents"].items():
            self._take_agent(sandbox_id, {**state, "name": name})
        offsets = {agent.name: self._orders.output_bytes(sandbox_id, agent.name) for agent in order.spec.agents}
        resume = {"agents": offsets, "artifact": _reopen(self._partial_artifact(sandbox_id))}
        await self._links.send(sandbox_id, LinkMessage("resume", resume))
        self._live[sandbox_id].has_hello = True

    async def _configure(self, order: Assignment, boot_id: str) -> None:
        progress = reach_stage(self._progress(order.sandbox_id), StageName.CONFIGURED, self._now_ms())
        # On the disk before the guest hears of it: from here on no other domain is ever started for this sandbox.
        self._save(replace(progress, is_configured=True, boot_id=boot_id))
        fields = describe_configuration(order, progress.address, self._prefix_length, self._now_ms())
        for agent in fields["agents"]:
            agent["output_max_bytes"] = self._orders.output_room(order.sandbox_id, agent["name"])
        await self._links.send(order.sandbox_id, LinkMessage("configure", fields))

    async def _on_agent(self, sandbox_id: SandboxId, fields: Mapping[str, Any], _payload: bytes) -> None:
        self._take_agent(sandbox_id, fields)

    def _take_agent(self, sandbox_id: SandboxId, fields: Mapping[str, Any]) -> None:
        known = self._known_agent(sandbox_id, fields["name"])
        status = parse_agent(known, fields, self._now_ms())
        if status is None:
            return
        if status.phase is not AgentPhase.RUNNING:
            length = parse_whole(fields, "offset") if "offset" in fields else 0
            finals = self._live[sandbox_id].final_bytes or {}
            self._live[sandbox_id].final_bytes = {
                **finals,
                known.name: min(length, self._orders.output_room(sandbox_id, known.name)),
            }
        progress = reach_stage(self._progress(sandbox_id), StageName.AGENTS_STARTED, self._now_ms())
        self._save(change_agent(progress, status))

    async def _on_output(self, sandbox_id: SandboxId, fields: Mapping[str, Any], payload: bytes) -> None:
        known, offset = self._known_agent(sandbox_id, fields["agent"]), parse_whole(fields, "offset")
        held, room = self._orders.output_bytes(sandbox_id, known.name), self._orders.output_room(sandbox_id, known.name)
        if held < offset and held < room:
            raise ValueError(f"output at {offset} does not follow the {held} bytes held")
        fresh = payload[held - offset :][: max(0, room - held)]
        if fresh:
            with self._orders.output_path(sandbox_id, known.name).open("ab") as stream:
                stream.write(fresh)
            held += len(fresh)
            progress = reach_stage(self._progress(sandbox_id), StageName.FIRST_OUTPUT, self._now_ms())
            self._hold(replace(known, output_bytes=held), progress)
        await self._links.send(sandbox_id, LinkMessage("ack", {"agent": known.name, "offset": held}))

    async def _on_truncated(self, sandbox_id: SandboxId, fields: Mapping[str, Any], _payload: bytes) -> None:
        known = self._known_agent(sandbox_id, fields["agent"])
        if not known.output_truncated:
            self._hold(replace(known, output_truncated=True), self._progress(sandbox_id))
            # The guest says it once: a restart must still know it.
            self._orders.put_progress(self._progress(sandbox_id))

    async def _on_artifact(self, sandbox_id: SandboxId, fields: Mapping[str, Any], payload: bytes) -> None:
        live, path = self._live[sandbox_id], self._partial_artifact(sandbox_id)
        offset, artifact, held = parse_whole(fields, "offset"), parse_artifact(fields), _size(path)
        if not have_agents_ended(self._progress(sandbox_id)):
            raise ValueError("an artifact before its agents have ended")
        if live.artifact not in (None, artifact) or held > artifact.size_bytes:
            raise ValueError("the artifact is not the one that was begun")
        if offset > held:
            raise ValueError(f"an artifact's chunk at {offset} does not follow the {held} bytes held")
        live.artifact = artifact
        with path.open("ab") as stream:
            stream.write(payload[held - offset :][: artifact.size_bytes - held])
        held = _size(path)
        await self._links.send(sandbox_id, LinkMessage("ack", {"artifact": True, "offset": held}))
        if held == artifact.size_bytes:
            await self._store_artifact(sandbox_id, artifact)

    async def _store_artifact(self, sandbox_id: SandboxId, artifact: Artifact) -> None:
        path = self._partial_artifact(sandbox_id)
        actual = await asyncio.to_thread(_seal, path)
        if self._open_order(sandbox_id) is None:
            return
        if actual != artifact.digest:
            path.unlink()
            self._save(fail(self._progress(sandbox_id), ARTIFACT_CORRUPT))
            return
        path.replace(self._orders.artifact_path(sandbox_id))
        sync_folder(path.parent)
        progress = reach_stage(self._progress(sandbox_id), StageName.ARTIFACT_STORED, self._now_ms())
        self._save(replace(progress, artifact=artifact))

    async def _on_failed(self, sandbox_id: SandboxId, fields: Mapping[str, Any], _payload: bytes) -> None:
        self._save(fail(self._progress(sandbox_id), parse_failure(fields)))

    def _open_order(self, sandbox_id: SandboxId) -> Assignment | None:
        order, progress = self._orders.orders.get(sandbox_id), self._orders.progress.get(sandbox_id)
        return None if order is None or progress is None or is_over(progress, order.goal) else order

    def _progress(self, sandbox_id: SandboxId) -> Progress:
        return self._orders.progress[sandbox_id]

    def _known_agent(self, sandbox_id: SandboxId, name: Any) -> AgentStatus:
        known = find_agent(self._progress(sandbox_id), name)
        if known is None:
            raise ValueError(f"the spec has no agent {clean(name)[:40]!r}")
        return known

    def _save(self, progress: Progress) -> None:
        if self._orders.progress.get(progress.sandbox_id) != progress:
            self._orders.put_progress(progress)
            self._changed()

    def _fail(self, sandbox_id: SandboxId, reason: Reason) -> None:
        failed = fail(self._progress(sandbox_id), reason)
        try:
            self._save(failed)
        except HostFaultError as error:
            # The disk may be what failed. In memory the sandbox is over all the same, and its VM is taken down.
            log.error("progress.unwritten", sandbox_id=sandbox_id, error=error.message)
            self._orders.hold_progress(failed)
            self._changed()

    def _hold(self, agent: AgentStatus, progress: Progress) -> None:
        """Takes over an agent's counters, also those of one that has ended while its last output was still on its way."""
        agents = tuple(agent if other.name == agent.name else other for other in progress.agents)
        is_new_stage = progress.stages != self._progress(progress.sandbox_id).stages
        self._orders.hold_progress(replace(progress, agents=agents))
        if is_new_stage:
            self._orders.put_progress(replace(progress, agents=agents))
            self._changed()
        self._counted()

    def _partial_artifact(self, sandbox_id: SandboxId) -> Path:
        return self._orders.partial_artifact_path(sandbox_id)


def _may_have_run(progress: Progress, boot_id: str) -> bool:
    """Whether agents may have run in a guest that knows nothing of it: then it has restarted, and they would run twice."""
    is_another = progress.is_configured and progress.boot_id != boot_id
    return is_another or any(agent.started_at_ms for agent in progress.agents)


def _has_all_output(progress: Progress, live: _Live) -> bool:
    finals = live.final_bytes or {}
    has_all = all(
        agent.output_truncated or agent.output_bytes >= finals.get(agent.name, 0) for agent in progress.agents
    )
    return has_all and set(finals) >= {agent.name for agent in progress.agents}


def _reopen(path: Path) -> int:
    """From where an artifact is to go on: never from its end, for only a chunk tells what the whole has to be."""
    size_bytes = _size(path)
    if size_bytes == 0:
        return 0
    os.truncate(path, size_bytes - 1)
    return size_bytes - 1


def _seal(path: Path) -> str:
    """Makes a file durable and gives its digest. Reads up to ARTIFACT_BYTES_MAX: run it in a thread."""
    with disk_faults(path), path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return "sha256:" + digest


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
