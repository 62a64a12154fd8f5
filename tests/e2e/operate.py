"""Operates an embedded fleet as its users do: through `mb`, from a folder with a jcard, as a tenant or an operator."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.identity import Role
from fleet.store.etcd import open_etcd
from fleet.store.port import Delete
from provisioning.embedded.fleet import EmbeddedFleet
from provisioning.embedded.pki import tls_files

# One VM under emulation takes 10 s to its first output; three on two busy cores, minutes. Only a test that fails waits as long.
PATIENCE_S = 240.0
# What outside programs offer no event for is looked at this often.
LOOK_S = 0.2


# An agent that says a line four times a second, and all that it says.
COUNT = 60
COUNTER = f"""
import time
for number in range({COUNT}):
    print("line", number, flush=True)
    time.sleep(0.25)
"""
COUNTED = "".join(f"line {number}\n" for number in range(COUNT))


@dataclass(frozen=True)
class Done:
    """An `mb` that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """What it printed for machines."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Tenant:
    """A tenant of the fleet, with a folder for jcards."""

    fleet: EmbeddedFleet
    folder: Path
    config: Path

    def run(self, *arguments: str, given: str = "", env: Mapping[str, str] | None = None) -> Done:
        """Runs `mb` to its end, with `given` on its stdin and `env` beside its usual environment."""
        done = subprocess.run(
            self.command(*arguments),
            env={**self.env(), **(env or {})},
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def up(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        """Starts a sandbox from a jcard and returns when its agents run."""
        done = self.run("up", str(folder), "--detach", env=env)
        assert done.code == 0, done
        self.until(folder.name, lambda found: found["phase"] == "running")

    def until_logged(self, name: str, text: str) -> None:
        """Returns when the sandbox's agent has printed `text`."""
        wait_until(lambda: self.run("logs", name), lambda done: text in done.out)

    @contextmanager
    def start(self, *arguments: str) -> Iterator["Running"]:
        """Runs `mb` in the background; what still runs at the end is ended."""
        process = subprocess.Popen(
            self.command(*arguments),
            env=self.env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running = Running(process)
        try:
            yield running
        finally:
            running.end()

    def write_project(self, name: str, command: list[str], files: dict[str, str] | None = None, **fields: str) -> Path:
        """A folder with a jcard whose one agent, `worker`, runs `command`; `fields` go into the jcard as they are written."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "jcard.toml").write_text(render_jcard(name, command, fields))
        for path, text in (files or {"README": f"{name}\n"}).items():
            (folder / path).write_text(text)
        return folder

    def status(self, name: str) -> Any:
        """`mb status --json` of a sandbox."""
        done = self.run("status", name, "--json")
        assert done.code == 0, done.err
        return done.json()

    def until(self, name: str, is_so: Callable[[Any], bool]) -> Any:
        """The first status of a sandbox that is as asked for; it may have yet to be created."""

        def look() -> Any:
            done = self.run("status", name, "--json")
            return done.json() if done.code == 0 else None

        return wait_until(look, lambda found: found is not None and is_so(found))

    def leave_running(self, name: str, line: str) -> None:
        """Root in the guest runs a shell line that outlives its `mb exec`: it leaves the cgroup that ends with that."""
        escape = "mkdir -p /sys/fs/cgroup/stray && echo $$ >/sys/fs/cgroup/stray/cgroup.procs && exec setsid -f sh -c"
        command = f"{escape} '{line}' </dev/null >/dev/null 2>&1"
        done = self.run("exec", "--user", "root", name, "--", "sh", "-c", command)
        assert done.code == 0, done

    def clear(self) -> None:
        """Destroys every sandbox that a failed test has left, so that the next has the host for itself."""
        for sandbox in self.run("ls", "--json").json():
            self.run("destroy", sandbox["sandbox_id"])

    def destroy(self, *names: str) -> None:
        """Destroys sandboxes and sees them gone."""
        for name in names:
            done = self.run("destroy", name)
            assert done.code == 0, done.err

    def command(self, *arguments: str) -> list[str]:
        """The command line of an `mb`."""
        return [sys.executable, "-m", "mb", *arguments]

    def env(self) -> dict[str, str]:
        """The environment of an `mb` of this tenant's."""
        return {**os.environ, "BEDPLATE_CONFIG": str(self.config)}


class Running:
    """An `mb` under way; its output is collected as it comes."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._texts = {"out": "", "err": ""}
        self._readers = [
            threading.Thread(target=self._read, args=("out", process.stdout)),
            threading.Thread(target=self._read, args=("err", process.stderr)),
        ]
        for reader in self._readers:
            reader.start()

    def until_printed(self, text: str) -> None:
        """Returns when `text` was printed to stdout."""
        wait_until(lambda: self._texts["out"], lambda out: text in out or self._process.poll() is not None)
        assert text in self._texts["out"], self._texts

    def wait(self) -> Done:
        """Its end."""
        self._process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join()
        return Done(self._process.returncode, self._texts["out"], self._texts["err"])

    def end(self) -> None:
        """Ends it, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self.wait()

    def _read(self, name: str, stream: Any) -> None:
        with stream:
            for line in stream:
                self._texts[name] += line


def wait_until(look: Callable[[], Any], is_so: Callable[[Any], bool]) -> Any:
    """What `look` finds as soon as it is as asked for; fails after PATIENCE_S with the last that was found."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(LOOK_S)
    return found


def render_jcard(name: str, command: list[str], fields: dict[str, str]) -> str:
    """A jcard of one agent, 1 vCPU and 512 MiB; `fields` (cpus, memory, disk, mixtape, mode, agent, tail) replace what is usual."""
    lines = [
        f'name = "{name}"',
        f'mixtape = "{fields.get("mixtape", "base:latest")}"',
        "[resources]",
        f"cpus = {fields.get('cpus', '1')}",
        f'memory = "{fields.get("memory", "512MiB")}"',
        f'disk = "{fields.get("disk", "256MiB")}"',
        f'[network]\nmode = "{fields.get("mode", "closed")}"',
        '[[shared]]\nhost = "."\nguest = "/workspace"',
        f'[agent]\nname = "worker"\nharness = "custom"\nmemory = "256MiB"\ncommand = {json.dumps(command)}',
        fields.get("agent", ""),
        fields.get("tail", ""),
    ]
    return "\n".join(lines) + "\n"


def forget(fleet: EmbeddedFleet, *keys: str) -> None:
    """Takes keys out of the store, as the scheduler: of a host that was there for one test, or of what a test did to one."""

    async def delete() -> None:
        store = open_etcd((fleet.endpoint,), tls_files(fleet.folder / "pki", Role.SCHEDULER, "scheduler"))
        try:
            await store.transact([], [Delete(key) for key in keys])
        finally:
            await store.close()

    asyncio.run(delete())
