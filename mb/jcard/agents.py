"""Reads a jcard's agents: `[agent]` or `[[agents]]`, their names, replicas, and the command that a harness makes of a prompt."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleet.model.admission import AGENT_MEMORY_MIB_MIN, AGENTS_MAX, CUSTOM, HARNESSES
from fleet.model.sandbox import Agent, EnvVar, NetworkMode, Restart
from mb.jcard.harness import Harness, load_harness
from mb.jcard.paths import read_text, to_path
from mb.jcard.table import Table, shown

# Where nothing is shared; an agent's HOME, which every image has.
HOME = "/home/agent"
# Where nothing is said and the sandbox has as much.
AGENT_MEMORY_MIB = 2048

_SANDBOXED = "type sandboxed needs nothing more here: every sandbox is a virtual machine"
_GANG = "gang needs nothing more here: agents of one sandbox always start together"
_ENDLESS = "restart always without max_restarts and timeout: it runs until mb stop"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the rest of the jcard says that agents depend on; `workdir` is the first shared guest path, if there is one."""

    folder: Path
    image: str
    mode: NetworkMode
    workdir: str
    memory_mib: int
    secrets: tuple[str, ...]


def agent_tables(root: Table, *, is_read: bool) -> list[Table]:
    """The agents' tables, in whichever of the two forms; it is a fault when there is none in a jcard that could be read."""
    one, several = root.table("agent"), root.tables("agents")
    if root.has("agent") and root.has("agents"):
        root.fault("agent", "[agent] and [[agents]] are both there", "use one of the two")
    tables = [one] if root.has("agent") else several
    if is_read and not tables and not root.has("agents"):
        root.fault("agent", "there is no agent: nothing would run", "write an [agent] table; mb init shows one")
    return tables


def read_agents(tables: Sequence[Table], about: Surroundings) -> list[tuple[str, Agent]]:
    """The agents, each with how its table is written; replicas are agents of their own."""
    agents = _name_agents([_read_agent(table, about) for table in tables])
    return [
        (table.name, copy)
        for table, agent in zip(tables, agents, strict=True)
        for copy in _replicate(agent, _read_replicas(table))
    ]


def _read_agent(table: Table, about: Surroundings) -> Agent:
    if table.choice("type", ("sandboxed", "native"), "native") == "sandboxed":
        table.reading.note(_SANDBOXED)
    harness = table.choice("harness", HARNESSES, "claude-code")
    prompt = _read_prompt(table, about.folder)
    env = table.variables("env")
    session = table.text("session")
    known = None if harness == CUSTOM else load_harness(harness)
    agent = Agent(
        name=table.text("name"),
        harness=harness,
        command=_known_command(table, known, prompt, about) if known else _custom_command(table, prompt),
        # A custom agent has its prompt as an argument already.
        prompt=prompt if known else "",
        workdir=table.text("workdir", about.workdir or HOME),
        env=tuple(EnvVar(name, value) for name, value in (dict(known.env if known else ()) | env).items()),
        restart=Restart(table.choice("restart", tuple(Restart), Restart.NO)),
        max_restarts=table.integer("max_restarts", 0),
        timeout_s=_read_timeout(table),
        grace_period_s=table.duration_s("grace_period", 30.0),
        memory_mib=table.size_mib("memory", max(min(AGENT_MEMORY_MIB, about.memory_mib), AGENT_MEMORY_MIB_MIN)),
        pids_max=table.integer("pid_limit", 512),
        session=session,
    )
    if known:
        for note in known.notes(about.image, about.mode, {*about.secrets, *env}):
            table.reading.note(note)
    if agent.restart is Restart.ALWAYS and not agent.max_restarts and not agent.timeout_s:
        table.reading.note(_ENDLESS)
    if packages := table.strings("extra_packages"):
        message = f"{shown(list(packages))}: nothing is installed when a sandbox starts"
        next_step = "add them to an image recipe and name that image as mixtape"
        table.fault("extra_packages", message, next_step, "not_enforceable")
    return agent


def _read_timeout(table: Table) -> float:
    timeout_s = table.duration_s("timeout", 0.0)
    if table.has("timeout", str) and not timeout_s and not table.reading.is_faulty(f"{table.name}.timeout"):
        table.fault("timeout", f"{shown(table.text('timeout'))} is no time to run", "leave it out for no timeout")
    return timeout_s


def _read_prompt(table: Table, folder: Path) -> str:
    prompt = table.text("prompt")
    file = table.expanded("prompt_file")
    if not file:
        return prompt
    if prompt:
        table.fault("prompt_file", "prompt is there too", "use one of the two")
    return read_text(table, "prompt_file", to_path(file, folder))


def _known_command(table: Table, harness: Harness, prompt: str, about: Surroundings) -> tuple[str, ...]:
    if _read_command(table):
        message = f"harness {harness.name} has a command of its own"
        table.fault("command", message, 'leave it out, or use harness = "custom"')
    # With a session there is somebody to ask, at its terminal.
    is_told = bool(prompt or table.text("session"))
    if (
        not is_told
        and not table.reading.is_faulty(f"{table.name}.prompt")
        and not table.reading.is_faulty(f"{table.name}.prompt_file")
    ):
        next_step = "write prompt or prompt_file, or a session to attach to"
        table.fault("prompt", f"harness {harness.name} is not told what to do", next_step)
    return harness.command(prompt, about.secrets)


def _custom_command(table: Table, prompt: str) -> tuple[str, ...]:
    value = _read_command(table)
    if value and prompt:
        table.fault("prompt", "a command of your own takes no prompt", "write the text into command, or into a file")
    if value or table.has("command"):
        return value
    return ("agent", prompt) if prompt else ("agent",)


def _read_command(table: Table) -> tuple[str, ...]:
    if not table.has("command", str):
        return table.strings("command")
    line = table.text("command")
    return ("/bin/sh", "-c", line) if line else ()


def _read_replicas(table: Table) -> int:
    replicas = table.integer("replicas", 1)
    if not 1 <= replicas <= AGENTS_MAX:
        message = f"{replicas} is not between 1 and {AGENTS_MAX}"
        table.fault("replicas", message, "one sandbox has so many agents; use more sandboxes for more")
        replicas = 1
    elif table.boolean("gang", False):
        if replicas > 1:
            table.reading.note(_GANG)
        else:
            table.fault("gang", "true, and there are no replicas", "write replicas, or leave gang out")
    table.finish()
    return replicas


def _replicate(agent: Agent, replicas: int) -> list[Agent]:
    if replicas == 1:
        return [agent]
    return [
        replace(agent, name=f"{agent.name}-{index}", session=agent.session and f"{agent.session}-{index}")
        for index in range(replicas)
    ]


def _name_agents(agents: Sequence[Agent]) -> list[Agent]:
    shares = Counter(agent.harness for agent in agents if not agent.name)
    given: Counter[str] = Counter()
    named: list[Agent] = []
    for agent in agents:
        name = agent.name
        if not name:
            harness = agent.harness
            name = f"{harness}-{given[harness]}" if shares[harness] > 1 else harness
            given[harness] += 1
        named.append(replace(agent, name=name))
    return named
