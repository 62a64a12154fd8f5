"""Turns what guests say on their links into progress, and tells guests what to do next. Knows no socket and no libvirt.

The guest is hostile: names must be those of the spec, offsets may lie, texts are cut, an artifact must have its digest. Output
is not fsynced: it is acknowledged once the page cache has it, which a crash of hostd survives; a crash of the host ends the VM too.
"""

import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Any

import structlog

from fleet.errors import UnavailableError
from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, SandboxId, is_digest
from fleet.model.sandbox import Agent, AgentPhase, AgentStatus, Artifact, Goal, Reason
from fleet.model.units import MIB
from hostd.drivers.ports import GuestLinks, LinkMessage
from hostd.orders import Orders
from hostd.reconcile.progress import Progress, change_agent, fail, find_agent, have_agents_ended, is_over, reach_stage
from hostd.reconcile.state import mac_address

LINK_VERSION = 1
# What one agent may print. Far more than anyone reads, little enough that a thousand sandboxes do not fill a host's disk.
OUTPUT_BYTES_MAX = 64 * MIB
ARTIFACT_BYTES_MAX = 1024 * MIB
ARTIFACT_CHANGES_MAX = 200_000
TEXT_CHARS_MAX = 500

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_AGENT_PHASES = {"running": AgentPhase.RUNNING, "timed-out": AgentPhase.TIMED_OUT, "failed": AgentPhase.FAILED}

log = structlog.get_logger()


@dataclass(slots=True)
class _Live:
    """What is known of a guest only while hostd runs; a restart begins it anew from the guest's hello."""

    heard_at_s: float
    has_hello: bool = False
    # Final output lengths, as told; the agent is done with when the host holds as much.
    final_bytes: dict[str, int] | None = None
    is_collecting: bool = False
    is_stopping: bool = False


class Sessions:
    """The conversations with all guests of this host."""

    def __init__(
        self,
        orders: Orders,
        links: GuestLinks,
        changed: Callable[[], None],
        now_ms: Callable[[], int],
        *,
        prefix_length: int = 16,
    ) -> None:
        self._orders = orders
        self._links = links
        self._changed = changed
        self._now_ms = now_ms
        self._prefix_length = prefix_length
        self._live: dict[SandboxId, _Live] = {}
        self._handlers: dict[str, Callable[[SandboxId, LinkMessage], Awaitable[None]]] = {
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
        self._live.setdefault(sandbox_id, _Live(time.monotonic()))
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
        return time.monotonic() - live.heard_at_s if live else 0.0

    async def receive(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Takes one message of a guest; whatever is wrong with it fails that sandbox only."""
        live = self._live.get(sandbox_id)
        if live is None or sandbox_id not in self._orders.progress:
            return
        live.heard_at_s = time.monotonic()
        handler = self._handlers.get(message.type)
        if handler is None:
            return
        try:
            await handler(sandbox_id, message)
            await self.press_on(sandbox_id)
        except UnavailableError:
            # The link went down meanwhile: the next session begins with hello, from which everything is resumed.
            pass
        except (KeyError, ValueError, TypeError, OSError) as error:
            log.warning("guest.misspoke", sandbox_id=sandbox_id, type=message.type, error=repr(error))
            text = f"a {message.type[:40]} message of the guest could not be taken: {_clean(repr(error))}"
            self._save(fail(self._progress(sandbox_id), Reason("guest_link_broken", text)))

    async def press_on(self, sandbox_id: SandboxId) -> None:
        """Tells the guest what is due by now: stop, or hand the artifact over. Safe to call at any time."""
        live, progress = self._live.get(sandbox_id), self._orders.progress.get(sandbox_id)
        order = self._orders.orders.get(sandbox_id)
        if live is None or progress is None or order is None or not live.has_hello:
            return
        if is_over(progress, order.goal):
            return
        if order.goal is Goal.STOP and not live.is_stopping and not have_agents_ended(progress):
            await self._links.send(sandbox_id, LinkMessage("stop"))
            live.is_stopping = True
        if have_agents_ended(progress) and not live.is_collecting and self._has_all_output(progress, live):
            self._save(reach_stage(progress, "agents_ended", self._now_ms()))
            await self._links.send(sandbox_id, LinkMessage("collect"))
            live.is_collecting = True

    async def _on_connected(self, sandbox_id: SandboxId, _message: LinkMessage) -> None:
        live = self._live[sandbox_id]
        live.has_hello, live.final_bytes, live.is_collecting, live.is_stopping = False, {}, False, False

    async def _on_hello(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        order, progress, fields = self._orders.orders[sandbox_id], self._progress(sandbox_id), message.fields
        if fields["version"] != LINK_VERSION:
            text = f"the guest speaks link version {_clean(str(fields['version']))}, this host {LINK_VERSION}"
            self._save(fail(progress, Reason("guest_unsupported", text, "use an image of this host's release")))
            return
        self._save(reach_stage(progress, "link_connected", self._now_ms()))
        if not fields["configured"]:
            await self._configure(order)
        agents = fields["agents"]
        for name, state in agents.items() if isinstance(agents, dict) else ():
            self._take_agent(sandbox_id, {**state, "name": name})
        offsets = {agent.name: self._orders.output_bytes(sandbox_id, agent.name) for agent in order.spec.agents}
        resume = {"agents": offsets, "artifact": _size(self._partial_artifact(sandbox_id))}
        await self._links.send(sandbox_id, LinkMessage("resume", resume))
        self._live[sandbox_id].has_hello = True

    async def _configure(self, order: Assignment) -> None:
        progress = reach_stage(self._progress(order.sandbox_id), "configured", self._now_ms())
        # On the disk before the guest hears of it: from here on no other domain is ever started for this sandbox.
        self._save(replace(progress, is_configured=True))
        await self._links.send(order.sandbox_id, LinkMessage("configure", self._configuration(order, progress)))

    def _configuration(self, order: Assignment, progress: Progress) -> dict[str, Any]:
        sources = [
            {
                "serial": f"source-{index}",
                "guest_path": source.guest_path,
                "readonly": source.readonly,
                "digest": source.digest,
            }
            for index, source in enumerate(order.spec.sources)
        ]
        return {
            "sandbox_id": order.sandbox_id,
            "hostname": order.spec.name,
            "address": self._describe_address(progress),
            "sources": sources,
            "agents": [_describe_agent(agent) for agent in order.spec.agents],
            "clock_ms": self._now_ms(),
        }

    def _describe_address(self, progress: Progress) -> dict[str, Any] | None:
        if not progress.address:
            return None
        mac = mac_address(IPv4Address(progress.address))
        return {"ip": progress.address, "prefix": self._prefix_length, "mac": mac}

    async def _on_agent(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        self._take_agent(sandbox_id, message.fields)

    def _take_agent(self, sandbox_id: SandboxId, fields: Any) -> None:
        progress = self._progress(sandbox_id)
        known = find_agent(progress, str(fields["name"]))
        state = str(fields.get("state", ""))
        if known is None or state not in (*_AGENT_PHASES, "exited"):
            return
        status = _agent_status(known, state, fields, self._now_ms())
        progress = reach_stage(progress, "agents_started", self._now_ms())
        if status.phase is not AgentPhase.RUNNING:
            finals = self._live[sandbox_id].final_bytes
            assert finals is not None
            finals[known.name] = min(int(fields.get("offset", 0)), OUTPUT_BYTES_MAX)
        self._save(change_agent(progress, status))

    async def _on_output(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        name, offset = str(message.fields["agent"]), int(message.fields["offset"])
        progress = self._progress(sandbox_id)
        known = find_agent(progress, name)
        if known is None or offset < 0:
            raise ValueError(f"agent {name[:40]!r} at {offset}")
        held = self._orders.output_bytes(sandbox_id, name)
        fresh = message.payload[held - offset :] if offset <= held < offset + len(message.payload) else b""
        fresh = fresh[: OUTPUT_BYTES_MAX - held]
        if fresh:
            with self._orders.output_path(sandbox_id, name).open("ab") as stream:
                stream.write(fresh)
            held += len(fresh)
            self._hold(replace(known, output_bytes=held), reach_stage(progress, "first_output", self._now_ms()))
        await self._links.send(sandbox_id, LinkMessage("ack", {"agent": name, "offset": held}))

    async def _on_truncated(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        progress = self._progress(sandbox_id)
        known = find_agent(progress, str(message.fields["agent"]))
        if known is not None:
            self._hold(replace(known, output_truncated=True), progress)

    async def _on_artifact(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        fields, path = message.fields, self._partial_artifact(sandbox_id)
        offset, size, changes = int(fields["offset"]), int(fields["size"]), int(fields["changes"])
        digest = Digest(str(fields["digest"]))
        if not is_digest(digest) or not 0 < size <= ARTIFACT_BYTES_MAX or not 0 <= changes <= ARTIFACT_CHANGES_MAX:
            raise ValueError("an artifact past its limits")
        held = _size(path)
        if offset <= held:
            with path.open("ab") as stream:
                stream.write(message.payload[held - offset :][: size - held])
            held = _size(path)
        await self._links.send(sandbox_id, LinkMessage("ack", {"artifact": True, "offset": held}))
        if held == size:
            self._store_artifact(sandbox_id, Artifact(digest, size, changes))

    def _store_artifact(self, sandbox_id: SandboxId, artifact: Artifact) -> None:
        path, progress = self._partial_artifact(sandbox_id), self._progress(sandbox_id)
        with path.open("rb") as stream:
            actual = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != artifact.digest:
            path.unlink()
            self._save(
                fail(progress, Reason("artifact_corrupt", "the artifact does not have the digest the guest told"))
            )
            return
        path.replace(self._orders.artifact_path(sandbox_id))
        progress = reach_stage(progress, "artifact_stored", self._now_ms())
        self._save(replace(progress, artifact=artifact))

    async def _on_failed(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        code = str(message.fields.get("code", ""))
        reason = Reason(
            code if _CODE.fullmatch(code) else "guest_failed", _clean(str(message.fields.get("message", "")))
        )
        self._save(fail(self._progress(sandbox_id), reason))

    def _has_all_output(self, progress: Progress, live: _Live) -> bool:
        finals = live.final_bytes or {}
        return all(
            agent.output_truncated or agent.output_bytes >= finals.get(agent.name, 0) for agent in progress.agents
        ) and set(finals) >= {agent.name for agent in progress.agents}

    def _progress(self, sandbox_id: SandboxId) -> Progress:
        return self._orders.progress[sandbox_id]

    def _save(self, progress: Progress) -> None:
        if self._orders.progress.get(progress.sandbox_id) != progress:
            self._orders.put_progress(progress)
            self._changed()

    def _hold(self, agent: AgentStatus, progress: Progress) -> None:
        """Takes over an agent's counters, also those of one that has ended while its last output was still on its way."""
        agents = tuple(agent if other.name == agent.name else other for other in progress.agents)
        is_new_stage = progress.stages != self._progress(progress.sandbox_id).stages
        self._orders.hold_progress(replace(progress, agents=agents))
        if is_new_stage:
            self._orders.put_progress(replace(progress, agents=agents))
        self._changed()

    def _partial_artifact(self, sandbox_id: SandboxId) -> Any:
        return self._orders.artifact_path(sandbox_id).with_name(".artifact.part")


def _agent_status(known: AgentStatus, state: str, fields: Any, now_ms: int) -> AgentStatus:
    started = replace(known, started_at_ms=known.started_at_ms or now_ms)
    if state == "running":
        return replace(started, phase=AgentPhase.RUNNING)
    exit_code, signal = _small_int(fields.get("exit_code")), _small_int(fields.get("signal"))
    ended = replace(started, exit_code=exit_code, signal=signal, ended_at_ms=now_ms)
    if state == "exited" and exit_code == 0:
        return replace(ended, phase=AgentPhase.COMPLETED)
    phase = _AGENT_PHASES.get(state, AgentPhase.FAILED)
    return replace(ended, phase=phase, reason=_agent_reason(phase, ended, str(fields.get("message") or "")))


def _agent_reason(phase: AgentPhase, status: AgentStatus, message: str) -> Reason:
    if phase is AgentPhase.TIMED_OUT:
        return Reason("agent_timed_out", f"agent {status.name} ran into its timeout", "raise timeout in the jcard")
    how = f"ended by signal {status.signal}" if status.signal else f"exited with code {status.exit_code}"
    text = f"agent {status.name} {how}" + (f": {_clean(message)}" if message else "")
    return Reason("agent_failed", text, f"read its output: mb logs NAME {status.name}")


def _describe_agent(agent: Agent) -> dict[str, Any]:
    return {
        "name": agent.name,
        "command": list(agent.command),
        "workdir": agent.workdir,
        "env": [[variable.name, variable.value] for variable in agent.env],
        "timeout_s": agent.timeout_s,
        "grace_period_s": agent.grace_period_s,
        "memory_mib": agent.memory_mib,
        "pids_max": agent.pids_max,
        "output_max_bytes": OUTPUT_BYTES_MAX,
    }


def _small_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= 255 else None


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:TEXT_CHARS_MAX])


def _size(path: Any) -> int:
    with suppress(FileNotFoundError):
        return int(path.stat().st_size)
    return 0
