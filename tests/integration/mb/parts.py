"""mb as a process of its own, against a real scheduler over mutual TLS and a host that obeys."""

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.identity import Role
from provisioning.embedded.pki import EMBEDDED_TENANT, tls_files
from tests.integration.scheduler.parts import Fleet

PROJECT = Path(__file__).parents[3]
HANG_S = 60.0


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


class Mb:
    """The command line with the certificate of one role."""

    def __init__(self, fleet: Fleet, folder: Path, role: Role = Role.TENANT, name: str = EMBEDDED_TENANT) -> None:
        files = tls_files(fleet.pki, role, name)
        self._runs: list[asyncio.subprocess.Process] = []
        self._config = folder / f"{role}-{name}.toml"
        tls = f'ca = "{files.ca}"\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
        self._config.write_text(f'scheduler = "{fleet.address}"\n[tls]\n{tls}')

    async def start(self, *arguments: str | Path) -> asyncio.subprocess.Process:
        """Starts one run."""
        words = ["-m", "mb", "--config", str(self._config), *map(str, arguments)]
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe
        )
        self._runs.append(process)
        return process

    async def run(self, *arguments: str | Path) -> Ended:
        """One run to its end."""
        return await end_of(await self.start(*arguments))

    async def close(self) -> None:
        """Kills what a failed test left running."""
        for process in self._runs:
            if process.returncode is None:
                process.kill()
                await process.communicate()


async def end_of(process: asyncio.subprocess.Process) -> Ended:
    """How a started run ends."""
    async with asyncio.timeout(HANG_S):
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, stdout.decode(), stderr.decode())
