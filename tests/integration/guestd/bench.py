"""guestd's programs without a VM: real children, pipes, terminals and a real cgroup; only the limits are a VM's to enforce."""

import base64
import select
import time
from collections.abc import Callable
from pathlib import Path

from guestd.execs import Execs
from guestd.link import Message, Outbox
from guestd.workload import Cgroup, reap_children
from hostd.drivers.guest.frames import FrameReader
from hostd.drivers.ports import LinkMessage

# Only a test that fails waits as long.
PATIENCE_S = 30.0
UNIFIED = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
WINDOW_BYTES = 256 * 1024


def find_unified() -> Path:
    """Where cgroup v2 is mounted on this machine."""
    return next(path for path in UNIFIED if (path / "cgroup.procs").exists() and (path / "cgroup.controllers").exists())


class UnlimitedCgroup(Cgroup):
    """A real cgroup; the machine that runs the tests may have given its controllers away."""

    def create(self, *, pids_max: int, memory_mib: int = 0) -> None:
        """Only the folder; the limits are remembered."""
        Path(self.path).mkdir(exist_ok=True)
        self.limits = (pids_max, memory_mib)

    def count_oom_kills(self) -> int:
        """None: without a limit nobody is killed for it."""
        return 0


class Bench:
    """A guestd's Execs with the loop around it, and a host's view of what it says."""

    def __init__(self, cgroups: Path) -> None:
        self.cgroups = cgroups
        self.outbox = Outbox()
        self.execs = Execs(self.outbox, lambda number: UnlimitedCgroup(f"{cgroups}/exec-{number}"))
        self.execs.open(("TOKEN",))
        self._reader = FrameReader()
        self._reader.expect(bytes(16))
        self.outbox.restart(bytes(16))
        self.heard: list[LinkMessage] = []
        # While closed nothing is read from guestd's port.
        self.is_port_open = True
        self.is_acking = True
        self._acked: dict[int, int] = {}

    def say(self, type_: str, payload: bytes = b"", **fields: object) -> None:
        """One frame of the host."""
        self.execs.handlers[type_](Message(type_, fields, base64.b64encode(payload)))

    def run(self, number: int, *command: str, **fields: object) -> None:
        """Ask for a program, as user agent in the root folder unless told otherwise."""
        self.say("exec", **{"exec": number, "command": list(command), "workdir": "/", "env": [], **fields})

    def turn(self) -> None:
        """Wait for something to happen, and do what guestd's loop does."""
        poll = select.poll()
        self.execs.watch(poll)
        wait_s = min(0.2, max(0.0, self.execs.next_at_s - time.monotonic()))
        poll.poll(wait_s * 1000)
        self.execs.take_ends(reap_children())
        self.execs.fill()
        self.outbox.flush(self._take if self.is_port_open else lambda _content: 0)
        self.execs.rest()

    def until(self, is_so: Callable[[], bool]) -> None:
        """Turn until it is so."""
        give_up_at_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < give_up_at_s, self.heard[-5:]
            self.turn()

    def end_of(self, number: int) -> dict[str, object]:
        """The end of a program, waited for."""
        self.until(lambda: bool(self._ends(number)))
        (found,) = self._ends(number)
        return {key: found.fields[key] for key in ("exit_code", "signal", "message")}

    def output(self, number: int, stream: str = "stdout") -> bytes:
        """All that has been heard of one stream."""
        return b"".join(
            message.payload
            for message in self.heard
            if message.type == "exec-output" and (message.fields["exec"], message.fields["stream"]) == (number, stream)
        )

    def taken(self, number: int) -> int:
        """How much input has been acknowledged."""
        acks = [m.fields["bytes"] for m in self.heard if m.type == "exec-input-ack" and m.fields["exec"] == number]
        return int(acks[-1]) if acks else 0

    def feed(self, number: int, content: bytes) -> None:
        """All of `content` as input, within its window, and its end."""
        sent = 0
        while sent < len(content):
            room = WINDOW_BYTES - (sent - self.taken(number))
            if room <= 0:
                self.turn()
                continue
            chunk = content[sent : sent + min(room, 64 * 1024)]
            sent += len(chunk)
            self.say("exec-input", chunk, **{"exec": number, "end": sent == len(content)})
            self.turn()

    def close(self) -> None:
        """Nothing is left: no process, no cgroup."""
        self.execs.hang_up()
        self.execs.close()
        self.until(lambda: not self.execs._abandoned)
        self.until(lambda: not list(self.cgroups.glob("exec-*")))
        self.cgroups.rmdir()

    def _ends(self, number: int) -> list[LinkMessage]:
        return [m for m in self.heard if m.type == "exec-ended" and m.fields["exec"] == number]

    def _take(self, content: memoryview) -> int:
        for message in self._reader.feed(bytes(content)):
            self.heard.append(message)
            if message.type == "exec-output" and self.is_acking:
                number = message.fields["exec"]
                self._acked[number] = self._acked.get(number, 0) + len(message.payload)
                self.say("exec-ack", **{"exec": number, "bytes": self._acked[number]})
        return len(content)
