"""What happens to a sandbox while someone waits for it: one line for each thing that is new, with the time since the start."""

import time
from collections.abc import Callable, Iterator
from typing import TextIO

import click

from fleet.model.assignment import Sandbox
from fleet.model.sandbox import ENDED_AGENT_PHASES, Phase
from mb.render.sandbox import begun_ms, list_stages, render_agent_end, render_next_step, render_refusal, render_stages
from mb.render.text import count, flow, is_coloured, paint, render_span, wrap

Clock = Callable[[], float]
# "[   1.5 s] ": what a line begins with.
STAMP_CHARS = 11


class Progress:
    """Writes progress to `stream`; remembers what it has said of a sandbox, so that nothing is said twice."""

    def __init__(self, stream: TextIO, clock_s: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock_s = clock_s
        self._started_s = clock_s()
        self._said: set[str] = set()
        self._refusal = ""

    def say(self, text: str) -> None:
        """One line with the time."""
        stamp = f"[{self._clock_s() - self._started_s:6.1f} s]"
        stamp = paint(stamp, "cyan") if is_coloured(self._stream) else stamp
        lines = flow(" " * STAMP_CHARS, text)
        click.echo("\n".join([f"{stamp} {lines[0][STAMP_CHARS:]}", *lines[1:]]), file=self._stream)

    def show(self, sandbox: Sandbox) -> None:
        """Says what is new about a sandbox."""
        refusal = render_refusal(sandbox)
        if refusal not in ("", self._refusal):
            self.say(f"pending: {refusal}")
            for reason in sandbox.refusal.reasons if sandbox.refusal else ():
                self.say(f"  {reason.code}: {reason.message}")
        self._refusal = refusal
        for line in _render_events(sandbox):
            if line not in self._said:
                self._said.add(line)
                self.say(line)
        if sandbox.phase is not Phase.LOST:
            self._said.discard(_LOST)


_LOST = "lost: its host is not heard of; waiting for it"


def render_summary(sandbox: Sandbox, *, is_kept: bool = True) -> list[str]:
    """How a sandbox ended, how long its stages took, and what to do with it next, when it `is_kept`."""
    name = sandbox.spec.name
    agents = sandbox.status.agents if sandbox.status else ()
    ends = "; ".join(f"{agent.name} {render_agent_end(agent, sandbox)}" for agent in agents)
    lines = wrap(sandbox.phase, f"{name}: {ends}" if ends else name)
    reason = sandbox.status.reason if sandbox.status else None
    if reason is not None:
        lines += wrap("reason", f"{reason.message} ({reason.code})")
        lines += wrap("  next", render_next_step(reason, sandbox)) if reason.next_step else []
    lines += render_stages(sandbox)
    artifact = sandbox.status.artifact if sandbox.status else None
    if artifact is not None:
        lines += wrap("changes", count(artifact.changes, "path"))
    if not is_kept:
        return lines
    steps = [f"mb diff {name}", f"mb get {name}"] if artifact is not None else []
    steps += [f"mb start {name}"] if sandbox.phase is Phase.STOPPED else []
    return [
        *lines,
        *(f"{'' if index else 'next':13}{step}" for index, step in enumerate([*steps, f"mb destroy {name}"])),
    ]


def _render_events(sandbox: Sandbox) -> Iterator[str]:
    if sandbox.phase is Phase.LOST:
        yield _LOST
    before = begun_ms(sandbox)
    for name, at_ms in list_stages(sandbox):
        where = f" to host {sandbox.host_id}" if name == "assigned" else ""
        yield f"{name.replace('_', ' ')}{where} (+{render_span(before, at_ms)})"
        before = at_ms
    for agent in sandbox.status.agents if sandbox.status else ():
        if agent.phase in ENDED_AGENT_PHASES:
            yield f"agent {agent.name} {render_agent_end(agent, sandbox)}"
