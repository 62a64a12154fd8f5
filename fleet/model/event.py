"""Events: what happened to a sandbox, by whom and why, with the state before and after."""

from dataclasses import dataclass

from fleet.model.ids import SandboxId, Tenant


@dataclass(frozen=True, slots=True)
class Event:
    """One transition; `origin` recorded it as its `seq`-th, `actor` brought it about (proto/bedplate/sandbox/v1/event.proto)."""

    sandbox_id: SandboxId
    tenant: Tenant
    origin: str
    seq: int
    at_ms: int
    actor: str
    kind: str
    cause: str = ""
    before: str = ""
    after: str = ""
    agent: str = ""
    detail: str = ""
    generation: int = 0
    run: int = 1
