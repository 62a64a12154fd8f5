"""Harnesses: data files that say how a prompt becomes a command, and what stands in the way of one."""

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.model.admission import CUSTOM, HARNESSES, is_secret_name
from fleet.model.sandbox import NetworkMode
from mb.jcard.harness import load_harness
from mb.jcard.parse import parse_jcard

PROJECT = Path(__file__).parents[3]
KNOWN = [name for name in HARNESSES if name != CUSTOM]


@pytest.mark.parametrize("name", KNOWN)
def test_every_harness_has_a_file(name: str) -> None:
    """Each name that admission knows has its program, its arguments, its key and its destinations."""
    harness = load_harness(name)
    assert harness.command("do it", ())[0] == harness.program
    assert sum(word.count("do it") for word in harness.command("do it", ())) == 1
    assert not any("{" in word for word in harness.command("", ()))
    assert all(map(is_secret_name, harness.keys))
    assert harness.keys
    assert harness.destinations


def test_there_is_no_file_without_its_name() -> None:
    """A file for a harness that admission refuses would be dead."""
    assert {path.stem for path in (PROJECT / "mb" / "harnesses").glob("*.toml")} == set(KNOWN)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("claude-code", ("claude", "--print", "--dangerously-skip-permissions", "--", "--mend it")),
        ("opencode", ("opencode", "run", "--auto", "--", "--mend it")),
        ("gemini-cli", ("gemini", "--approval-mode=yolo", "--skip-trust", "--prompt=--mend it")),
        (
            "codex",
            (
                "codex",
                "exec",
                "--dangerously-bypass-approvals-and-sandbox",
                "--skip-git-repo-check",
                "--",
                "--mend it",
            ),
        ),
    ],
)
def test_a_prompt_becomes_a_command(name: str, command: tuple[str, ...]) -> None:
    """A prompt is one argument, also one that looks like an option; the spec keeps harness and prompt beside the command."""
    jcard = parse_jcard(f'[agent]\nharness = "{name}"\nprompt = "--mend it"', Path("/work/x"), {})
    (agent,) = jcard.spec.agents
    assert (agent.harness, agent.prompt, agent.command) == (name, "--mend it", command)
    assert jcard.faults == ()


def test_with_a_session_a_prompt_may_be_left_to_the_terminal() -> None:
    """Somebody who attaches can say what to do."""
    (agent,) = parse_jcard('[agent]\nsession = "main"', Path("/work/x"), {}).spec.agents
    assert agent.command == ("claude", "--dangerously-skip-permissions")


def test_the_environment_of_a_harness_gives_way() -> None:
    """What the user writes wins over what the harness brings."""
    text = '[agent]\nharness = "opencode"\nprompt = "x"\nenv = { OPENCODE_DISABLE_AUTOUPDATE = "0", A = "b" }'
    (agent,) = parse_jcard(text, Path("/work/x"), {}).spec.agents
    assert {variable.name: variable.value for variable in agent.env} == {"OPENCODE_DISABLE_AUTOUPDATE": "0", "A": "b"}


def test_a_key_reaches_the_program_and_nothing_else(tmp_path: Path) -> None:
    """The command reads its key out of the secret's file when it runs; the spec's texts hold its name only."""
    text = '[agent]\nharness = "codex"\nprompt = "do it"\n[secrets]\nCODEX_API_KEY = "sk-1"\nOTHER = "sk-2"'
    jcard = parse_jcard(text, Path("/work/x"), {})
    command = jcard.spec.agents[0].command
    assert "sk-" not in repr(jcard)
    assert not any("OTHER" in word for word in command)
    (tmp_path / "CODEX_API_KEY").write_text("sk-1\n")
    program = tmp_path / "codex"
    program.write_text('#!/bin/sh\necho "$CODEX_API_KEY"\nulimit -c\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    here = [word.replace("/run/secrets", str(tmp_path)) for word in command]
    done = subprocess.run(here, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    flags = ["exec", "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check", "--"]
    assert done.stdout.splitlines() == ["sk-1", "0", *flags, "do it"]
    (tmp_path / "CODEX_API_KEY").unlink()
    assert subprocess.run(here, env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=False).returncode == 126


def test_what_stands_in_the_way_is_noted() -> None:
    """Image, network and key are told before anything runs; what is there is not noted."""
    harness = load_harness("gemini-cli")
    notes = harness.notes("base:latest", NetworkMode.CLOSED, ())
    assert ["program gemini" in notes[0], "generativelanguage" in notes[1], "GEMINI_API_KEY" in notes[2]] == [True] * 3
    ready = replace(harness, images=("tools:1",))
    assert ready.notes("tools:1", NetworkMode.ALLOW, ("GEMINI_API_KEY",)) == ()


def test_an_installed_mb_has_its_harnesses(tmp_path: Path) -> None:
    """The data files travel in the wheel."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=PROJECT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"mb/harnesses/{name}.toml" for name in KNOWN} <= set(names)
