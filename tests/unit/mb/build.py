"""Artifacts and sandboxes for tests, made as guests and schedulers make them."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fleet.model.assignment import Refusal, RefusalReason, Sandbox
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import (
    Agent,
    AgentPhase,
    AgentStatus,
    Artifact,
    Goal,
    Phase,
    Reason,
    SandboxSpec,
    SandboxStatus,
    Source,
    Stage,
)
from mb.artifact import Change, read_artifact, read_tree

NOW_MS = 1_700_000_000_000
SANDBOX_ID = SandboxId("abcdefghij23")
DIGEST = Digest("sha256:" + "ab" * 32)


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar: text, a symlink's target, or a folder when both are None."""

    name: str
    text: str | None = None
    link: str | None = None
    mode: int = 0o644


def tar_of(members: Iterable[Member]) -> bytes:
    """A pax tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            entry = tarfile.TarInfo(member.name)
            entry.mode = member.mode
            content = (member.text or "").encode()
            if member.link is not None:
                entry.type, entry.linkname = tarfile.SYMTYPE, member.link
            elif member.text is None:
                entry.type = tarfile.DIRTYPE
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def artifact_of(changes: list[dict[str, Any]], members: Iterable[Member], **listing: Any) -> bytes:
    """An artifact of one source at /workspace."""
    about = {"version": 1, "sources": [{"guest_path": "/workspace", "changes": changes}]} | listing
    return tar_of([Member("changes.json", json.dumps(about)), *members])


def changes_of(source: bytes, artifact: bytes) -> list[Change]:
    """The changes of an artifact of one source, as mb reads them."""
    tree = read_tree(io.BytesIO(source), len(source))
    return read_artifact(io.BytesIO(artifact), len(artifact), ["/workspace"], [tree])[0]


def sandbox(**changes: Any) -> Sandbox:
    """A sandbox that completed, or differently with `changes`."""
    agent = AgentStatus("fixer", AgentPhase.COMPLETED, 0, None, 2048, False, NOW_MS + 7000, NOW_MS + 9000)
    names = ("image_verified", "disks_ready", "network_ready", "domain_started", "link_connected", "configured")
    stages = tuple(Stage(name, NOW_MS + 1000 * (index + 1)) for index, name in enumerate(names))
    status = SandboxStatus(
        sandbox_id=SANDBOX_ID,
        host_id=HostId("rack1-07"),
        generation=1,
        phase=Phase.COMPLETED,
        agents=(agent,),
        stages=stages,
        artifact=Artifact(DIGEST, 4096, 3),
        accelerator="tcg",
        address="10.77.0.2",
        released=True,
    )
    fields: Mapping[str, Any] = {
        "sandbox_id": SANDBOX_ID,
        "tenant": Tenant("lab"),
        "spec": SandboxSpec("fix-tests", sources=(Source(DIGEST, 12_288, "/workspace"),), agents=(_AGENT,)),
        "goal": Goal.RUN,
        "generation": 1,
        "created_at_ms": NOW_MS,
        "phase": Phase.COMPLETED,
        "host_id": HostId("rack1-07"),
        "image_digest": DIGEST,
        "status": status,
        "assigned_at_ms": NOW_MS + 200,
    }
    return Sandbox(**{**fields, **changes})


def pending() -> Sandbox:
    """A sandbox that no host takes."""
    reasons = (
        RefusalReason("memory", 2, "4592 MiB are asked for and the most that one of them has free is 1024 MiB"),
        RefusalReason("vcpus", 1, "2 vCPUs are asked for and 1 is free"),
    )
    refusal = Refusal(SANDBOX_ID, 3, reasons, NOW_MS)
    nowhere: dict[str, Any] = {"host_id": HostId(""), "image_digest": Digest(""), "status": None, "assigned_at_ms": 0}
    return sandbox(phase=Phase.PENDING, refusal=refusal, **nowhere)


def failed(reason: Reason) -> Sandbox:
    """A sandbox whose agent failed for `reason`."""
    agent = AgentStatus("fixer", AgentPhase.FAILED, 1, None, 10, True, NOW_MS, NOW_MS + 1, reason)
    status = SandboxStatus(SANDBOX_ID, HostId("rack1-07"), 1, Phase.FAILED, reason, (agent,))
    return sandbox(phase=Phase.FAILED, status=status)


_AGENT = Agent("fixer", "custom", ("python3", "agent.py"))
