"""Every field of a spec is enforced or refused, at its exact limits, by name."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.model.admission import (
    AGENTS_MAX,
    CONFIGURATION_BYTES_MAX,
    DISK_MIB_MAX,
    DISK_MIB_MIN,
    ENV_MAX,
    GPU_MILLI_MAX,
    GPUS_MAX,
    GRACE_PERIOD_S_MAX,
    GROUP_SIZE_MAX,
    HARNESSES,
    LABELS_MAX,
    MEMORY_MIB_MAX,
    MEMORY_MIB_MIN,
    PATH_CHARS_MAX,
    PIDS_MAX,
    PIDS_MIN,
    PRIORITY_MAX,
    PRIORITY_MIN,
    PROMPT_BYTES_MAX,
    RESTARTS_MAX,
    SECRETS_MAX,
    SOURCE_BYTES_MAX,
    SOURCES_MAX,
    TIMEOUT_S_MAX,
    VCPUS_MAX,
    refusals,
)
from fleet.model.ids import Digest
from fleet.model.sandbox import (
    Affinity,
    Agent,
    EnvVar,
    Forward,
    ImageRef,
    Label,
    Network,
    NetworkMode,
    Placement,
    Resources,
    Restart,
    SandboxSpec,
    Source,
)

DIGEST = Digest("sha256:" + "0" * 64)
AGENT = Agent("one", "custom", ("make", "test"), memory_mib=64)
SOURCE = Source(DIGEST, 1, "/workspace")
SPEC = SandboxSpec("box", agents=(AGENT,), sources=(SOURCE,))
NAN, INFINITE = float("nan"), float("inf")


def spec_with(**changes: Any) -> SandboxSpec:
    return replace(SPEC, **changes)


def placed(**changes: Any) -> SandboxSpec:
    return spec_with(placement=replace(Placement(), **changes))


def resources(**changes: Any) -> SandboxSpec:
    return spec_with(resources=replace(Resources(), **changes))


def agent(**changes: Any) -> SandboxSpec:
    return spec_with(agents=(replace(AGENT, **changes),))


def source(**changes: Any) -> SandboxSpec:
    return spec_with(sources=(replace(SOURCE, **changes),))


def label(name: str, value: str = "") -> SandboxSpec:
    return spec_with(require_labels=(Label(name, value),))


def env(*pairs: tuple[str, str]) -> SandboxSpec:
    return agent(env=tuple(EnvVar(name, value) for name, value in pairs))


def found(spec: SandboxSpec) -> list[tuple[str, str]]:
    return [(refusal.field, refusal.code) for refusal in refusals(spec)]


ADMITTED = {
    "plain": SPEC,
    "no sources": spec_with(sources=()),
    "pinned": spec_with(image=ImageRef("base:v1.2", DIGEST)),
    "network none": spec_with(network=Network(NetworkMode.NONE)),
    "smallest": resources(vcpus=1, memory_mib=MEMORY_MIB_MIN, disk_mib=DISK_MIB_MIN),
    "largest": resources(vcpus=VCPUS_MAX, memory_mib=MEMORY_MIB_MAX, disk_mib=DISK_MIB_MAX),
    "largest source": source(size_bytes=SOURCE_BYTES_MAX),
    "read-only source": source(readonly=True),
    "deep path": source(guest_path="/" + "a" * (PATH_CHARS_MAX - 1)),
    "beside": spec_with(sources=(SOURCE, replace(SOURCE, guest_path="/workspace2"))),
    "below home": source(guest_path="/home/agent/src"),
    "many agents": spec_with(agents=tuple(replace(AGENT, name=f"a{index}") for index in range(AGENTS_MAX))),
    "many sources": spec_with(sources=tuple(replace(SOURCE, guest_path=f"/w{index}") for index in range(SOURCES_MAX))),
    "many labels": spec_with(require_labels=tuple(Label(f"l{index}", "x") for index in range(LABELS_MAX))),
    "label without value": label("zone"),
    "many variables": env(*((f"V{index}", "x") for index in range(ENV_MAX))),
    "empty argument": agent(command=("make", "")),
    "longest timeout": agent(timeout_s=TIMEOUT_S_MAX, grace_period_s=GRACE_PERIOD_S_MAX),
    "no grace": agent(timeout_s=0.0, grace_period_s=0.0),
    "fewest pids": agent(pids_max=PIDS_MIN, memory_mib=16),
    "most pids": agent(pids_max=PIDS_MAX),
    "all of the memory": agent(memory_mib=4096),
    "more in sum than there is": spec_with(agents=tuple(replace(AGENT, name=n, memory_mib=4096) for n in "ab")),
    "largest agent": spec_with(
        resources=Resources(memory_mib=MEMORY_MIB_MAX), agents=(replace(AGENT, memory_mib=MEMORY_MIB_MAX),)
    ),
    **{f"harness {name}": agent(harness=name) for name in HARNESSES},
    "prompt": agent(harness="codex", prompt="x" * PROMPT_BYTES_MAX),
    "restart": agent(restart=Restart.ON_FAILURE, max_restarts=RESTARTS_MAX),
    "restart without end": agent(restart=Restart.ALWAYS),
    "session": agent(session="Main_1-" + "x" * 56),
    "sessions": spec_with(agents=(replace(AGENT, session="a"), replace(AGENT, name="two", session="b"))),
    "secrets": spec_with(secrets=tuple(f"S{index}" for index in range(SECRETS_MAX))),
    "longest secret": spec_with(secrets=("_" * 64,)),
    "a secret and its own variable": replace(env(("TOKEN", "x")), secrets=("TOKEN",)),
}


@pytest.mark.parametrize("spec", ADMITTED.values(), ids=ADMITTED.keys())
def test_what_is_admitted(spec: SandboxSpec) -> None:
    """At a limit is within it."""
    assert found(spec) == []


INVALID = [
    ("name", spec_with(name="Box")),
    ("name", spec_with(name="x" * 64)),
    ("image.name", spec_with(image=ImageRef("base"))),
    ("image.name", spec_with(image=ImageRef("../base:latest"))),
    ("image.name", spec_with(image=ImageRef("base:latest\n"))),
    ("image.digest", spec_with(image=ImageRef("base:latest", Digest("sha256:0")))),
    ("resources.vcpus", resources(vcpus=0)),
    ("resources.vcpus", resources(vcpus=VCPUS_MAX + 1)),
    ("resources.memory_mib", resources(memory_mib=MEMORY_MIB_MIN - 1)),
    ("resources.memory_mib", resources(memory_mib=MEMORY_MIB_MAX + 1)),
    ("resources.disk_mib", resources(disk_mib=DISK_MIB_MIN - 1)),
    ("resources.disk_mib", resources(disk_mib=DISK_MIB_MAX + 1)),
    ("sources", spec_with(sources=tuple(replace(SOURCE, guest_path=f"/w{i}") for i in range(SOURCES_MAX + 1)))),
    ("sources", spec_with(sources=(SOURCE, SOURCE))),
    ("sources", spec_with(sources=(SOURCE, replace(SOURCE, guest_path="/workspace/deep")))),
    ("sources", spec_with(sources=(replace(SOURCE, guest_path="/workspace/deep"), SOURCE))),
    ("sources[0].digest", source(digest="")),
    ("sources[0].size_bytes", source(size_bytes=0)),
    ("sources[0].size_bytes", source(size_bytes=SOURCE_BYTES_MAX + 1)),
    ("agents", spec_with(agents=())),
    ("agents", spec_with(agents=tuple(replace(AGENT, name=f"a{index}") for index in range(AGENTS_MAX + 1)))),
    ("agents", spec_with(agents=(AGENT, AGENT))),
    ("agents[0].name", agent(name="../x")),
    ("agents[0].command", agent(command=())),
    ("agents[0].command", agent(command=("", "x"))),
    ("agents[0].command", agent(command=("make", "a\0b"))),
    ("agents[0].command", agent(command=("make", "\udcff"))),
    ("agents[0].prompt", agent(prompt="do it")),
    ("agents[0].prompt", agent(harness="codex", prompt="x" * (PROMPT_BYTES_MAX + 1))),
    ("agents[0].prompt", agent(harness="codex", prompt="a\0b")),
    ("agents[0].harness", agent(harness="mine")),
    ("agents[0].harness", agent(harness="")),
    ("agents[0].max_restarts", agent(max_restarts=1)),
    ("agents[0].max_restarts", agent(restart=Restart.ALWAYS, max_restarts=-1)),
    ("agents[0].max_restarts", agent(restart=Restart.ALWAYS, max_restarts=RESTARTS_MAX + 1)),
    ("agents[0].session", agent(session="a.b")),
    ("agents[0].session", agent(session="a:b")),
    ("agents[0].session", agent(session="-a")),
    ("agents[0].session", agent(session="a b")),
    ("agents[0].session", agent(session="a\n")),
    ("agents[0].session", agent(session="x" * 64)),
    ("agents", spec_with(agents=(replace(AGENT, session="a"), replace(AGENT, name="two", session="a")))),
    ("secrets", spec_with(secrets=tuple(f"S{index}" for index in range(SECRETS_MAX + 1)))),
    ("secrets", spec_with(secrets=("A", "A"))),
    ("secrets[1]", spec_with(secrets=("A", "1A"))),
    ("secrets[0]", spec_with(secrets=("token",))),
    ("secrets[0]", spec_with(secrets=("../A",))),
    ("secrets[0]", spec_with(secrets=("A\n",))),
    ("secrets[0]", spec_with(secrets=("",))),
    ("secrets[0]", spec_with(secrets=("A" * 65,))),
    ("agents[0].env[1]", replace(env(("A", ""), ("TOKEN_FILE", "x")), secrets=("TOKEN",))),
    ("agents[0].memory_mib", agent(memory_mib=4097)),
    ("agents[0].memory_mib", agent(memory_mib=MEMORY_MIB_MAX + 1)),
    ("agents[0].workdir", agent(workdir="workspace")),
    ("agents[0].workdir", agent(workdir="/a\0")),
    ("agents[0].workdir", agent(workdir="/" * (PATH_CHARS_MAX + 1))),
    ("agents[0].timeout_s", agent(timeout_s=-1.0)),
    ("agents[0].timeout_s", agent(timeout_s=TIMEOUT_S_MAX + 1)),
    ("agents[0].timeout_s", agent(timeout_s=NAN)),
    ("agents[0].timeout_s", agent(timeout_s=INFINITE)),
    ("agents[0].grace_period_s", agent(grace_period_s=-0.1)),
    ("agents[0].grace_period_s", agent(grace_period_s=GRACE_PERIOD_S_MAX + 1)),
    ("agents[0].memory_mib", agent(memory_mib=15)),
    ("agents[0].pids_max", agent(pids_max=PIDS_MIN - 1)),
    ("agents[0].pids_max", agent(pids_max=PIDS_MAX + 1)),
    ("agents[0].env", env(*((f"V{index}", "x") for index in range(ENV_MAX + 1)))),
    ("agents[0].env[1]", env(("GOOD", "x"), ("1BAD", "x"))),
    ("agents[0].env[0]", env(("A=B", "x"))),
    ("agents[0].env", env(("TWICE", "x"), ("TWICE", "y"))),
    ("agents[0].env[0]", env(("A", "a\0b"))),
    ("agents[0].env[0]", env(("A", "\udcff"))),
    ("agents", agent(command=("make", "x" * CONFIGURATION_BYTES_MAX))),
    # Empty texts take room on the link, too.
    ("agents", agent(command=("make", *[""] * CONFIGURATION_BYTES_MAX))),
    ("agents", agent(command=("make", "\x01" * (CONFIGURATION_BYTES_MAX // 6)))),
    ("require_labels", spec_with(require_labels=tuple(Label(f"l{index}", "") for index in range(LABELS_MAX + 1)))),
    ("resources.gpus", resources(gpus=GPUS_MAX + 1)),
    ("resources.gpus", resources(gpus=-1)),
    ("resources.gpu_milli", resources(gpus=1, gpu_milli=GPU_MILLI_MAX + 1)),
    ("resources.gpu_milli", resources(gpu_milli=500)),
    ("resources.gpu_models", resources(gpu_models=("A100",))),
    ("resources.gpu_models", resources(gpus=1, gpu_models=("A100",) * (LABELS_MAX + 1))),
    ("resources.gpu_models[0]", resources(gpus=1, gpu_models=("a b",))),
    ("resources.gpu_memory_mib", resources(gpu_memory_mib=1)),
    ("resources.gpu_memory_mib", resources(gpus=1, gpu_memory_mib=-1)),
    ("placement.priority", placed(priority=PRIORITY_MAX + 1)),
    ("placement.priority", placed(priority=PRIORITY_MIN - 1)),
    ("placement.tolerations", placed(tolerations=(Label("a", ""),) * (LABELS_MAX + 1))),
    ("placement.tolerations[0]", placed(tolerations=(Label("a b", ""),))),
    ("placement.prefer_labels", placed(prefer_labels=(Label("a", ""),) * (LABELS_MAX + 1))),
    ("placement.prefer_labels[0]", placed(prefer_labels=(Label("zone", "a\nb"),))),
    ("placement.parent_affinity", placed(parent_affinity=Affinity.NEAR)),
    ("placement.group", placed(group="A b", group_size=2)),
    ("placement.group_size", placed(group="a", group_size=1)),
    ("placement.group_size", placed(group="a", group_size=GROUP_SIZE_MAX + 1)),
    ("placement.group_size", placed(group_size=2)),
    ("require_labels[0]", label("")),
    ("require_labels[0]", label("a b")),
    ("require_labels[0]", label("zone", "a\nb")),
]


@pytest.mark.parametrize(("field", "spec"), INVALID, ids=[f"{i}-{field}" for i, (field, _) in enumerate(INVALID)])
def test_what_is_invalid(field: str, spec: SandboxSpec) -> None:
    """One step past a limit is refused, by that field and no other, with a next step."""
    assert found(spec) == [(field, "field_invalid")]
    assert all(refusal.next_step for refusal in refusals(spec))


UNBUILT = [
    ("network.mode", spec_with(network=Network(NetworkMode.ALLOW))),
    ("network.mode", spec_with(network=Network(NetworkMode.BRIDGED))),
    ("network.egress_allow", spec_with(network=Network(egress_allow=("example.com",)))),
    ("network.forwards", spec_with(network=Network(forwards=(Forward(80, 80),)))),
]


@pytest.mark.parametrize(("field", "spec"), UNBUILT, ids=[f"{i}-{field}" for i, (field, _) in enumerate(UNBUILT)])
def test_what_no_host_can_enforce(field: str, spec: SandboxSpec) -> None:
    """What is not built yet is refused as such, never ignored."""
    assert found(spec) == [(field, "not_enforceable")]
    assert all(refusal.next_step for refusal in refusals(spec))


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "workspace",
            "//workspace",
            "/workspace/",
            "/a/../etc",
            "/a/./b",
            "/a\0",
            "/a\nb",
            "/" + "a" * PATH_CHARS_MAX,
        ),
        *("/", "/etc", "/etc/x", "/boot", "/proc/self", "/nix", "/nix/store", "/usr/local", "/lib/x", "/var/lib/x"),
        *("/bin", "/bin/x", "/sbin/x", "/lib64/x", "/home", "/root", "/tmp", "/run/x", "/dev/shm", "/sys/x"),
    ],
)
def test_where_a_source_may_not_be(path: str) -> None:
    """A source never hides what the guest runs on, and its path has one spelling."""
    assert found(source(guest_path=path)) == [("sources[0].guest_path", "field_invalid")]


def test_every_fault_is_told_at_once() -> None:
    """The answer lists all faults in the order of the fields, so that one round mends a spec."""
    spec = spec_with(name="", resources=Resources(vcpus=0), agents=(), secrets=("a",))
    assert [field for field, _ in found(spec)] == ["name", "resources.vcpus", "agents", "secrets[0]"]


@pytest.mark.parametrize(
    "spec",
    [
        spec_with(name="A" * 100_000),
        spec_with(image=ImageRef("Ä" * 100_000)),
        agent(name="A" * 100_000, harness="x" * 100_000),
        source(guest_path="x" * 100_000),
        env(("\n" * 100_000, "")),
        label("\n" * 100_000),
        agent(session="\n" * 100_000),
        spec_with(secrets=("\n" * 100_000,)),
    ],
    ids=["name", "image", "agent", "path", "env", "label", "session", "secret"],
)
def test_a_huge_wrong_value_is_not_repeated(spec: SandboxSpec) -> None:
    """A message stays short, whatever it is about."""
    assert refusals(spec)
    assert max(len(refusal.message) for refusal in refusals(spec)) < 500


@pytest.mark.parametrize(
    "spec",
    [
        spec_with(sources=(SOURCE,) * 200_000),
        spec_with(agents=(AGENT,) * 100_000),
        env(*[("", "")] * 200_000),
        agent(command=("",) * 200_000),
        spec_with(require_labels=(Label("", ""),) * 200_000),
        spec_with(secrets=("",) * 200_000),
    ],
    ids=["sources", "agents", "env", "command", "labels", "secrets"],
)
@pytest.mark.timeout(30)
def test_a_flood_is_refused_with_few_words(spec: SandboxSpec) -> None:
    """A spec of a million entries costs one look at each, and an answer of hundreds."""
    assert 1 <= len(refusals(spec)) <= 2_000
