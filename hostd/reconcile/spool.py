"""Takes what guests send in bulk, output and artifact, to this host's disk. What it refuses it refuses with ValueError or KeyError.

Output is not fsynced: it is acknowledged once the page cache has it, which a crash of hostd survives; a crash of the host ends the
VM too. An artifact is fsynced, and kept only if it has its digest.
"""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleet.model.ids import SandboxId
from fleet.model.sandbox import Artifact, Reason, StageName
from hostd.drivers.ports import LinkMessage
from hostd.files import disk_faults, sync_folder
from hostd.moments import note_moment
from hostd.reconcile.book import Book
from hostd.reconcile.progress import fail, have_agents_ended, reach_stage
from hostd.reconcile.words import parse_artifact, parse_whole

ARTIFACT_CORRUPT = Reason(
    "artifact_corrupt",
    "the artifact does not have the digest the guest told",
    "its output is there: mb logs NAME; submit it again",
)

Send = Callable[[SandboxId, LinkMessage], Awaitable[None]]


@dataclass(slots=True)
class _Told:
    """What a guest has announced in this session: final output lengths, and what the artifact's bytes will amount to."""

    final_bytes: dict[str, int] = field(default_factory=dict)
    artifact: Artifact | None = None


@dataclass(slots=True)
class _Growth:
    """When more came last, in the clock's seconds, and the most that the artifact has had: what is sent again is no progress."""

    at_s: float
    artifact_bytes: int = 0


class Spool:
    """The files of all sandboxes that grow."""

    def __init__(self, book: Book, send: Send, clock: Callable[[], float]) -> None:
        self._book = book
        self._send = send
        self._clock = clock
        self._told: dict[SandboxId, _Told] = {}
        self._growth: dict[SandboxId, _Growth] = {}

    def begin(self, sandbox_id: SandboxId) -> None:
        """A session begins: what was announced in another counts no more."""
        self._told[sandbox_id] = _Told()
        self._growth.setdefault(sandbox_id, _Growth(self._clock()))

    def forget(self, sandbox_id: SandboxId) -> None:
        """Nothing more is taken from this guest."""
        self._told.pop(sandbox_id, None)
        self._growth.pop(sandbox_id, None)

    def stalled_s(self, sandbox_id: SandboxId) -> float:
        """Seconds since more of output or artifact came, or since `touch`."""
        return self._clock() - self._growth[sandbox_id].at_s

    def touch(self, sandbox_id: SandboxId) -> None:
        """From now on more is to come."""
        self._growth[sandbox_id].at_s = self._clock()

    def has_begun_artifact(self, sandbox_id: SandboxId) -> bool:
        """Whether anything of the artifact came since hostd listens."""
        return self._growth[sandbox_id].artifact_bytes > 0

    def describe_resume(self, sandbox_id: SandboxId) -> dict[str, Any]:
        """The fields of `resume`: from where output and artifact are to go on."""
        agents = self._book.progress(sandbox_id).agents
        offsets = {agent.name: self._book.orders.output_bytes(sandbox_id, agent.name) for agent in agents}
        return {"agents": offsets, "artifact": _reopen(self._partial_artifact(sandbox_id))}

    def expect(self, sandbox_id: SandboxId, agent: str, final_bytes: int) -> None:
        """An agent has ended: it is done with once the host holds so much of its output."""
        self._told[sandbox_id].final_bytes[agent] = min(final_bytes, self._book.orders.output_room(sandbox_id, agent))

    def has_all_output(self, sandbox_id: SandboxId) -> bool:
        """Whether every agent's final length is known in this session, and held."""
        finals, agents = self._told[sandbox_id].final_bytes, self._book.progress(sandbox_id).agents
        has_all = all(agent.output_truncated or agent.output_bytes >= finals.get(agent.name, 0) for agent in agents)
        return has_all and set(finals) >= {agent.name for agent in agents}

    async def take_output(self, sandbox_id: SandboxId, fields: Mapping[str, Any], payload: bytes) -> None:
        """Appends what is new of an `output` frame, and acknowledges what is held."""
        known, offset = self._book.known_agent(sandbox_id, fields["agent"]), parse_whole(fields, "offset")
        orders = self._book.orders
        held, room = orders.output_bytes(sandbox_id, known.name), orders.output_room(sandbox_id, known.name)
        if held < offset and held < room:
            raise ValueError(f"output at {offset} does not follow the {held} bytes held")
        fresh = payload[held - offset :][: max(0, room - held)]
        if fresh:
            path = orders.output_path(sandbox_id, known.name)
            with path.open("ab") as stream:
                note_moment(path, stream.tell(), self._book.now_ms())
                stream.write(fresh)
            held += len(fresh)
            self.touch(sandbox_id)
            progress = reach_stage(self._book.progress(sandbox_id), StageName.FIRST_OUTPUT, self._book.now_ms())
            self._book.hold(replace(known, output_bytes=held), progress)
        await self._send(sandbox_id, LinkMessage("ack", {"agent": known.name, "offset": held}))

    def take_truncated(self, sandbox_id: SandboxId, fields: Mapping[str, Any]) -> None:
        """Notes that an agent printed more than its limit."""
        known = self._book.known_agent(sandbox_id, fields["agent"])
        if not known.output_truncated:
            self._book.hold(replace(known, output_truncated=True), self._book.progress(sandbox_id))
            # The guest says it once: a restart must still know it.
            self._book.orders.put_progress(self._book.progress(sandbox_id))

    async def take_artifact(self, sandbox_id: SandboxId, fields: Mapping[str, Any], payload: bytes) -> None:
        """Appends what is new of an `artifact` frame, acknowledges it, and with the last byte stores the whole."""
        told, path = self._told[sandbox_id], self._partial_artifact(sandbox_id)
        offset, artifact, held = parse_whole(fields, "offset"), parse_artifact(fields), _size(path)
        if not have_agents_ended(self._book.progress(sandbox_id)):
            raise ValueError("an artifact before its agents have ended")
        if told.artifact not in (None, artifact) or held > artifact.size_bytes:
            raise ValueError("the artifact is not the one that was begun")
        if offset > held:
            raise ValueError(f"an artifact's chunk at {offset} does not follow the {held} bytes held")
        told.artifact = artifact
        with path.open("ab") as stream:
            stream.write(payload[held - offset :][: artifact.size_bytes - held])
        held = _size(path)
        growth = self._growth[sandbox_id]
        if held > growth.artifact_bytes:
            growth.artifact_bytes = held
            self.touch(sandbox_id)
        await self._send(sandbox_id, LinkMessage("ack", {"artifact": True, "offset": held}))
        if held == artifact.size_bytes:
            await self._store_artifact(sandbox_id, artifact)

    async def _store_artifact(self, sandbox_id: SandboxId, artifact: Artifact) -> None:
        path = self._partial_artifact(sandbox_id)
        actual = await asyncio.to_thread(_seal, path)
        if self._book.open_order(sandbox_id) is None:
            return
        progress = self._book.progress(sandbox_id)
        if actual != artifact.digest:
            path.unlink()
            self._book.save(fail(progress, ARTIFACT_CORRUPT))
            return
        path.replace(self._book.orders.artifact_path(sandbox_id))
        sync_folder(path.parent)
        progress = reach_stage(progress, StageName.ARTIFACT_STORED, self._book.now_ms())
        self._book.save(replace(progress, artifact=artifact))

    def _partial_artifact(self, sandbox_id: SandboxId) -> Path:
        return self._book.orders.partial_artifact_path(sandbox_id)


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
