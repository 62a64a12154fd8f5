"""People in a running sandbox: a shell on a terminal, programs with their streams and exit codes, files in and out."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.operate import Tenant
from tests.e2e.terminal import on_terminal

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

IDLE = ["sh", "-c", "echo begun; exec sleep 3600"]


def test_a_shell_answers_a_resize_and_ctrl_c(tenant: Tenant) -> None:
    """`mb shell` is a terminal: it has the window's size and follows it, Ctrl-C ends what runs and not the shell, and the shell's
    exit code is mb's."""
    tenant.up(tenant.write_project("desk", IDLE))
    with on_terminal(tenant.command("shell", "desk"), tenant.env(), columns=90, rows=30) as terminal:
        terminal.press("PS1='ready''> '\n")
        terminal.until("ready> ")
        terminal.press("stty size\n")
        terminal.until("30 90")
        terminal.resize(132, 43)
        terminal.until("ready> ")
        terminal.press("stty size\n")
        terminal.until("43 132")
        # A child of its own: one that a shell has forked and not yet let go of may miss the signal.
        terminal.press("sh -c \"echo sleep''s; exec sleep 1000\"\n")
        terminal.until("sleeps")
        terminal.press("\x03")
        terminal.press("echo code=$?\n")
        terminal.until("code=130")
        terminal.press("exit 7\n")
        assert terminal.wait() == 7
    tenant.destroy("desk")


def test_programs_have_streams_and_exit_codes(tenant: Tenant) -> None:
    """`mb exec`: stdin goes in byte for byte, stdout and stderr come out apart, exit codes are the program's, as agent or root."""
    tenant.up(tenant.write_project("runs", IDLE))
    text = "".join(f"line {number}\n" for number in range(20_000))
    assert tenant.run("exec", "-i", "runs", "--", "cat", given=text).out == text
    done = tenant.run("exec", "runs", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.code, done.out, done.err) == (3, "out\n", "err\n")
    assert tenant.run("exec", "runs", "--", "sh", "-c", "kill -TERM $$").code == 128 + 15
    missing = tenant.run("exec", "runs", "--", "no-such-program")
    assert (missing.code, "no-such-program" in missing.err) == (127, True), missing
    assert tenant.run("exec", "runs", "--", "id", "-u").out == "1001\n"
    assert tenant.run("exec", "--user", "root", "runs", "--", "id", "-u").out == "0\n"
    shown = tenant.run("exec", "-e", "GREETING=hi", "-w", "/tmp", "runs", "--", "sh", "-c", "echo $GREETING; pwd")
    assert shown.out == "hi\n/tmp\n"
    tenant.destroy("runs")


def test_files_go_in_and_come_out(tenant: Tenant, tmp_path: Path) -> None:
    """`mb cp` of a folder into a sandbox and out again gives the same files, names, contents and x bits."""
    tenant.up(tenant.write_project("copies", IDLE))
    there = tmp_path / "there"
    (there / "deep" / "er").mkdir(parents=True)
    (there / "random").write_bytes(os.urandom(3_000_000))
    (there / "deep" / "er" / "ünïcode name").write_text("text\n")
    (there / "run").write_text("#!/bin/sh\n")
    (there / "run").chmod(0o755)
    assert tenant.run("cp", str(there), "copies:/tmp/").code == 0
    back = tmp_path / "back"
    done = tenant.run("cp", "copies:/tmp/there", str(back))
    assert done.code == 0, done
    compared = subprocess.run(["diff", "-r", there, back], capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stdout
    assert (back / "run").stat().st_mode & 0o111
    evil = "cd /tmp && mkdir -p evil && ln -s / evil/link && echo x >evil/fine"
    assert tenant.run("exec", "copies", "--", "sh", "-c", evil).code == 0
    tenant.run("cp", "copies:/tmp/evil", str(tmp_path / "evil"))
    assert not (tmp_path / "evil" / "link" / "etc").exists()
    tenant.destroy("copies")


def test_logs_by_time_and_tail_and_events(tenant: Tenant) -> None:
    """`mb logs --tail` prints the last lines, `--since` what came after, and `mb events` tells the whole life in order."""
    folder = tenant.write_project("told", ["sh", "-c", "seq 1 50; sleep 3; echo late"])
    assert tenant.run("up", str(folder)).code == 0
    assert tenant.run("logs", "told", "--tail", "3").out == "49\n50\nlate\n"
    assert tenant.run("logs", "told", "--since", "1h").out.endswith("50\nlate\n")
    events = tenant.run("events", "told", "--json")
    kinds = [line for line in events.out.splitlines() if line]
    assert events.code == 0, events
    joined = " ".join(kinds)
    for kind in ("sandbox.created", "sandbox.assigned", "agent.phase_changed", "sandbox.phase_changed"):
        assert kind in joined, joined
    tenant.destroy("told")
