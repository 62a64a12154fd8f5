"""What a confined process can still do, tried by one that is: each attempt is made for real, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Whose number nobody has.
OTHER = 61_234
ATTEMPTS = """
import asyncio, ctypes, json, os, resource, signal, socket, subprocess, sys, threading
from pathlib import Path
from fleet.errors import HostFaultError
from hostd.egress.confinement import confine

folder, other = Path(sys.argv[1]), int(sys.argv[2])
listener = socket.create_server(("127.0.0.1", 0))
handle = os.open(folder / "before", os.O_RDONLY)
uid, gid = (other, other) if os.geteuid() == 0 else (os.getuid(), os.getgid())
missing = confine(uid, gid, [folder / "readable", folder / "one"])
libc = ctypes.CDLL(None, use_errno=True)

def call(*arguments):
    code = libc.syscall(*arguments)
    if code < 0:
        raise OSError(ctypes.get_errno(), "")

def thread():
    done = []
    one = threading.Thread(target=lambda: done.append(1))
    one.start(); one.join()
    assert done

def connect():
    with socket.create_connection(listener.getsockname(), timeout=5) as client:
        client.sendall(b"x")
        assert listener.accept()[0].recv(1) == b"x"

attempts = {
    "thread": thread,
    "connect": connect,
    "loop": lambda: asyncio.run(asyncio.sleep(0)),
    "pair": lambda: socket.socketpair(),
    "read_open": lambda: os.read(handle, 10),
    "read_tree": lambda: (folder / "readable" / "file").read_bytes(),
    "read_one": lambda: (folder / "one").read_bytes(),
    "read_other": lambda: (folder / "before").read_bytes(),
    "list_other": lambda: os.listdir(folder),
    "write": lambda: (folder / "readable" / "file").write_bytes(b"x"),
    "make": lambda: (folder / "readable" / "new").write_bytes(b"x"),
    "unlink": lambda: (folder / "readable" / "file").unlink(),
    "program": lambda: subprocess.run(["/bin/true"]),
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "fork": lambda: os.fork() or os._exit(0),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0),
    "ipv6": lambda: socket.socket(socket.AF_INET6),
    "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "low_port": lambda: socket.create_server(("127.0.0.1", 53)),
    "kill_parent": lambda: os.kill(os.getppid(), 0),
    "ptrace": lambda: call(101, 0, 0, 0, 0),
    "unshare": lambda: call(272, 0x10000000),
    "become_root": lambda: os.setuid(0),
    "proc_parent": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
}
outcome = {}
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError as error:
        outcome[name] = error.errno or -1
    else:
        outcome[name] = 0
outcome["missing"] = missing
outcome["core"] = resource.getrlimit(resource.RLIMIT_CORE)
outcome["dumpable"] = libc.prctl(3, 0, 0, 0, 0)
outcome["privileges"] = libc.prctl(39, 0, 0, 0, 0)
outcome["ids"] = [*os.getresuid(), *os.getresgid(), *os.getgroups()] if uid == other else [other] * 6
print(json.dumps(outcome))
"""
ALLOWED = ("thread", "connect", "loop", "pair", "read_open", "read_tree", "read_one")
DENIED = (
    *("read_other", "list_other", "write", "make", "unlink", "program", "execve", "fork", "unix", "netlink", "packet"),
    *("ipv6", "raw", "kill_parent", "ptrace", "unshare", "proc_parent"),
)


@pytest.fixture(scope="module")
def outcome() -> Iterator[dict[str, object]]:
    """By attempt the error number that it met, 0 for none."""
    # Not below pytest's own folder, into which no other user may go.
    with tempfile.TemporaryDirectory() as name:
        yield try_all(Path(name))


def try_all(folder: Path) -> dict[str, object]:
    """What a process met that is confined to two paths in `folder`, all of which its user may read and write."""
    (folder / "readable").mkdir()
    for name in ("before", "one", "readable/file"):
        (folder / name).write_bytes(b"content")
        (folder / name).chmod(0o666)
    for path in (folder, folder / "readable"):
        path.chmod(0o777)
    ended = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(folder), str(OTHER)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


@pytest.mark.parametrize("attempt", ALLOWED)
def test_a_gateway_keeps_what_it_works_with(outcome: dict[str, object], attempt: str) -> None:
    """Threads, its sockets, new IPv4 connections and the trees that it was left."""
    assert outcome[attempt] == 0


@pytest.mark.parametrize("attempt", DENIED)
def test_a_gateway_can_do_nothing_else(outcome: dict[str, object], attempt: str) -> None:
    """Files, programs, processes, other kinds of sockets, the kernel: each attempt fails, also for root's child."""
    assert outcome[attempt] != 0


def test_nobody_reads_its_memory(outcome: dict[str, object]) -> None:
    """No core, no ptrace by its own user, no privileges to be had, and nothing that this machine lacks."""
    assert (outcome["core"], outcome["dumpable"], outcome["privileges"]) == ([0, 0], 0, 1)
    assert outcome["ids"] == [OTHER] * 6
    assert "landlock" not in outcome["missing"]  # type: ignore[operator]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try to stay root")
def test_root_is_no_user_for_it() -> None:
    """A mistake in its configuration is an error, not a gateway of root's."""
    text = "from pathlib import Path\nfrom hostd.egress.confinement import confine\nconfine(0, 0, [Path('/usr')])"
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "its user is root" in ended.stderr
