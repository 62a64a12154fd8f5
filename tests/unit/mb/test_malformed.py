"""Malformed jcards: each error names the file, the field, the value and what would be right; never a traceback."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from mb.cli import cli
from mb.exits import Exit
from mb.render.text import WIDTH

AGENT = '[agent]\nharness = "custom"\ncommand = "true"\n'
NEXT = '[[agents]]\nharness = "custom"\ncommand = "true"\n'


@dataclass(frozen=True)
class Case:
    """A jcard, and what `mb check` has to say of it: where, what was found there, and what to write."""

    text: str
    field: str
    value: str
    expectation: str


CASES = [
    Case("name = [", "this is not TOML", "end of document", "mend the syntax"),
    Case('name = "a"\nname = "b"\n' + AGENT, "this is not TOML", "line 2", "mend the syntax"),
    Case('nmae = "x"\n' + AGENT, "nmae", "not known", "did you mean name?"),
    Case(AGENT + 'colour = "red"', "agent.colour", "not known", "known here: command"),
    Case(AGENT + "[resources]\ncpu = 2", "resources.cpu", "not known", "did you mean cpus?"),
    Case(AGENT + '[netwrok]\nmode = "none"', "netwrok", "not known", "did you mean network?"),
    Case('name = "My Run"\n' + AGENT, "name", "'My Run'", 'name = "my-run"'),
    Case("name = 7\n" + AGENT, "name", "7", "a string"),
    Case('mixtape = "A b"\n' + AGENT, "mixtape", "'A b:latest'", "base:latest"),
    Case('mixtape_digest = "sha256:12"\n' + AGENT, "mixtape_digest", "'sha256:12'", "64 hex digits"),
    Case(AGENT + '[resources]\ncpus = "2"', "resources.cpus", "'2'", "a whole number"),
    Case(AGENT + "[resources]\ncpus = 300", "resources.cpus", "300", "255"),
    Case(AGENT + "[resources]\ncpus = 0xffffffffffffffffffff", "resources.cpus", "12089258196", "a smaller one"),
    Case(AGENT + '[resources]\nmemory = "4GB"', "resources.memory", "'4GB'", '"4GiB"'),
    Case(AGENT + '[resources]\nmemory = "1MiB"', "resources.memory", "1 is not", "256"),
    Case(AGENT + "[resources]\ndisk = 20", "resources.disk", "20", '"4GiB"'),
    Case(AGENT + "[resources]\ngpus = 17", "resources.gpus", "17 is not", "in that range"),
    Case(AGENT + "[resources]\ngpu_fraction = 0.5", "resources.gpu_fraction", "gpus is 0", "ask for GPUs"),
    Case(AGENT + "[placement]\npriority = 1001", "placement.priority", "1001 is not", "in that range"),
    Case(AGENT + '[placement]\nparent = "far"', "placement.parent", "'far'", "any, near, away"),
    Case(AGENT + '[placement]\ngroup = "a"', "placement.group_size", "0 is not", "in that range"),
    Case("resources = 4\n" + AGENT, "resources", "4", "a table"),
    Case(AGENT + '[network]\nmode = "open"', "network.mode", "'open'", "none, closed"),
    Case(AGENT + '[network]\nmode = "nat"', "network.mode", "nat would mean", "use closed or none"),
    Case(AGENT + '[network]\nmode = "bridged"', "network.mode", "bridged needs a host whose policy", "use closed"),
    Case(AGENT + '[network]\negress_allow = ["a.example"]', "network.egress_allow", "destinations", "leave it empty"),
    Case(AGENT + "[network]\nforwards = [{ host = 1, guest = 2 }]", "network.forwards", "ports", "leave it empty"),
    Case(AGENT + '[[shared]]\nguest = "/workspace"', "[[shared]][0].host", "missing", 'host = "."'),
    Case(AGENT + '[[shared]]\nhost = "."\nguest = "/etc"', "[[shared]][0].guest", "/etc", "/workspace"),
    Case(AGENT + '[[shared]]\nhost = "."\nguest = "w"', "[[shared]][0].guest", "'w'", "/workspace"),
    Case(AGENT + '[[shared]]\nhost = "nowhere"\nguest = "/w"', "[[shared]][0].host", "nowhere", "name a folder"),
    Case(AGENT + '[[shared]]\nhost = "${NOWHERE_AT_ALL}"\nguest = "/w"', "[[shared]][0].host", "NOWHERE", "export"),
    Case("shared = [1]\n" + AGENT, "[[shared]][0]", "1", "[[shared]]"),
    Case(AGENT + '[secrets]\ntoken = "hush-hush"', "secrets.token", "'token'", "A-Z, 0-9 and _"),
    Case(AGENT + '[secrets]\nTOKEN = "${NOWHERE_AT_ALL}"', "secrets.TOKEN", "NOWHERE_AT_ALL", "export"),
    Case(AGENT + '[secrets]\nTOKEN = ""', "secrets.TOKEN", "empty", "write a value"),
    Case(AGENT + "[secrets]\nTOKEN = 5", "secrets.TOKEN", "this value", "a string"),
    Case(AGENT + '[requires]\nzone = "rack 1!"', "requires.zone", "'zone'", "letters, digits"),
    Case('name = "x"', "agent", "nothing would run", "[agent] table"),
    Case("agents = []", "agent", "no agent", "at least one"),
    Case(AGENT + "[[agents]]", "agent", "[agent] and [[agents]]", "use one of the two"),
    Case("[[agent]]", "agent", "[{}]", "a table"),
    Case('[agent]\nharness = "mine"', "agent.harness", "'mine'", "claude-code, opencode"),
    Case('[agent]\nharness = "codex"', "agent.prompt", "codex", "prompt_file"),
    Case('[agent]\nprompt = "x"\ncommand = "x"', "agent.command", "claude-code", 'harness = "custom"'),
    Case('[agent]\nharness = "custom"\ncommand = ["a", 1]', "agent.command[1]", "1", "quotes"),
    Case('[agent]\nharness = "custom"\ncommand = ""', "agent.command", "no program", "a shell line"),
    Case(AGENT + 'prompt = "do it"', "agent.prompt", "takes no prompt", "into command"),
    Case(AGENT + 'prompt_file = "no.md"', "agent.prompt_file", "no.md", "readable text file"),
    Case(AGENT + 'type = "container"', "agent.type", "'container'", "sandboxed, native"),
    Case(AGENT + 'workdir = "here"', "agent.workdir", "'here'", "/workspace"),
    Case(AGENT + 'restart = "sometimes"', "agent.restart", "'sometimes'", "no, on-failure, always"),
    Case(AGENT + "max_restarts = 3", "agent.max_restarts", "3, and nothing", '"on-failure"'),
    Case(AGENT + 'restart = "always"\nmax_restarts = -1', "agent.max_restarts", "-1", "range"),
    Case(AGENT + "timeout = 5", "agent.timeout", "5", '"30s"'),
    Case(AGENT + 'timeout = "5 minutes"', "agent.timeout", "'5 minutes'", '"1m30s"'),
    Case(AGENT + 'timeout = "0s"', "agent.timeout", "'0s'", "leave it out"),
    Case(AGENT + 'grace_period = "1h"', "agent.grace_period", "3600", "600"),
    Case(AGENT + 'session = "a.b"', "agent.session", "'a.b'", "letters, digits"),
    Case(NEXT + 'session = "a"\n' + NEXT + 'session = "a"', "[[agents]]", "same session", "of its own"),
    Case(NEXT + 'name = "a"\n' + NEXT + 'name = "a"', "[[agents]]", "same name", "of its own"),
    Case(AGENT + 'extra_packages = ["vim"]', "agent.extra_packages", "'vim'", "image recipe"),
    Case(AGENT + "replicas = 17", "agent.replicas", "17", "16"),
    Case(AGENT + "gang = true", "agent.gang", "true", "write replicas"),
    Case(AGENT + 'memory = "5GiB"', "agent.memory", "5120", "give the agent less"),
    Case(AGENT + "pid_limit = 1", "agent.pid_limit", "1 is not", "4"),
    Case(AGENT + 'env = { "A B" = "x" }', "agent.env.A B", "'A B'", "letters, digits and _"),
    Case(AGENT + 'env = { A = "${}" }', "agent.env.A", "'${}'", "${NAME}"),
    Case(AGENT + "env = { A = 1 }", "agent.env.A", "1", "a string"),
    Case(NEXT * 17, "[[agents]]", "17", "16"),
    Case(NEXT + NEXT + "timeout = 3", "[[agents]][1].timeout", "3", '"30s"'),
    Case(AGENT + f'env = {{ A = "{"x" * 12_000}" }}', "agent", "10 KiB", "a file of the source"),
]


def test_there_are_enough() -> None:
    """What a user may get wrong is more than a handful."""
    assert len(CASES) >= 30


@pytest.mark.parametrize("case", CASES, ids=[f"{index}-{case.field}" for index, case in enumerate(CASES)])
def test_a_malformed_jcard(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mb check` exits with 2 and says file, field, value and expectation, within the width of a terminal."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jcard.toml").write_text(case.text)
    result = CliRunner().invoke(cli, ["check"])
    assert (result.exit_code, result.stdout) == (Exit.INVALID, "")
    told = " ".join(result.stderr.split())
    start = f"error: jcard.toml: {case.field}: "
    assert start in told, told
    about = told.split(start)[1].split("error: ")[0]
    assert case.value in about
    assert case.expectation in about
    assert "  next: " in result.stderr
    assert "hush-hush" not in told
    assert [line for line in result.stderr.splitlines() if len(line) > WIDTH] == []


@pytest.mark.parametrize("case", CASES[::20], ids=[case.field for case in CASES[::20]])
def test_as_users_run_it(case: Case, tmp_path: Path) -> None:
    """The same from outside: the program itself, without a traceback."""
    (tmp_path / "jcard.toml").write_text(case.text)
    done = subprocess.run(
        [sys.executable, "-m", "mb", "check"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (Exit.INVALID, "")
    assert f"jcard.toml: {case.field}" in done.stderr
    assert "Traceback" not in done.stderr
