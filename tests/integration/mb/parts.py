"""mb as a process of its own, against a real scheduler over mutual TLS and a host that obeys."""

import asyncio
import fcntl
import json
import os
import pty
import struct
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fleet.identity import Role
from provisioning.embedded.pki import EMBEDDED_TENANT, tls_files

PROJECT = Path(__file__).parents[3]
HANG_S = 60.0
# util-linux's setsid: standard input becomes the controlling terminal. (A fork with work in between is not safe beside gRPC.)
OWN_TERMINAL = ("setsid", "--ctty")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run of mb ended."""

    code: int
    stdout: str
    stderr: str

    def value(self) -> Any:
        """What it printed as JSON."""
        return json.loads(self.stdout)

    def error(self) -> Any:
        """The error it printed as JSON, on the last line of stderr."""
        return json.loads(self.stderr.splitlines()[-1])["error"]


class Served(Protocol):
    """A scheduler to talk to, real or a desk."""

    pki: Path
    address: str


class Mb:
    """The command line with the certificate of one role."""

    def __init__(self, fleet: Served, folder: Path, role: Role = Role.TENANT, name: str = EMBEDDED_TENANT) -> None:
        files = tls_files(fleet.pki, role, name)
        self._runs: list[asyncio.subprocess.Process] = []
        self.config = folder / f"{role}-{name}.toml"
        tls = f'ca = "{files.ca}"\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
        self.config.write_text(f'scheduler = "{fleet.address}"\n[tls]\n{tls}')

    async def start(self, *arguments: str | Path, **streams: Any) -> asyncio.subprocess.Process:
        """Starts one run; `streams` and more are as for create_subprocess_exec, input is empty by default."""
        words = ["-m", "mb", "--config", str(self.config), *map(str, arguments)]
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | streams.pop("environment", {})
        pipe = asyncio.subprocess.PIPE
        streams = {"stdin": asyncio.subprocess.DEVNULL, "stdout": pipe, "stderr": pipe} | streams
        words = [*streams.pop("before", ()), sys.executable, *words]
        process = await asyncio.create_subprocess_exec(*words, cwd=PROJECT, env=environment, **streams)
        self._runs.append(process)
        return process

    async def run(self, *arguments: str | Path, stdin: bytes | None = None) -> Ended:
        """One run to its end; `stdin` goes in through a pipe."""
        if stdin is None:
            return await end_of(await self.start(*arguments))
        return await end_of(await self.start(*arguments, stdin=asyncio.subprocess.PIPE), stdin)

    async def start_on_terminal(self, *arguments: str | Path) -> "Terminal":
        """Starts one run on a terminal of its own."""
        terminal = Terminal()

        ends = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.slave)
        terminal.process = await self.start(*arguments, **ends, before=OWN_TERMINAL, environment={"TERM": "xterm"})
        return terminal

    async def close(self) -> None:
        """Kills what a failed test left running."""
        for process in self._runs:
            if process.returncode is None:
                process.kill()
                await process.communicate()


class Terminal:
    """A terminal, seen from the keyboard and the screen."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(self.slave)
        self.process: Any = None
        self.screen = b""

    def resize(self, rows: int, columns: int) -> None:
        """The window has this size now; who runs on it is told."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        """Types."""
        os.write(self._master, keys)

    async def shows(self, text: bytes) -> None:
        """Returns once that stands on the screen, behind what was waited for before."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(HANG_S):
            while text not in self.screen:
                arrived = asyncio.Event()
                loop.add_reader(self._master, arrived.set)
                await arrived.wait()
                loop.remove_reader(self._master)
                self.screen += os.read(self._master, 65536)
        self.screen = self.screen.partition(text)[2]

    async def end(self) -> int:
        """The exit code of the run, after which the terminal is checked to be as it was."""
        async with asyncio.timeout(HANG_S):
            code = await self.process.wait()
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.slave)
        os.close(self._master)
        return int(code)


async def end_of(process: asyncio.subprocess.Process, stdin: bytes | None = None) -> Ended:
    """How a started run ends."""
    async with asyncio.timeout(HANG_S):
        stdout, stderr = await process.communicate(stdin)
    assert process.returncode is not None
    return Ended(process.returncode, stdout.decode(errors="surrogateescape"), stderr.decode())
