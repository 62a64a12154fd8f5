"""The command line: what it prints where, what it exits with, and what it does not import."""

import datetime
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from fleet.identity import Role
from mb.cli import cli
from mb.commands.pki_issue import ROLES
from mb.exits import Exit

PROJECT = Path(__file__).parents[3]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["version", "--json"]])
def test_a_fast_verb_loads_nothing_heavy(arguments: list[str]) -> None:
    """`mb --help` feels instant because gRPC, cryptography and asyncio stay unloaded."""
    code = (
        "import sys\nfrom mb.cli import cli\n"
        f"try:\n    cli.main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'grpc', 'cryptography', 'asyncio', 'google', 'structlog', 'fleet.rpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT)
    assert done.returncode == 0, done.stderr


LOADS_ALL_VERBS = """
import sys, click
from mb.cli import cli
def load(group):
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            load(command)
load(cli)
"""


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (LOADS_ALL_VERBS, {"grpc", "cryptography", "google", "structlog"}),
        ("import sys, mb.client, mb.live, mb.diagnosis, mb.console, mb.follow", {"cryptography", "structlog", "rich"}),
    ],
)
def test_what_a_start_does_not_load(code: str, absent: set[str]) -> None:
    """Help and completion of any verb wait for no gRPC, and calls to a scheduler for nothing that only servers need."""
    code += f"\nheavy = {absent!r} & set(sys.modules)\nassert not heavy, heavy\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT)
    assert done.returncode == 0, done.stderr


def verbs(group: click.Group = cli, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every verb there is, with its command."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from verbs(command, f"{path}{name} ")
        else:
            yield path + name, command


VERBS = dict(verbs())
# They print nothing of their own: what a program prints, or a script for the shell.
WITHOUT_JSON = {"exec", "shell", "attach", "completion"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_and_json(verb: str) -> None:
    """Help shows how, and every verb that prints data can print it for programs; all within 80 columns."""
    result = run(*verb.split(), "--help")
    assert result.exit_code == 0
    assert "examples:" in result.output
    assert ("--json" in result.output) is (verb not in WITHOUT_JSON)
    assert [line for line in result.output.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("verb", VERBS)
def test_the_manual_names_every_verb_and_option(verb: str) -> None:
    """docs/cli.md has a row for each verb, and each of its options is in it."""
    manual = (PROJECT / "docs" / "cli.md").read_text().splitlines()
    rows = [line for line in manual if line.startswith("| ") and re.search(rf"`mb {verb}[ `]", line.split(" | ")[0])]
    assert rows, f"mb {verb} has no row"
    options = [option for option in VERBS[verb].params if isinstance(option, click.Option)]
    missing = [
        option.opts
        for option in options
        if not {"--json", "--wait"} & set(option.opts)
        and not any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", rows[0]) for name in option.opts)
    ]
    assert missing == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell: str) -> None:
    """It says to the shell how to ask mb."""
    assert f"_MB_COMPLETE={shell}_complete" in run("completion", shell).output


def test_help_lists_every_exit_code() -> None:
    """Scripts rely on them."""
    output = run("--help").output
    assert all(f"  {code.value}" in output for code in Exit)


def test_init_writes_what_check_accepts(tmp_path: Path) -> None:
    """The first two commands of a newcomer work, in a folder of any name."""
    folder = tmp_path / "__"
    assert run("init", folder).exit_code == 0
    result = run("check", folder, "--json")
    assert result.exit_code == 0, result.output
    spec = json.loads(result.output)["spec"]
    assert (spec["network"]["mode"], spec["sources"][0]["guest_path"]) == ("closed", "/workspace")
    again = run("init", folder)
    assert again.exit_code == Exit.ERROR
    assert "is there already" in again.stderr
    assert max(map(len, (folder / "jcard.toml").read_text().splitlines())) <= 80


def test_check_prints_what_runs(tmp_path: Path) -> None:
    """People read what a jcard becomes before it runs."""
    run("init", tmp_path)
    result = run("check", tmp_path / "jcard.toml")
    for part in ("base:latest", "2 vCPUs, 2 GiB memory", "closed", "/workspace from", "python3 -m unittest"):
        assert part in result.stdout, part


def test_check_tells_every_fault(tmp_path: Path) -> None:
    """On stderr, with next steps, exit 2; the same as JSON."""
    (tmp_path / "jcard.toml").write_text(
        '[agent]\nharness = "custom"\ntimeout = 5\n[[shared]]\nhost = "no"\nguest = "/"'
    )
    result = run("check", tmp_path)
    assert (result.exit_code, result.stdout) == (Exit.INVALID, "")
    for part in ("jcard.toml:", " agent.timeout: ", "  next: ", " [[shared]][0].host:", " [[shared]][0].guest:"):
        assert part in result.stderr, part
    error = json.loads(run("check", tmp_path, "--json").stderr)["error"]
    assert error["code"] == "jcard_invalid"
    assert [fault["field"] for fault in error["faults"]] == [
        "agent.timeout",
        "[[shared]][0].host",
        "[[shared]][0].guest",
    ]


@pytest.mark.parametrize(
    ("content", "exit_code"), [(None, Exit.INVALID), (b"\xff", Exit.INVALID), (b"#" * 2**21, Exit.INVALID)]
)
def test_a_file_that_is_no_jcard(tmp_path: Path, content: bytes | None, exit_code: Exit) -> None:
    """Missing, not text, or far too large."""
    if content is not None:
        (tmp_path / "jcard.toml").write_bytes(content)
    result = run("check", tmp_path)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["check", "--nonsense"],
        ["status"],
        ["up", "--rm", "--detach"],
        ["up", "--id", "X"],
        ["up", "--gang"],
        ["up", "--count", "2", "--rm"],
        ["up", "--count", "0"],
        ["--nonsense"],
    ],
)
def test_a_wrong_command_line(arguments: list[str]) -> None:
    """Exit 2 and where to read on; as JSON when asked for."""
    result = run(*arguments)
    assert result.exit_code == Exit.INVALID
    assert "--help" in result.stderr
    error = json.loads(run(*arguments, "--json").stderr)["error"]
    assert error["code"] == "usage_invalid"


def test_no_arguments_print_help() -> None:
    """Typing `mb` shows what there is."""
    result = run()
    assert result.exit_code == Exit.INVALID
    assert "Commands:" in result.output


def write_config(folder: Path, **changes: str) -> Path:
    fields = {"scheduler": '"127.0.0.1:1"', "ca": '"ca.crt"', **changes}
    file = folder / "mb.toml"
    file.write_text(
        f"scheduler = {fields['scheduler']}\n[tls]\nca = {fields['ca']}\ncertificate = 'lab.crt'\nkey = 'lab.key'\n"
    )
    return file


def test_a_scheduler_that_is_not_there(tmp_path: Path) -> None:
    """Unreachable is told apart from refused: a script may try again."""
    run("pki", "init", tmp_path)
    run("pki", "issue", tmp_path, "--role", "tenant", "lab")
    result = run("--config", write_config(tmp_path), "ls")
    assert result.exit_code == Exit.UNREACHABLE
    assert "127.0.0.1:1" in result.stderr


@pytest.mark.parametrize(
    ("changes", "exit_code", "text"),
    [
        ({"scheduler": '"nowhere"'}, Exit.INVALID, "scheduler"),
        ({"scheduler": "7"}, Exit.INVALID, "scheduler"),
        ({"ca": '"missing.crt"'}, Exit.INVALID, "missing.crt"),
    ],
)
def test_a_configuration_that_is_wrong(tmp_path: Path, changes: dict[str, str], exit_code: Exit, text: str) -> None:
    """Names the field or the file."""
    result = run("--config", write_config(tmp_path, **changes), "ls")
    assert result.exit_code == exit_code
    assert text in result.stderr


def test_what_the_system_refuses_is_told() -> None:
    """No verb ends in a traceback because a disk is full."""
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "mb", "version"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=PROJECT)
    assert done.returncode == Exit.ERROR
    assert "error: [Errno 28] No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_configuration_is_found_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$BEDPLATE_CONFIG, else the user's own; when there is none, it is said how to get one."""
    monkeypatch.setenv("BEDPLATE_CONFIG", str(tmp_path / "other.toml"))
    assert "other.toml" in run("ls").stderr
    monkeypatch.delenv("BEDPLATE_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run("ls")
    assert str(tmp_path / ".config" / "bedplate" / "mb.toml") in result.stderr
    assert "docs/cli.md" in result.stderr


def test_roles_are_those_of_certificates() -> None:
    """`pki issue` offers every role, without importing cryptography for its help."""
    assert tuple(Role) == ROLES


def test_keys_are_private_and_never_replaced_unasked(tmp_path: Path) -> None:
    """0600, whatever the umask; a second run refuses, --force replaces."""
    before = os.umask(0)
    try:
        assert run("pki", "init", tmp_path).exit_code == 0
        assert run("pki", "issue", tmp_path, "--role", "host", "rack1", "--address", "10.0.0.7").exit_code == 0
    finally:
        os.umask(before)
    assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600 for name in ("ca.key", "rack1.key"))
    key = (tmp_path / "rack1.key").read_bytes()
    again = run("pki", "issue", tmp_path, "--role", "host", "rack1")
    assert again.exit_code == Exit.ERROR
    assert (tmp_path / "rack1.key").read_bytes() == key
    assert run("pki", "init", tmp_path).exit_code == Exit.ERROR
    assert run("pki", "issue", tmp_path, "--role", "host", "rack1", "--force").exit_code == 0
    assert (tmp_path / "rack1.key").read_bytes() != key


def test_a_certificate_can_be_read(tmp_path: Path) -> None:
    """Role, name, what it serves, and until when."""
    run("pki", "init", tmp_path)
    run("pki", "issue", tmp_path, "--role", "scheduler", "one", "--address", "10.0.0.5")
    shown = json.loads(run("pki", "show", tmp_path / "one.crt", "--json").stdout)
    assert (shown["role"], shown["name"]) == ("scheduler", "one")
    assert {"10.0.0.5", "scheduler.bedplate"} <= set(shown["serves"])
    assert "scheduler" in run("pki", "show", tmp_path / "one.crt").stdout
    assert "none" in run("pki", "show", tmp_path / "ca.crt").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["Bad Name"], "Bad Name"),
        (["ca"], "authority"),
        (["one", "--address", "nowhere"], "nowhere"),
    ],
)
def test_a_certificate_that_cannot_be_issued(tmp_path: Path, arguments: list[str], text: str) -> None:
    """Wrong names and addresses are refused, and nothing may take the authority's own files."""
    run("pki", "init", tmp_path)
    result = run("pki", "issue", tmp_path, "--role", "tenant", *arguments)
    assert result.exit_code == Exit.INVALID
    assert text in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"ca.crt", "ca.key"}


def test_pki_errors_name_the_file(tmp_path: Path) -> None:
    """No authority, no certificate, not a certificate."""
    assert "pki init" in run("pki", "issue", tmp_path, "--role", "tenant", "lab").stderr
    assert run("pki", "show", tmp_path / "none.crt").exit_code == Exit.ERROR
    (tmp_path / "text.crt").write_text("hello")
    assert run("pki", "show", tmp_path / "text.crt").exit_code == Exit.INVALID


def test_the_example_becomes_a_spec() -> None:
    """The jcard that newcomers run first is a good one."""
    spec = json.loads(run("check", PROJECT / "examples" / "fix-tests", "--json").stdout)["spec"]
    assert (spec["name"], spec["network"]["mode"], spec["agents"][0]["timeout_s"]) == ("fix-tests", "closed", 300)


def test_the_example_agent_repairs_its_project(tmp_path: Path) -> None:
    """It ends with passing tests and exit 0, and with 1 where it knows no repair."""
    for file in (PROJECT / "examples" / "fix-tests").glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    agent = [sys.executable, "agent.py"]
    done = subprocess.run(agent, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("OK")
    assert "subtotal(prices) >= FREE_SHIPPING_FROM" in (tmp_path / "basket.py").read_text()
    (tmp_path / "basket.py").write_text("def total(prices):\n    return 7\n")
    done = subprocess.run(agent, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (tmp_path / "basket.py").read_text() == "def total(prices):\n    return 7\n"


def test_a_certificate_lives_as_long_as_was_said(tmp_path: Path) -> None:
    """`--days`, within ten years; without it a year."""
    assert run("pki", "init", tmp_path).exit_code == 0
    for days, name in ((1, "short"), (365, "usual")):
        option = ("--days", str(days)) if days == 1 else ()
        assert run("pki", "issue", tmp_path, "--role", "tenant", name, *option).exit_code == 0
        shown = json.loads(run("pki", "show", tmp_path / f"{name}.crt", "--json").stdout)
        begins, ends = (datetime.datetime.fromisoformat(shown[key]) for key in ("from", "until"))
        assert (ends - begins).days == days
    assert run("pki", "issue", tmp_path, "--role", "tenant", "odd", "--days", "0").exit_code == Exit.INVALID
    assert run("pki", "issue", tmp_path, "--role", "tenant", "odd", "--days", "3651").exit_code == Exit.INVALID


def test_certificates_are_withdrawn_offline(tmp_path: Path) -> None:
    """By name or serial into one signed list, each once; what is neither is told, and a damaged list is not built upon."""
    assert run("pki", "init", tmp_path).exit_code == 0
    assert run("pki", "issue", tmp_path, "--role", "tenant", "lab").exit_code == 0
    serial = json.loads(run("pki", "show", tmp_path / "lab.crt", "--json").stdout)["serial"]
    for arguments, entries in (
        (("lab",), 1),
        (("--serial", serial.upper()), 1),
        (("--serial", "3fa9"), 2),
    ):
        done = json.loads(run("pki", "revoke", tmp_path, *arguments, "--json").stdout)
        assert done["entries"] == entries
    for arguments, code in (((), Exit.INVALID), (("lab", "--serial", "1"), Exit.INVALID), (("gone",), Exit.ERROR)):
        assert run("pki", "revoke", tmp_path, *arguments).exit_code == code
    assert run("pki", "revoke", tmp_path, "--serial", "xyz").exit_code == Exit.INVALID
    assert run("pki", "revoke", tmp_path, "ca").exit_code == Exit.INVALID
    (tmp_path / "ca.crl").write_text("noise")
    assert run("pki", "revoke", tmp_path, "lab").exit_code == Exit.INVALID
    assert (tmp_path / "ca.crl").read_text() == "noise"
