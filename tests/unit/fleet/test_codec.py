"""Dataclasses and messages are one thing in two forms."""

import dataclasses
import inspect
import typing
from enum import StrEnum
from types import ModuleType

import pytest
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from bedplate.host.v1 import account_pb2, budget_pb2, cycle_pb2, enrolment_pb2, host_pb2, progress_pb2
from bedplate.sandbox.v1 import event_pb2, explain_pb2, sandbox_pb2, service_pb2
from fleet.codec import decode, encode, to_message
from fleet.errors import InvalidSpecError
from fleet.model import assignment, budget, cycle, enrolment, event, explanation, host, sandbox, usage
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import Agent, AgentPhase, AgentStatus, Goal, NetworkMode, Phase, SandboxSpec, SandboxStatus
from hostd.reconcile import progress

# What is stored or shown; the files of services have requests and answers beside it.
VOCABULARY = (sandbox_pb2, host_pb2, progress_pb2, budget_pb2, cycle_pb2)
MODULES = (*VOCABULARY, account_pb2, event_pb2, explain_pb2, service_pb2, enrolment_pb2)
MODELS = (assignment, budget, cycle, enrolment, event, explanation, host, sandbox, progress, usage)


def defined_in(module: ModuleType, base: type | None = None) -> list[type]:
    """The dataclasses, or the subclasses of `base`, that a module defines itself."""
    classes = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
    return [kind for kind in classes if (issubclass(kind, base) if base else dataclasses.is_dataclass(kind))]


KINDS = [kind for module in MODELS for kind in defined_in(module)]
# Words that no field is typed with travel as text: a reader of another version may not know them.
TYPED = {hint for kind in KINDS for hint in typing.get_type_hints(kind).values()}
ENUMS = [
    kind for module in MODELS for kind in defined_in(module, StrEnum) if any(kind.__name__ in str(one) for one in TYPED)
]


def message_fields(name: str) -> dict[str, FieldDescriptor]:
    kind = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    return dict(kind.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_dataclass_has_its_message(kind: type) -> None:
    """The names of the fields are the same, in the same number: nothing of a spec is lost on the wire."""
    fields = [field.name for field in dataclasses.fields(kind)]
    assert sorted(fields) == sorted(message_fields(kind.__name__))


@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_every_enum_has_its_members(kind: type[StrEnum]) -> None:
    """Each member has a number, and zero is nobody's: an absent value is never taken for one."""
    (descriptor,) = (found for module in MODULES if (found := module.DESCRIPTOR.enum_types_by_name.get(kind.__name__)))
    assert isinstance(descriptor, EnumDescriptor)
    numbers = {value.name.removeprefix(_prefix(kind.__name__)): value.number for value in descriptor.values}
    assert numbers.pop("UNSPECIFIED") == 0
    assert set(numbers) == set(kind.__members__)


def _prefix(name: str) -> str:
    return {"NetworkMode": "NETWORK_MODE_", "AgentPhase": "AGENT_PHASE_"}.get(name, name.upper() + "_")


def test_every_message_is_mapped() -> None:
    """No message of the three files stands without a dataclass."""
    messages = {name for module in VOCABULARY for name in module.DESCRIPTOR.message_types_by_name}
    assert messages <= {kind.__name__ for kind in KINDS}


def test_absent_is_not_zero() -> None:
    """An exit code of 0 and none at all stay apart."""
    for code in (0, None):
        status = AgentStatus("one", AgentPhase.COMPLETED, exit_code=code)
        assert decode(AgentStatus, encode(status)).exit_code == code


def test_the_same_value_has_the_same_bytes() -> None:
    """Equal values are equal in the store: a rewrite of what is there can be told from a change."""
    spec = SandboxSpec("box", agents=(Agent("one", "custom", ("true",)),))
    assert encode(spec) == encode(dataclasses.replace(spec))


def encoded_status(change: dict[str, int]) -> bytes:
    message: Message = to_message(SandboxStatus(SandboxId("a" * 12), HostId("host"), 1, Phase.RUNNING))
    for name, value in change.items():
        setattr(message, name, value)
    return message.SerializeToString()


@pytest.mark.parametrize("number", [0, 99, -1])
def test_an_unknown_value_names_its_field(number: int) -> None:
    """A value of a later version, or none, is refused by the field's name with those that are known."""
    with pytest.raises(InvalidSpecError) as caught:
        decode(SandboxStatus, encoded_status({"phase": number}))
    assert (caught.value.code, caught.value.field) == ("unknown_value", "phase")
    assert "running" in caught.value.next_step


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"\x0a\xff", b"\x0a\x02\xff\xfe", b"\x12\x7f", b"\x0b" * 5_000],
    ids=lambda text: text[:6].hex(),
)
def test_broken_bytes_are_refused(content: bytes) -> None:
    """Cut, mistyped, no UTF-8 or nested without end: it is InvalidSpecError, whatever it is."""
    with pytest.raises(InvalidSpecError):
        decode(SandboxSpec, content)


def test_an_absent_network_is_refused() -> None:
    """A spec on the wire that leaves its network out is no spec: there is no mode by omission."""
    message = to_message(SandboxSpec("box"))
    message.ClearField("network")
    with pytest.raises(InvalidSpecError) as caught:
        decode(SandboxSpec, message.SerializeToString())
    assert caught.value.field == "mode"
    assert NetworkMode.CLOSED in caught.value.next_step
    assert Goal.RUN not in caught.value.next_step
