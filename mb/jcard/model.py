"""What a jcard says once it is read, and the error that carries everything wrong in one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import InvalidSpecError
from fleet.model.admission import FieldRefusal
from fleet.model.sandbox import SandboxSpec
from fleet.model.secret import SecretValue


@dataclass(frozen=True, slots=True)
class Shared:
    """One `[[shared]]` table: a folder here that becomes a source at a path in the guest; `field` is how it is written."""

    host: Path
    guest: str
    readonly: bool
    field: str


@dataclass(frozen=True, slots=True)
class Jcard:
    """A jcard as read: its spec, in which the sources are still to come, and all that was noticed on the way.

    `agent_fields` holds how the user wrote each agent's table: `agent`, or `[[agents]][0]` and so on; replicas share one.
    `secrets` are the values of the spec's names.
    """

    spec: SandboxSpec
    shared: tuple[Shared, ...]
    agent_fields: tuple[str, ...]
    secrets: Mapping[str, SecretValue]
    notes: tuple[str, ...]
    faults: tuple[FieldRefusal, ...]


class JcardError(InvalidSpecError):
    """A jcard that becomes no spec; `faults` are all of its faults, in its own field names."""

    def __init__(self, path: Path, faults: Sequence[FieldRefusal]) -> None:
        first = faults[0]
        text = f"{path}: {first.field}: {first.message}" if first.field else f"{path}: {first.message}"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        super().__init__("jcard_invalid", text + more, first.next_step)
        self.path = path
        self.field = first.field
        self.faults = tuple(faults)
