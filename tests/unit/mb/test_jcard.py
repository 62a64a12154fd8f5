"""Jcards: every field that is documented is read, and everything wrong is told in the words the user wrote."""

from pathlib import Path
from typing import Any

import pytest

from fleet.model.admission import FieldRefusal
from fleet.model.sandbox import (
    Affinity,
    Agent,
    Amounts,
    EnvVar,
    ImageRef,
    Label,
    Limits,
    Network,
    NetworkMode,
    Placement,
    Resources,
    Restart,
    SandboxSpec,
    Totals,
)
from mb.jcard.model import Jcard
from mb.jcard.parse import parse_jcard, to_label
from mb.jcard.to_spec import UNPACKED, find_faults, to_spec

FOLDER = Path("/work/my-agent")
DIGEST = "sha256:" + "ab" * 32
NEXT = '[[agents]]\nharness = "custom"\ncommand = "true"\n'
AGENT = '[agent]\nharness = "custom"\ncommand = "true"\n'


def parse(text: str, **environment: str) -> Jcard:
    return parse_jcard(text, FOLDER, environment)


def spec_of(jcard: Jcard) -> SandboxSpec:
    return to_spec(jcard, [UNPACKED] * len(jcard.shared))


def faults_of(text: str, **environment: str) -> list[FieldRefusal]:
    jcard = parse(text, **environment)
    return list(find_faults(jcard, spec_of(jcard)))


def test_an_agent_alone_is_enough() -> None:
    """Every other field has its default, and the network is closed without being asked to be."""
    jcard = parse(AGENT)
    agent = Agent("custom", "custom", ("/bin/sh", "-c", "true"), workdir="/home/agent")
    assert spec_of(jcard) == SandboxSpec("my-agent", agents=(agent,))
    assert faults_of(AGENT) == []
    assert [note for note in jcard.notes if "closed" in note]


def test_every_field_reaches_the_spec() -> None:
    """What is written is what is asked for, field by field."""
    jcard = parse(
        f"""
        name = "night-run"
        mixtape = "tools:2024"
        mixtape_digest = "{DIGEST}"
        [resources]
        cpus = 3
        memory = "1.5GiB"
        disk = "900MiB"
        gpus = 0
        [network]
        mode = "none"
        egress_allow = []
        forwards = []
        [[shared]]
        host = "${{TREE}}/src"
        guest = "/workspace"
        readonly = true
        [agent]
        name = "worker"
        type = "native"
        harness = "custom"
        command = ["run", "--all"]
        workdir = "/workspace/deep"
        restart = "no"
        max_restarts = 0
        timeout = "1m30s"
        grace_period = "5s"
        session = ""
        extra_packages = []
        replicas = 1
        gang = false
        memory = "64MiB"
        pid_limit = 99
        [agent.env]
        KEY = "a ${{WHO}} b"
        """,
        TREE="/data",
        WHO="me",
    )
    assert jcard.faults == ()
    assert jcard.spec == SandboxSpec(
        name="night-run",
        image=ImageRef("tools:2024", DIGEST),  # type: ignore[arg-type]
        resources=Resources(3, 1536, 900, 0),
        network=Network(NetworkMode.NONE),
        agents=(
            Agent(
                name="worker",
                harness="custom",
                command=("run", "--all"),
                workdir="/workspace/deep",
                env=(EnvVar("KEY", "a me b"),),
                timeout_s=90.0,
                grace_period_s=5.0,
                memory_mib=64,
                pids_max=99,
            ),
        ),
    )
    (shared,) = jcard.shared
    assert (shared.host, shared.guest, shared.readonly) == (Path("/data/src"), "/workspace", True)


def test_where_it_would_be_reaches_the_spec() -> None:
    """Devices, priority, taints, preferences and the group are asked for as they are written."""
    jcard = parse(
        AGENT
        + """
        [resources]
        gpus = 2
        gpu_fraction = 0.25
        gpu_models = ["A100", "H100"]
        gpu_memory = "40GiB"
        [placement]
        priority = 5
        group = "night"
        group_size = 3
        [placement.tolerates]
        kept = "research"
        [placement.prefers]
        zone = "a"
        """
    )
    assert jcard.faults == ()
    assert jcard.spec.resources == Resources(
        gpus=2, gpu_milli=250, gpu_models=("A100", "H100"), gpu_memory_mib=40 * 1024
    )
    kept, zone = Label("kept", "research"), Label("zone", "a")
    assert jcard.spec.placement == Placement(5, (kept,), (zone,), Affinity.ANY, "night", 3)


def test_budget_and_limits_reach_the_spec() -> None:
    """The account and every limit, in the units that a spec counts in."""
    jcard = parse(
        AGENT
        + """
        [budget]
        account = "research"
        [limits]
        vcpus = 8
        memory = "16GiB"
        disk = "1TiB"
        gpus = "0.5"
        sandboxes = 4
        depth = 2
        wall_clock = "90s"
        vcpu_time = "2h"
        gpu_time = "1h"
        egress = "1GiB"
        cost = "12.50"
        """
    )
    assert jcard.faults == ()
    assert jcard.spec.budget == "research"
    assert jcard.spec.limits == Limits(
        Amounts(8, 16 * 1024, 1024 * 1024, 500, 4, 2),
        Totals(90_000, 2 * 3_600_000, 3_600_000, 1024**3, 12_500_000),
    )


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[limits]\nvcpus = -1", "limits.vcpus"),
        ("[limits]\nwall_clock = 10", "limits.wall_clock"),
        ('[limits]\nmemory = "much"', "limits.memory"),
        ('[limits]\ncost = "1.1234567"', "limits.cost"),
        ("[limits]\nspeed = 1", "limits.speed"),
        ('[budget]\naccount = "No Name"', "budget.account"),
    ],
)
def test_a_limit_that_is_none_is_named(text: str, field: str) -> None:
    """What cannot be read, or is no dimension, is refused under the name that the user wrote."""
    jcard = parse(AGENT + "\n" + text)
    assert [fault.field for fault in find_faults(jcard, to_spec(jcard, []))] == [field]


@pytest.mark.parametrize(
    ("text", "field", "code"),
    [
        ("mixtape = 5\n" + AGENT, "mixtape", "type_invalid"),
        ('mixtape = "A b"\n' + AGENT, "mixtape", "field_invalid"),
        ('mixtape_digest = "sha256:12"\n' + AGENT, "mixtape_digest", "field_invalid"),
        ('name = "My Run"\n' + AGENT, "name", "field_invalid"),
        ("name = 7\n" + AGENT, "name", "type_invalid"),
        (AGENT + '[resources]\ncpus = "2"', "resources.cpus", "type_invalid"),
        (AGENT + "[resources]\ncpus = true", "resources.cpus", "type_invalid"),
        (AGENT + "[resources]\ncpus = 0", "resources.cpus", "field_invalid"),
        (AGENT + "[resources]\ncpus = 0xffffffffffffffffffff", "resources.cpus", "field_invalid"),
        (AGENT + '[resources]\nmemory = "4GB"', "resources.memory", "field_invalid"),
        (AGENT + '[resources]\nmemory = "1MiB"', "resources.memory", "field_invalid"),
        (AGENT + '[resources]\nmemory = "300000KiB"', "resources.memory", "field_invalid"),
        (AGENT + "[resources]\ndisk = 20", "resources.disk", "type_invalid"),
        (AGENT + '[resources]\ndisk = "1MiB"', "resources.disk", "field_invalid"),
        (AGENT + "[resources]\ngpus = 17", "resources.gpus", "field_invalid"),
        (AGENT + "[resources]\ngpus = 1\ngpu_fraction = 1.5", "resources.gpu_fraction", "field_invalid"),
        (AGENT + '[resources]\ngpus = 1\ngpu_fraction = "half"', "resources.gpu_fraction", "type_invalid"),
        (AGENT + "[resources]\ngpu_fraction = 0.5", "resources.gpu_fraction", "field_invalid"),
        (AGENT + '[resources]\ngpu_models = ["a b"]\ngpus = 1', "resources.gpu_models[0]", "field_invalid"),
        (AGENT + '[resources]\ngpu_memory = "1GiB"', "resources.gpu_memory", "field_invalid"),
        (AGENT + "[placement]\npriority = 1001", "placement.priority", "field_invalid"),
        (AGENT + '[placement]\npriority = "high"', "placement.priority", "type_invalid"),
        (AGENT + '[placement.tolerates]\n"a b" = "x"', "placement.tolerates.a b", "field_invalid"),
        (AGENT + '[placement.prefers]\nzone = "a b"', "placement.prefers.zone", "field_invalid"),
        (AGENT + '[placement]\nparent = "near"', "placement.parent", "field_invalid"),
        (AGENT + '[placement]\nparent = "far"', "placement.parent", "field_invalid"),
        (AGENT + '[placement]\ngroup = "A"\ngroup_size = 2', "placement.group", "field_invalid"),
        (AGENT + '[placement]\ngroup = "a"', "placement.group_size", "field_invalid"),
        (AGENT + "[placement]\ngroup_size = 2", "placement.group_size", "field_invalid"),
        ("resources = 4\n" + AGENT, "resources", "type_invalid"),
        (AGENT + '[network]\nmode = "nat"', "network.mode", "not_enforceable"),
        (AGENT + '[network]\nmode = "allow"', "network.mode", "not_enforceable"),
        (AGENT + '[network]\nmode = "bridged"', "network.mode", "not_enforceable"),
        (AGENT + '[network]\nmode = "open"', "network.mode", "field_invalid"),
        (AGENT + '[network]\negress_allow = ["a.example"]', "network.egress_allow", "not_enforceable"),
        (AGENT + "[network]\negress_allow = [3]", "network.egress_allow[0]", "type_invalid"),
        (AGENT + "[network]\nforwards = [{host = 1, guest = 2}]", "network.forwards", "not_enforceable"),
        (
            AGENT + '[network]\nforwards = [{host = 1, guest = 2, proto = "sctp"}]',
            "[[network.forwards]][0].proto",
            "field_invalid",
        ),
        (AGENT + '[[shared]]\nguest = "/workspace"', "[[shared]][0].host", "field_invalid"),
        (AGENT + '[[shared]]\nhost = "."', "[[shared]][0].guest", "field_invalid"),
        (AGENT + '[[shared]]\nhost = "."\nguest = "/etc"', "[[shared]][0].guest", "field_invalid"),
        (AGENT + '[[shared]]\nhost = "."\nguest = "/w"\nreadonly = "no"', "[[shared]][0].readonly", "type_invalid"),
        (AGENT + '[[shared]]\nhost = "${NOWHERE}"\nguest = "/w"', "[[shared]][0].host", "variable_unset"),
        (AGENT + '[[shared]]\nhost="."\nguest="/w"\n[[shared]]\nhost="."\nguest="/w/a"', "[[shared]]", "field_invalid"),
        ("shared = [1]\n" + AGENT, "[[shared]][0]", "type_invalid"),
        (AGENT + '[secrets]\ntoken = "x"', "secrets.token", "field_invalid"),
        (AGENT + '[requires]\nzone = "rack 1!"', "requires.zone", "field_invalid"),
        (AGENT + '[secrets]\nTOKEN = "${NOWHERE}"', "secrets.TOKEN", "variable_unset"),
        ("", "agent", "field_invalid"),
        ('[agent]\nharness = "mine"', "agent.harness", "field_invalid"),
        ('[agent]\nharness = "codex"\ncommand = "x"', "agent.command", "field_invalid"),
        ('[agent]\nharness = "custom"\ncommand = 5', "agent.command", "type_invalid"),
        ('[agent]\nharness = "custom"\ncommand = ""', "agent.command", "field_invalid"),
        ('[agent]\nharness = "custom"\ncommand = ["a", 1]', "agent.command[1]", "type_invalid"),
        (AGENT + 'prompt = "do it"', "agent.prompt", "field_invalid"),
        (AGENT + 'name = "Big Agent"', "agent.name", "field_invalid"),
        (AGENT + 'type = "container"', "agent.type", "field_invalid"),
        (AGENT + 'workdir = "here"', "agent.workdir", "field_invalid"),
        (AGENT + 'restart = "sometimes"', "agent.restart", "field_invalid"),
        (AGENT + "max_restarts = 3", "agent.max_restarts", "field_invalid"),
        (AGENT + "timeout = 5", "agent.timeout", "type_invalid"),
        (AGENT + 'timeout = "5 minutes"', "agent.timeout", "field_invalid"),
        (AGENT + 'timeout = "9000h"', "agent.timeout", "field_invalid"),
        (AGENT + 'grace_period = "1h"', "agent.grace_period", "field_invalid"),
        (AGENT + 'session = "a.b"', "agent.session", "field_invalid"),
        (AGENT + 'memory = "5GiB"', "agent.memory", "field_invalid"),
        (AGENT + 'extra_packages = ["vim"]', "agent.extra_packages", "not_enforceable"),
        (AGENT + "replicas = 0", "agent.replicas", "field_invalid"),
        (AGENT + "replicas = 17", "agent.replicas", "field_invalid"),
        (AGENT + "gang = true", "agent.gang", "field_invalid"),
        (AGENT + 'timeout = "0s"', "agent.timeout", "field_invalid"),
        ('[agent]\nname = "a"', "agent.prompt", "field_invalid"),
        (AGENT + '[secrets]\nTOKEN = ""', "secrets.TOKEN", "field_invalid"),
        (AGENT + "[secrets]\nTOKEN = 5", "secrets.TOKEN", "type_invalid"),
        ('secrets = "x"\n' + AGENT, "secrets", "type_invalid"),
        (AGENT + f'[secrets]\nTOKEN = "{"x" * 65537}"', "secrets.TOKEN", "field_invalid"),
        (AGENT + "[secrets]\n" + "".join(f'T{i} = "{"x" * 65536}"\n' for i in range(5)), "secrets", "field_invalid"),
        (AGENT + "[secrets]\n" + "".join(f'T{i} = "x"\n' for i in range(33)), "secrets", "field_invalid"),
        (AGENT + 'env = { TOKEN_FILE = "x" }\n[secrets]\nTOKEN = "x"', "agent.env.TOKEN_FILE", "field_invalid"),
        (NEXT + 'session = "a"\n' + NEXT + 'session = "a"\n', "[[agents]]", "field_invalid"),
        (AGENT + 'memory = "1MiB"', "agent.memory", "field_invalid"),
        (AGENT + "pid_limit = 1", "agent.pid_limit", "field_invalid"),
        (AGENT + 'env = { A = "${NOWHERE}" }', "agent.env.A", "variable_unset"),
        (AGENT + 'env = { A = "${}" }', "agent.env.A", "field_invalid"),
        (AGENT + 'env = { "A B" = "" }', "agent.env.A B", "field_invalid"),
        (AGENT + "env = { A = 1 }", "agent.env.A", "type_invalid"),
        (AGENT + 'prompt_file = "/nowhere/prompt"', "agent.prompt_file", "file_unreadable"),
        (AGENT + "[[agents]]", "agent", "field_invalid"),
        ("[[agent]]", "agent", "type_invalid"),
        (NEXT + NEXT + "timeout = 3", "[[agents]][1].timeout", "type_invalid"),
        (NEXT + NEXT + 'grace_period = "1h"', "[[agents]][1].grace_period", "field_invalid"),
        (NEXT * 17, "[[agents]]", "field_invalid"),
        ("name = [", "", "syntax_invalid"),
    ],
)
def test_a_fault_names_its_field_as_it_is_written(text: str, field: str, code: str) -> None:
    """Whatever is wrong, the user finds it by the name in the file, with a reason for programs and a next step."""
    found = {(fault.field, fault.code): fault for fault in faults_of(text)}
    assert (field, code) in found
    assert found[field, code].next_step


def test_what_is_no_toml_has_one_fault() -> None:
    """Nothing of it was read, so nothing is missing from it."""
    assert [fault.code for fault in faults_of('name = "x')] == ["syntax_invalid"]


def test_every_fault_is_told_at_once() -> None:
    """Nobody mends a file one error at a time; and one wrong field is not reported twice."""
    found = faults_of('nmae = "x"\n[resources]\ncpus = "2"\nmemory = "1MiB"\n[agent]\nharness = "custom"\ntimeout = 1')
    fields = [fault.field for fault in found]
    assert {"nmae", "resources.cpus", "resources.memory", "agent.timeout"} == set(fields)
    assert len(fields) == len(set(fields))


@pytest.mark.parametrize(
    ("text", "near"),
    [("mixtpe = 1", "mixtape"), ("[resources]\ncpu = 1", "cpus"), ("[agent]\ntime_out = 1", "timeout")],
)
def test_an_unknown_key_meets_the_nearest_known_one(text: str, near: str) -> None:
    """A typing error is an error, never a setting that silently does nothing."""
    (fault,) = [fault for fault in faults_of(text) if fault.code == "key_unknown"]
    assert near in fault.next_step


def test_agents_without_a_name_are_told_apart() -> None:
    """One takes its harness's name; several of one harness are numbered; a given name stays."""
    one = parse(AGENT)
    several = parse("".join(f'[[agents]]\nharness = "custom"\n{name}\n' for name in ("", 'name = "own"', "")))
    assert [agent.name for agent in one.spec.agents] == ["custom"]
    assert [agent.name for agent in several.spec.agents] == ["custom-0", "own", "custom-1"]


def test_a_custom_agent_without_a_command_runs_agent_with_the_prompt() -> None:
    """As elsewhere: the image's program `agent` gets the prompt as its argument."""
    (agent,) = parse('[agent]\nharness = "custom"\nprompt = "mend it"').spec.agents
    assert agent.command == ("agent", "mend it")


def test_a_prompt_file_is_read_here(tmp_path: Path) -> None:
    """The guest gets the text, not a path that means nothing there; the path is relative to the jcard."""
    (tmp_path / "ask.md").write_text("mend it")
    jcard = parse_jcard('[agent]\nharness = "custom"\nprompt_file = "ask.md"', tmp_path, {})
    assert jcard.spec.agents[0].command == ("agent", "mend it")


def test_agents_work_in_the_first_shared_folder() -> None:
    """The default workdir follows the sources."""
    jcard = parse(AGENT + '[[shared]]\nhost = "a"\nguest = "/data"\n[[shared]]\nhost = "b"\nguest = "/more"')
    assert jcard.spec.agents[0].workdir == "/data"
    assert jcard.shared[0].host == FOLDER / "a"


@pytest.mark.parametrize(
    ("text", "label"),
    [("My_Project", "my-project"), ("--", ""), ("Ünï", "n"), ("a" * 80, "a" * 63), ("x" * 62 + "!y", "x" * 62)],
)
def test_a_folder_name_becomes_a_label(text: str, label: str) -> None:
    """The default name is always one that a host, a certificate and a key can carry."""
    assert to_label(text) == label


def test_notes_say_what_is_different_here() -> None:
    """What is accepted with another meaning than elsewhere is said, once."""
    text = "".join('[[agents]]\nharness = "custom"\ntype = "sandboxed"\ncommand = "x"\n' for _ in range(2))
    notes = parse_jcard(text, Path("/work/My Agent"), {}).notes
    assert len(notes) == len(set(notes)) == 3
    assert any("my-agent" in note for note in notes)
    assert any("closed" in note for note in notes)
    assert parse(AGENT + 'restart = "always"\n[network]\nmode = "none"').notes == (
        "restart always without max_restarts and timeout: it runs until mb stop",
    )


def test_nat_is_explained_in_its_own_word() -> None:
    """What users write elsewhere is refused by the name they wrote, with what it would mean here."""
    (fault,) = faults_of(AGENT + '[network]\nmode = "nat"')
    assert fault.message.startswith("nat ")
    assert "egress_allow" in fault.message
    assert "allow " not in fault.message.replace("egress_allow", "")


def test_replicas_are_agents_of_their_own() -> None:
    """Each copy has its name and its session; all else is the same, and its faults are told once."""
    text = AGENT + 'name = "mill"\nreplicas = 3\nsession = "watch"\nrestart = "on-failure"\nmax_restarts = 2'
    jcard = parse(text + "\ngang = true")
    assert [(agent.name, agent.session) for agent in jcard.spec.agents] == [
        ("mill-0", "watch-0"),
        ("mill-1", "watch-1"),
        ("mill-2", "watch-2"),
    ]
    assert {(agent.restart, agent.max_restarts, agent.command) for agent in jcard.spec.agents} == {
        (Restart.ON_FAILURE, 2, ("/bin/sh", "-c", "true"))
    }
    assert jcard.agent_fields == ("agent",) * 3
    assert any("start together" in note for note in jcard.notes)
    assert [fault.field for fault in faults_of(AGENT + 'replicas = 3\nmemory = "9GiB"')] == ["agent.memory"]
    assert [fault.field for fault in faults_of(NEXT + "replicas = 9\n" + NEXT + "replicas = 9")] == ["[[agents]]"]


def test_an_agent_has_at_most_what_its_sandbox_has() -> None:
    """The default follows a small sandbox; a written value is kept, or refused when it is more."""
    small = parse(AGENT + '[resources]\nmemory = "512MiB"')
    assert (small.spec.agents[0].memory_mib, parse(AGENT).spec.agents[0].memory_mib) == (512, 2048)
    assert parse(AGENT + 'memory = "3GiB"').spec.agents[0].memory_mib == 3072


SECRET = "sk-verysecret0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f'[secrets]\nTOKEN = "{SECRET}"',
        '[secrets]\nTOKEN = "${TOKEN}"',
        f'[secrets]\ntoken = "{SECRET}"',
        f'[secrets]\nTOKEN = "${{{SECRET}"',
        f'[secrets]\nTOKEN = "${{{SECRET}}}"',
        f'[secrets]\nTOKEN = ["{SECRET}"]',
        f'[secrets]\nTOKEN = {{ value = "{SECRET}" }}',
        f'[secrets.TOKEN]\nvalue = "{SECRET}"',
        f'[secret]\nTOKEN = "{SECRET}"',
        f'[[secrets]]\nTOKEN = "{SECRET}"',
        f'[secrets]\nTOKEN = "{SECRET * 5000}"',
        f'[secrets]\nTOKEN = "{SECRET}',
    ],
)
def test_no_secret_is_repeated(text: str) -> None:
    """Neither what is read nor any message about it holds a value: not in a repr, a log or an error."""
    jcard = parse(AGENT + text, TOKEN=SECRET)
    assert SECRET not in repr(jcard)
    assert SECRET not in repr(find_faults(jcard, spec_of(jcard)))


def test_secrets_reach_whoever_sends_them() -> None:
    """The spec has the names, and the values are there for the one call that needs them."""
    jcard = parse(AGENT + '[secrets]\nTOKEN = "a${TOKEN}"\nKEY = "ü"', TOKEN=SECRET)
    assert jcard.spec.secrets == ("TOKEN", "KEY")
    assert {name: value.reveal() for name, value in jcard.secrets.items()} == {
        "TOKEN": b"a" + SECRET.encode(),
        "KEY": "ü".encode(),
    }


def test_a_variable_that_is_no_text_is_refused() -> None:
    """The environment may hold any bytes; a spec holds text."""
    environment: dict[str, Any] = {"RAW": "\udcff"}
    assert [fault.field for fault in faults_of(AGENT + 'env = { A = "${RAW}" }', **environment)] == ["agent.env.A"]
