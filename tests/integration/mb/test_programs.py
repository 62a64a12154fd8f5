"""exec, shell and attach as processes of their own: streams, terminals, signals and exit codes, over a real call."""

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from fleet.model.sandbox import Agent, Phase
from mb.exits import Exit
from tests.integration.mb.desk import Desk
from tests.integration.mb.parts import Mb, end_of
from tests.unit.mb.build import sandbox

NAME = "fix-tests"
# Says that it is ready, then waits to be told.
WAITING = "trap 'echo got; exit 7' {signal}; echo ready; while :; do sleep 1 & wait $!; done"


@pytest.fixture(autouse=True)
def running(desk: Desk) -> None:
    """One sandbox runs."""
    desk.put(sandbox(phase=Phase.RUNNING))


async def test_streams_stay_apart_and_the_exit_code_is_the_programs(line: Mb) -> None:
    """stdout and stderr are two, byte for byte, and mb ends as the program did."""
    ended = await line.run("exec", NAME, "--", "sh", "-c", "printf 'out\\377'; printf err >&2; exit 3")
    assert (ended.code, ended.stdout, ended.stderr) == (3, "out\udcff", "err")


async def test_input_is_passed_on_to_its_end(line: Mb) -> None:
    """A pipe goes in whole, larger than every buffer on the way, and its end is told."""
    content = b"0123456789abcdef" * 200_000
    ended = await line.run("exec", NAME, "--", "sha256sum", stdin=content)
    once = await line.run("exec", NAME, "--", "cat", stdin=content)
    assert (ended.code, len(once.stdout)) == (0, len(content))
    assert once.stdout == content.decode()


async def test_input_that_cannot_be_read_has_an_end(line: Mb) -> None:
    """A program that waits for the end of its input gets it, also where mb's own cannot be read."""
    # Address 0 is mapped in no process, so a read at the beginning is an error.
    unreadable = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        ended = await end_of(await line.start("exec", NAME, "--", "cat", stdin=unreadable))
    finally:
        os.close(unreadable)
    assert (ended.code, ended.stdout) == (0, "")


async def test_what_is_asked_for_arrives(line: Mb, desk: Desk, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """User, environment, folder and every word of the command, dashes too."""
    words = ["-e", "A=1 2", "-e", "PATH", "-w", str(tmp_path), "--user", "root"]
    ended = await line.run("exec", NAME, *words, "--", "sh", "-c", 'echo "$A"; pwd; echo "$@"', "sh", "--json", "-x")
    assert ended.stdout == f"1 2\n{tmp_path}\n--json -x\n"
    assert desk.opened[0].user == "root"


async def test_a_signal_that_ended_it(line: Mb) -> None:
    """128 and the signal, as shells have it."""
    assert (await line.run("exec", NAME, "--", "sh", "-c", "kill -9 $$")).code == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
async def test_signals_are_passed_on(line: Mb, number: signal.Signals) -> None:
    """What interrupts mb interrupts the program, which decides."""
    script = WAITING.format(signal=number.name.removeprefix("SIG"))
    process = await line.start("exec", NAME, "--", "sh", "-c", script)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    ended = await end_of(process)
    assert (ended.code, ended.stdout) == (7, "got\n")


async def test_a_program_that_ignores_ctrl_c_is_let_go(line: Mb, desk: Desk) -> None:
    """The third time mb leaves, and the program does not stay behind."""
    process = await line.start(
        "exec", NAME, "--", "sh", "-c", "trap 'echo no' INT; echo ready; while :; do sleep 1; done"
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert await process.stdout.readline() == b"no\n"
    process.send_signal(signal.SIGINT)
    assert (await end_of(process)).code == Exit.INTERRUPTED
    await desk.until(lambda: not desk.running)


async def test_own_errors_have_a_code_of_their_own(line: Mb, desk: Desk) -> None:
    """125, so that a program's 1, 2 or 4 is never mistaken for mb's; what cannot be run is 127 with its reason."""
    assert (await line.run("exec", "nobody", "--", "true")).code == Exit.OWN_ERROR
    assert (await line.run("exec", NAME)).code == Exit.OWN_ERROR
    bad = await line.run("exec", NAME, "-e", "1=2", "--", "true")
    assert (bad.code, "--env" in bad.stderr) == (Exit.OWN_ERROR, True)
    missing = await line.run("exec", NAME, "--", "/no/such")
    assert missing.code == 127
    assert "/no/such" in missing.stderr
    desk.put(sandbox(phase=Phase.COMPLETED))
    refused = await line.run("exec", NAME, "--", "true")
    assert refused.code == Exit.OWN_ERROR
    assert "next: see mb status" in refused.stderr


async def test_a_reader_who_has_enough(line: Mb, desk: Desk) -> None:
    """`mb exec ... | head` ends quietly, and so does the program."""
    process = await line.start("exec", NAME, "--", "yes")
    assert process.stdout is not None
    await process.stdout.readexactly(10)
    process.stdout._transport.close()  # type: ignore[attr-defined]
    ended = await end_of(process)
    assert (ended.code, ended.stderr) == (128 + signal.SIGPIPE, "")
    await desk.until(lambda: not desk.running)


async def test_a_terminal_passes_keys_and_ctrl_c(line: Mb) -> None:
    """Ctrl-C reaches the program, not mb; afterwards the terminal is as it was."""
    terminal = await line.start_on_terminal("exec", NAME, "-it", "--", "bash", "--norc", "--noprofile")
    terminal.type(b"stty size; tty; echo $TERM\r")
    await terminal.shows(b"24 80")
    await terminal.shows(b"/dev/pts/")
    await terminal.shows(b"xterm")
    # The program says it, not the shell: between the shell's word and the program's start, Ctrl-C is the shell's own.
    terminal.type(b"sh -c \"echo slee''ping; exec sleep 1000\"\r")
    await terminal.shows(b"sleeping")
    terminal.type(b"\x03")
    terminal.type(b"echo code $?; exit 9\r")
    await terminal.shows(b"code 130")
    assert await terminal.end() == 9


async def test_a_new_window_size_is_told(line: Mb) -> None:
    """The program's terminal has the size of the user's window, also after that changed."""
    script = "trap 'stty size; exit 0' WINCH; echo armed; while :; do sleep 1000 & wait $!; done"
    terminal = await line.start_on_terminal("exec", NAME, "-t", "--", "sh", "-c", script)
    await terminal.shows(b"armed")
    terminal.resize(50, 120)
    await terminal.shows(b"50 120")
    assert await terminal.end() == 0


async def test_a_terminal_is_let_go_of(line: Mb, desk: Desk) -> None:
    """Enter ~ . leaves a program that no longer answers, and ends it."""
    terminal = await line.start_on_terminal("exec", NAME, "-it", "--", "sh", "-c", "trap '' INT; echo up; sleep 1000")
    await terminal.shows(b"up")
    terminal.type(b"\r~.")
    await terminal.shows(b"let go")
    assert await terminal.end() == Exit.INTERRUPTED
    await desk.until(lambda: not desk.running)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_terminal_is_restored_when_mb_is_ended(line: Mb, number: signal.Signals) -> None:
    """Whoever ends mb leaves a usable terminal."""
    terminal = await line.start_on_terminal("exec", NAME, "-t", "--", "sh", "-c", "echo up; sleep 1000")
    await terminal.shows(b"up")
    terminal.process.send_signal(number)
    assert await terminal.end() == Exit.INTERRUPTED


async def test_without_a_terminal_the_screen_is_safe(line: Mb) -> None:
    """Escape sequences of a guest do not reach a terminal that was not given to it."""
    terminal = await line.start_on_terminal("exec", NAME, "--", "printf", "\\033[2Jx\\n")
    await terminal.shows(b"\\x1b[2Jx")
    assert await terminal.end() == 0


async def test_a_shell_reads_a_script(line: Mb) -> None:
    """Without a terminal the shell takes a script from its input."""
    ended = await line.run("shell", NAME, stdin=b"echo hello; exit 4\n")
    assert (ended.code, ended.stdout.endswith("hello\n")) == (4, True)


async def test_a_shell_on_a_terminal(line: Mb) -> None:
    """With a terminal it is a login shell on it."""
    terminal = await line.start_on_terminal("shell", NAME)
    terminal.type(b"shopt -q login_shell && test -t 0 && echo log''in; exit\r")
    await terminal.shows(b"login\r\n")
    assert await terminal.end() == 0


async def test_attach_joins_the_agents_session(line: Mb, desk: Desk) -> None:
    """The command is tmux on the guest's socket, with the session's exact name; without a terminal it is refused."""
    spec = replace(desk.find(NAME).spec, agents=(Agent("fixer", "custom", ("run",), session="fixer"),))
    desk.put(sandbox(phase=Phase.RUNNING, spec=spec))
    refused = await line.run("attach", NAME)
    assert refused.code == Exit.OWN_ERROR
    assert f"mb logs {NAME} fixer --follow" in " ".join(refused.stderr.split())
    terminal = await line.start_on_terminal("attach", NAME)
    await desk.until(lambda: desk.opened)
    assert list(desk.opened[0].command) == ["tmux", "-S", "/run/bedplate/tmux", "attach-session", "-t", "=fixer"]
    assert (desk.opened[0].terminal.columns, desk.opened[0].term) == (80, "xterm")
    await terminal.end()


async def test_attach_without_a_session_follows(line: Mb, desk: Desk) -> None:
    """Output, read-only, and what would give it a terminal."""
    process = await line.start("attach", NAME, "fixer")
    desk.print("fixer", b"working\n")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"working\n"
    desk.print("fixer", b"done\n", end=True)
    ended = await end_of(process)
    assert (ended.code, ended.stdout) == (0, "done\n")
    assert "has no session" in ended.stderr
    assert (await line.run("attach", NAME, "other")).code == Exit.OWN_ERROR


async def test_many_at_once(line: Mb) -> None:
    """Calls do not disturb each other."""
    ends = await asyncio.gather(*(line.run("exec", NAME, "--", "echo", str(number)) for number in range(6)))
    assert [ended.stdout for ended in ends] == [f"{number}\n" for number in range(6)]
