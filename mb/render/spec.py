"""A spec as people read it, for `mb check`."""

import shlex
from collections.abc import Iterator, Sequence

from fleet.model.sandbox import Agent, Restart, SandboxSpec
from fleet.model.units import MIB, render_bytes, render_seconds
from mb.prepare import PackedSource
from mb.render.text import count, wrap


def render_spec(spec: SandboxSpec, sources: Sequence[PackedSource], notes: Sequence[str]) -> list[str]:
    """Lines that say what will run, where, with what, and what deserves a note."""
    return [
        *_render_head(spec),
        *_render_sources(sources),
        *_render_agents(spec.name, spec.agents),
        *_render_notes(notes),
    ]


def _render_head(spec: SandboxSpec) -> Iterator[str]:
    pinned = (
        f" pinned to {spec.image.digest}" if spec.image.digest else ", whatever it names when the sandbox is placed"
    )
    resources = spec.resources
    size = f"{render_bytes(resources.memory_mib * MIB)} memory, {render_bytes(resources.disk_mib * MIB)} disk"
    yield from wrap("sandbox", spec.name)
    yield from wrap("image", spec.image.name + pinned)
    yield from wrap("resources", f"{count(resources.vcpus, 'vCPU')}, {size}")
    yield from wrap("network", spec.network.mode)
    if spec.secrets:
        yield from wrap("secrets", ", ".join(spec.secrets))
    for label in spec.require_labels:
        yield from wrap("requires", f"a host labelled {label.name} = {label.value}")


def _render_sources(sources: Sequence[PackedSource]) -> Iterator[str]:
    for source in sources:
        packed, shared = source.packed, source.shared
        kind = "read-only" if shared.readonly else "changes go to a layer of their own"
        yield from wrap("source", f"{shared.guest} from {shared.host} ({kind})")
        yield from wrap(
            "", f"{count(packed.members, 'path')}, {render_bytes(packed.size_bytes)}, {packed.digest[:19]}…"
        )


def _render_agents(sandbox: str, agents: Sequence[Agent]) -> Iterator[str]:
    for agent in agents:
        timeout = render_seconds(agent.timeout_s) if agent.timeout_s else "none"
        grace = render_seconds(agent.grace_period_s)
        memory = render_bytes(agent.memory_mib * MIB)
        yield from wrap("agent", f"{agent.name} ({agent.harness})")
        yield from wrap("  command", shlex.join(agent.command))
        yield from wrap("  in", agent.workdir)
        if agent.session:
            yield from wrap("  session", f"{agent.session} (mb attach {sandbox} {agent.name})")
        if agent.restart is not Restart.NO:
            most = f"at most {count(agent.max_restarts, 'time')}" if agent.max_restarts else "without end"
            yield from wrap("  restart", f"{agent.restart}, {most}")
        yield from wrap("  limits", f"timeout {timeout} (grace {grace}), {memory} memory, {agent.pids_max} processes")
        if agent.env:
            yield from wrap("  env", ", ".join(variable.name for variable in agent.env))


def _render_notes(notes: Sequence[str]) -> Iterator[str]:
    for note in notes:
        yield from wrap("note", note)
