"""What leaves a sandbox: the record of it. PURE."""

from dataclasses import dataclass
from enum import StrEnum

from fleet.model.ids import SandboxId, Tenant


class NetworkEventKind(StrEnum):
    """What was seen: a question for a name, a connection, a request in one, dropped frames, a change, a secret's use."""

    DNS = "dns"
    CONNECTION = "connection"
    REQUEST = "request"
    FRAMES = "frames"
    POLICY = "policy"
    CREDENTIAL = "credential"


@dataclass(frozen=True, slots=True)
class NetworkEvent:
    """One thing that left a sandbox or was denied (proto/bedplate/sandbox/v1/network.proto); `count` says how many alike."""

    sandbox_id: SandboxId
    tenant: Tenant
    seq: int
    at_ms: int
    kind: str
    is_denied: bool = False
    protocol: str = ""
    name: str = ""
    address: str = ""
    port: int = 0
    method: str = ""
    path: str = ""
    status: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    duration_ms: int = 0
    rule: str = ""
    reason: str = ""
    credential: str = ""
    count: int = 1
