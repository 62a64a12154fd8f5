"""No field of a spec is left unchecked: whatever is admitted, is within the limits of everything behind admission."""

import dataclasses
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from fleet.codec import decode, encode
from fleet.model.admission import (
    AGENTS_MAX,
    CONFIGURATION_BYTES_MAX,
    HARNESSES,
    MEMORY_MIB_MAX,
    PIDS_MAX,
    RESTARTS_MAX,
    SECRETS_MAX,
    SOURCE_BYTES_MAX,
    SOURCES_MAX,
    refusals,
)
from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import (
    Agent,
    EnvVar,
    Goal,
    ImageRef,
    Label,
    Network,
    NetworkMode,
    Resources,
    Restart,
    SandboxSpec,
    Source,
)
from hostd.drivers.guest.frames import encode_frame
from hostd.drivers.ports import LinkMessage
from hostd.reconcile.words import describe_configuration

A = SandboxId("a" * 12)
DIGEST = Digest("sha256:" + "0" * 64)
# Wild values, and ones that pass: a spec of wild values alone would never be admitted.
TEXTS = st.one_of(st.sampled_from(["/workspace", "a", "x" * 63, "custom", "base:latest"]), st.text(max_size=70))
NUMBERS = st.one_of(st.integers(0, 2**31), st.sampled_from([1, 512, 4096]))
SECONDS = st.one_of(st.floats(), st.sampled_from([0.0, 30.0]))


def some(strategy: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, max_size=most).map(tuple)


AGENTS = st.builds(
    Agent,
    name=st.one_of(st.sampled_from(["one", "two", "x" * 63]), TEXTS),
    harness=st.one_of(st.sampled_from(HARNESSES), TEXTS),
    command=some(TEXTS),
    prompt=st.one_of(st.just(""), TEXTS),
    workdir=TEXTS,
    env=some(st.builds(EnvVar, TEXTS, TEXTS)),
    restart=st.sampled_from(Restart),
    max_restarts=st.sampled_from([0, 0, 3]),
    timeout_s=SECONDS,
    grace_period_s=SECONDS,
    memory_mib=NUMBERS,
    pids_max=NUMBERS,
    session=st.one_of(st.sampled_from(["", "", "main"]), TEXTS),
)
SPECS = st.builds(
    SandboxSpec,
    name=TEXTS,
    image=st.builds(ImageRef, TEXTS, st.sampled_from([Digest(""), DIGEST, Digest("x")])),
    resources=st.builds(Resources, NUMBERS, NUMBERS, NUMBERS, st.sampled_from([0, 0, 1])),
    network=st.builds(Network, st.sampled_from(NetworkMode), some(TEXTS, 1)),
    sources=some(st.builds(Source, st.sampled_from([DIGEST, Digest("")]), NUMBERS, TEXTS, st.booleans())),
    agents=some(AGENTS),
    require_labels=some(st.builds(Label, TEXTS, TEXTS)),
    secrets=some(st.one_of(st.sampled_from(["TOKEN", "KEY"]), TEXTS)),
)
LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)


@given(spec=SPECS)
def test_any_spec_gets_an_answer(spec: SandboxSpec) -> None:
    """Hostile fields are refused with field, message and next step; nothing raises."""
    for refusal in refusals(spec):
        assert refusal.field.split(".")[0].split("[")[0] in {field.name for field in dataclasses.fields(SandboxSpec)}
        assert refusal.message
        assert refusal.next_step


@given(
    command=st.lists(LETTERS, min_size=1, max_size=20),
    values=st.lists(LETTERS, max_size=20),
    agents=st.integers(1, AGENTS_MAX),
    sources=st.integers(0, SOURCES_MAX),
    path=st.text("abc", min_size=1, max_size=900),
)
def test_what_is_admitted_can_be_ordered(
    command: list[str], values: list[str], agents: int, sources: int, path: str
) -> None:
    """An admitted spec survives the wire, and its configuration fits into one frame of the guest link."""
    env = tuple(EnvVar(f"V{index}", value) for index, value in enumerate(values))
    spec = SandboxSpec(
        "x" * 63,
        sources=tuple(Source(DIGEST, 1, f"/{index}{path}") for index in range(sources)),
        agents=tuple(Agent(f"a{index}", "custom", tuple(command), env=env) for index in range(agents)),
    )
    assume(not refusals(spec))
    assert_is_orderable(spec)


def test_the_largest_configuration_fits() -> None:
    """With the most agents and sources, the longest numbers and no byte to spare, the frame still holds."""
    agents = tuple(
        Agent(
            f"a{index:02d}" + "x" * 60,
            "custom",
            ("x",),
            workdir="/workspace",
            restart=Restart.ON_FAILURE,
            max_restarts=RESTARTS_MAX,
            timeout_s=1.2345678901234567e-05,
            grace_period_s=100 / 7,
            memory_mib=MEMORY_MIB_MAX,
            pids_max=PIDS_MAX,
            session=f"s{index:02d}" + "x" * 60,
        )
        for index in range(AGENTS_MAX)
    )
    sources = tuple(Source(DIGEST, SOURCE_BYTES_MAX, f"/s{index}") for index in range(SOURCES_MAX))
    secrets = tuple(f"S{index:02d}" + "X" * 60 for index in range(SECRETS_MAX))
    resources = Resources(memory_mib=MEMORY_MIB_MAX)
    spec = SandboxSpec("x" * 63, resources=resources, sources=sources, agents=agents, secrets=secrets)
    assert not refusals(spec)
    fill = CONFIGURATION_BYTES_MAX
    while refusals(spec):
        fill -= 1
        spec = with_argument(spec, "x" * fill)
    for filled in range(CONFIGURATION_BYTES_MAX, 0, -1):
        wider = with_argument(spec, "x" * filled)
        if not refusals(wider):
            assert_is_orderable(wider)
            return
    raise AssertionError("no argument at all is admitted")


def with_argument(spec: SandboxSpec, argument: str) -> SandboxSpec:
    first = dataclasses.replace(spec.agents[0], command=("x", argument))
    return dataclasses.replace(spec, agents=(first, *spec.agents[1:]))


def assert_is_orderable(spec: SandboxSpec) -> None:
    order = Assignment(A, Tenant("acme"), HostId("host"), spec, DIGEST, 64, Goal.RUN, 1, 1, 1)
    assert decode(Assignment, encode(order)) == order
    fields = describe_configuration(order, "10.177.255.254", 16, 1_800_000_000_000)
    described = {"run": 2**32 - 1, "secrets": list(spec.secrets), **fields}
    described["agents"] = [
        {"restart": agent.restart, "max_restarts": agent.max_restarts, "session": agent.session, **written}
        for agent, written in zip(spec.agents, fields["agents"], strict=True)
    ]
    assert encode_frame(LinkMessage("configure", described))
