"""Sandboxes as people read them: the listing, one in full, and how long each stage took."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from fleet.model.assignment import Sandbox
from fleet.model.sandbox import ENDED_PHASES, AgentPhase, AgentStatus, Goal, Phase, Reason
from fleet.model.units import MIB, render_bytes
from mb.render.text import count, fill_name, render_age, render_span, render_table, wrap

# What a host keeps of one agent's output (docs/guest-link.md).
OUTPUT_BYTES_MAX = 64 * MIB
# TERM and KILL: what mb stop sends.
_STOP_SIGNALS = frozenset({15, 9})


def to_json(sandbox: Sandbox) -> dict[str, Any]:
    """A sandbox as an object for programs, with the fields of fleet.model."""
    return asdict(sandbox)


def render_listing(sandboxes: Sequence[Sandbox], now_ms: int) -> list[str]:
    """A table, the newest first; with names as tenant/name when there are several tenants."""
    if not sandboxes:
        return ["no sandboxes; mb up starts one"]
    has_tenants = len({sandbox.tenant for sandbox in sandboxes}) > 1
    rows = [
        (
            f"{sandbox.tenant}/{sandbox.spec.name}" if has_tenants else sandbox.spec.name,
            render_phase(sandbox),
            sandbox.host_id or "-",
            render_exits(sandbox) or "-",
            render_age(sandbox.created_at_ms, now_ms),
            sandbox.sandbox_id,
        )
        for sandbox in sorted(sandboxes, key=lambda sandbox: (-sandbox.created_at_ms, sandbox.sandbox_id))
    ]
    return render_table(("NAME", "PHASE", "HOST", "EXIT", "AGE", "ID"), rows)


def render_phase(sandbox: Sandbox) -> str:
    """The phase with what is unusual about it while it lasts: "running (guest_unresponsive)", "running, 2 restarts, run 3"."""
    status = sandbox.status
    is_at_work = sandbox.phase not in ENDED_PHASES
    reason = f" ({status.reason.code})" if is_at_work and status and status.reason else ""
    restarts = sum(agent.restarts for agent in status.agents) if status else 0
    notes = [count(restarts, "restart")] if restarts else []
    notes += [f"run {sandbox.run}"] if sandbox.run > 1 else []
    return ", ".join([sandbox.phase + reason, *notes])


def render_exits(sandbox: Sandbox) -> str:
    """How the agents that ended did: "0", "0 1", "SIG9"."""
    agents = sandbox.status.agents if sandbox.status else ()
    return " ".join(_exit(agent) for agent in agents if agent.exit_code is not None or agent.signal is not None)


def render_sandbox(sandbox: Sandbox, now_ms: int) -> list[str]:
    """Everything about one sandbox."""
    return [
        *_render_head(sandbox, now_ms),
        *_render_refusal(sandbox),
        *render_reason(sandbox),
        *_render_wish(sandbox),
        *_render_agents(sandbox),
        *render_stages(sandbox),
        *_render_result(sandbox),
    ]


def render_refusal(sandbox: Sandbox) -> str:
    """Why no host takes a pending sandbox, in one line; empty when nothing was refused."""
    refusal = sandbox.refusal
    if refusal is None:
        return ""
    if not refusal.hosts_considered:
        return "there is no host"
    reasons = "; ".join(f"{reason.code} ({count(reason.hosts, 'host')})" for reason in refusal.reasons)
    return f"no room on {count(refusal.hosts_considered, 'host')}: {reasons}"


def render_reason(sandbox: Sandbox) -> Iterator[str]:
    """Why the sandbox is as it is, and what to do."""
    reason = sandbox.status.reason if sandbox.status else None
    yield from _render_reason("reason", reason, sandbox)


def render_stages(sandbox: Sandbox) -> Iterator[str]:
    """Each stage with the time since the one before, and since the run began."""
    stages, before = list_stages(sandbox), begun_ms(sandbox)
    begun = before
    if stages:
        yield f"{'stages':13}{'':18}{'took':>12}{'since start':>14}"
    for name, at_ms in stages:
        step, total = render_span(before, at_ms), render_span(begun, at_ms)
        yield f"{'':13}{name:18}{step:>12}{total:>14}"
        before = at_ms


def list_stages(sandbox: Sandbox) -> list[tuple[str, int]]:
    """The stages reached so far, in order of time, the scheduler's own included."""
    stages = [("assigned", sandbox.assigned_at_ms)] if sandbox.assigned_at_ms else []
    stages += [(stage.name, stage.at_ms) for stage in (sandbox.status.stages if sandbox.status else ())]
    return sorted(stages, key=lambda stage: stage[1])


def begun_ms(sandbox: Sandbox) -> int:
    """When the run began: the first when the sandbox was asked for, a later one when it was assigned again."""
    stages = list_stages(sandbox)
    return stages[0][1] if sandbox.run > 1 and stages else sandbox.created_at_ms


def render_agent_end(agent: AgentStatus, sandbox: Sandbox) -> str:
    """How an agent ended, or what it does: "completed, exit 0", "failed, exit 1", "running"."""
    ended = agent.exit_code is not None or agent.signal is not None
    was_stopped = agent.phase is AgentPhase.FAILED and agent.signal in _STOP_SIGNALS and Goal.RUN is not sandbox.goal
    phase = "stopped" if was_stopped else agent.phase.value
    end = f"{phase}, {_exit_words(agent)}" if ended else phase
    return f"{end}, restarted {count(agent.restarts, 'time')}" if agent.restarts else end


def render_cut(agent: AgentStatus) -> str:
    """Why an agent's output is not whole."""
    if agent.output_bytes >= OUTPUT_BYTES_MAX:
        return f"output cut off at its limit of {render_bytes(OUTPUT_BYTES_MAX)}"
    return f"output cut off after {render_bytes(agent.output_bytes)}: its disk was full"


def _render_head(sandbox: Sandbox, now_ms: int) -> Iterator[str]:
    goal = f" (asked to {sandbox.goal})" if sandbox.goal is not Goal.RUN else ""
    yield from wrap("sandbox", f"{sandbox.spec.name}  {sandbox.sandbox_id}  of tenant {sandbox.tenant}")
    yield from wrap("phase", f"{sandbox.phase}{goal}")
    if sandbox.run > 1:
        yield from wrap("run", f"{sandbox.run}, on the disk of the runs before")
    yield from wrap("age", render_age(sandbox.created_at_ms, now_ms))
    if sandbox.host_id:
        accelerator = f" ({sandbox.status.accelerator})" if sandbox.status and sandbox.status.accelerator else ""
        yield from wrap("host", sandbox.host_id + accelerator)
    if sandbox.phase is Phase.LOST:
        yield from wrap("", "the host is not heard of, or has ended it: it goes on elsewhere if it may, or waits")
    if sandbox.placement > 1 or sandbox.reason is not None:
        why = f": {sandbox.reason.message}" if sandbox.reason else ""
        yield from wrap("placement", f"{sandbox.placement}{why}")


def _render_refusal(sandbox: Sandbox) -> Iterator[str]:
    if sandbox.refusal is None:
        return
    yield from wrap("refused", render_refusal(sandbox) + "; it is tried again whenever something changes")
    for reason in sandbox.refusal.reasons:
        yield from wrap("", f"{reason.code}, {count(reason.hosts, 'host')}: {reason.message}")


def _render_wish(sandbox: Sandbox) -> Iterator[str]:
    spec, status = sandbox.spec, sandbox.status
    resources = spec.resources
    size = f"{render_bytes(resources.memory_mib * MIB)} memory, {render_bytes(resources.disk_mib * MIB)} disk"
    yield from wrap("image", f"{spec.image.name} {sandbox.image_digest or spec.image.digest}".rstrip())
    yield from wrap("resources", f"{count(resources.vcpus, 'vCPU')}, {size}")
    address = f", address {status.address}" if status and status.address else ""
    yield from wrap("network", spec.network.mode + address)
    for source in spec.sources:
        mode = ", read-only" if source.readonly else ""
        size = render_bytes(source.size_bytes)
        yield from wrap("source", f"{source.guest_path} ({size}{mode}) {source.digest[:19]}…")


def _render_agents(sandbox: Sandbox) -> Iterator[str]:
    for agent in sandbox.status.agents if sandbox.status else ():
        cut = f", {render_cut(agent)}" if agent.output_truncated else ""
        output = f"{render_bytes(agent.output_bytes)} of output{cut}"
        took = f", {render_span(agent.started_at_ms, agent.ended_at_ms)}" if agent.ended_at_ms else ""
        yield from wrap("agent", f"{agent.name}: {render_agent_end(agent, sandbox)}{took}, {output}")
        if agent.reason is not None and agent.reason != (sandbox.status and sandbox.status.reason):
            yield from _render_reason("", agent.reason, sandbox)


def _render_result(sandbox: Sandbox) -> Iterator[str]:
    artifact = sandbox.status.artifact if sandbox.status else None
    if artifact is not None:
        size = render_bytes(artifact.size_bytes)
        yield from wrap("changes", f"{count(artifact.changes, 'path')} ({size}); mb diff {sandbox.spec.name}")


def render_next_step(reason: Reason, sandbox: Sandbox) -> str:
    """The next step with the sandbox's own name in it: its host may have said NAME."""
    return fill_name(reason.next_step, sandbox.spec.name)


def _render_reason(label: str, reason: Reason | None, sandbox: Sandbox) -> Iterator[str]:
    if reason is None:
        return
    yield from wrap(label, f"{reason.message} ({reason.code})")
    if reason.next_step:
        yield from wrap("  next" if label else "", render_next_step(reason, sandbox))


def _exit(agent: AgentStatus) -> str:
    return f"SIG{agent.signal}" if agent.signal is not None else str(agent.exit_code)


def _exit_words(agent: AgentStatus) -> str:
    return f"killed by signal {agent.signal}" if agent.signal is not None else f"exit {agent.exit_code}"
