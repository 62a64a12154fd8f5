"""What `configure` may say: hostd's own words are understood, every wrong field is a fault that names it."""

import copy
from pathlib import Path
from typing import Any

import pytest

from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, EnvVar, Goal, SandboxSpec, Source
from guestd import VERSION
from guestd.configuration import parse_configuration
from guestd.fault import TEXT_CHARS_MAX, GuestFault, clean_text
from guestd.workload.confine import build_environment
from hostd.reconcile.words import describe_configuration

DIGEST = Digest("sha256:" + "0" * 64)


def configure(address: str = "10.88.0.2") -> dict[str, Any]:
    """The fields as hostd sends them."""
    agent = Agent("a", "custom", ("make", "-k"), env=(EnvVar("X", "1"),), timeout_s=1.5)
    spec = SandboxSpec("box", sources=(Source(DIGEST, 1, "/workspace", True),), agents=(agent,))
    order = Assignment(SandboxId("aaaaaaaaaaaa"), Tenant("acme"), HostId("host-1"), spec, DIGEST, 64, Goal.RUN, 1, 1, 1)
    return describe_configuration(order, address, 16, 1_000)


def test_what_hostd_sends_is_understood() -> None:
    """Every field of hostd's own `configure` arrives."""
    found = parse_configuration(configure())
    assert (found.hostname, found.clock_ms) == ("box", 1000)
    assert found.address is not None
    assert (found.address.ip, found.address.prefix, found.address.mac) == ("10.88.0.2", 16, "52:bd:0a:58:00:02")
    (source,), (agent,) = found.sources, found.agents
    assert (source.serial, source.guest_path, source.readonly) == ("source-0", "/workspace", True)
    assert source.about == {"guest_path": "/workspace", "digest": DIGEST}
    assert (agent.name, agent.command, agent.env, agent.timeout_s) == ("a", ["make", "-k"], {"X": "1"}, 1.5)
    assert (agent.workdir, agent.grace_period_s, agent.memory_mib, agent.pids_max) == ("/workspace", 30.0, 2048, 512)


def test_a_guest_without_a_device_has_no_address() -> None:
    """Mode `none`: nothing to set."""
    assert parse_configuration(configure(address="")).address is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("hostname",), "../etc"),
        (("clock_ms",), None),
        (("clock_ms",), float("inf")),
        (("sources",), None),
        (("sources", 0, "serial"), "../../x"),
        (("sources", 0, "guest_path"), "workspace"),
        (("sources", 0, "guest_path"), "/a/../etc"),
        (("agents", 0, "name"), "a/b"),
        (("agents", 0, "command"), []),
        (("agents", 0, "workdir"), "here"),
        (("agents", 0, "env"), [["only a key"]]),
        (("agents", 0, "timeout_s"), "soon"),
        (("address", "prefix"), 33),
        (("address", "mac"), "none"),
        (("address",), "10.0.0.1"),
    ],
)
def test_a_wrong_field_is_a_fault(path: tuple[str | int, ...], value: object) -> None:
    """Nothing wrong is guessed at, and no name that is used as a path leads elsewhere."""
    fields = copy.deepcopy(configure())
    place: Any = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(GuestFault) as caught:
        parse_configuration(fields)
    assert caught.value.code == "configuration_invalid"


def test_a_missing_field_is_named() -> None:
    """The fault says which field the host forgot."""
    with pytest.raises(GuestFault, match="no field 'agents'"):
        parse_configuration({key: value for key, value in configure().items() if key != "agents"})


def test_an_environment_is_a_base_and_the_agents_own() -> None:
    """Nothing of this process's environment passes; an agent's own words win."""
    found = build_environment({"PATH": "/mine", "X": "1"})
    assert found["PATH"] == "/mine"
    assert sorted(found) == ["HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "X"]


def test_texts_cannot_burst_a_header() -> None:
    """What is told of agents and files is short, printable ASCII."""
    text = clean_text("é\n\0" * 1000)
    assert len(text) == TEXT_CHARS_MAX
    assert text.isprintable()
    assert text.isascii()


def test_the_version_is_the_distributions() -> None:
    """`hello` tells the version that is released."""
    project = Path(__file__).parents[3] / "pyproject.toml"
    assert f'\nversion = "{VERSION}"\n' in project.read_text()
