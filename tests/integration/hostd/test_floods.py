"""A guest that sends as fast as it can is slowed, and its neighbour runs to its end meanwhile. Prints what it cost hostd's loop."""

import asyncio
import base64
import json
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, SandboxId
from fleet.model.sandbox import Agent, Goal, SandboxSpec
from hostd.drivers.guest import SocketLinks
from hostd.drivers.guest.frames import MAGIC, MARKER_BYTES, FrameReader, encode_frame
from hostd.drivers.simulated_guest import AgentScript, SimulatedGuest
from hostd.orders import Orders
from hostd.reconcile.progress import begin
from hostd.reconcile.session import Sessions
from hostd.reconcile.words import LINK_VERSION
from tests.integration.hostd.parts import ACME, HOST, A, B

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
MUCH = bytes(range(256)) * 200_000
TICK_S, TICKS = 0.005, 400

# A process of its own, so that what it costs is not taken from the loop that is measured.
FLOODER = """
import socket, sys
path, hello, flood = sys.argv[1], bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.stdin.read())
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
print("ready", flush=True)
while True:
    link, _ = server.accept()
    try:
        marker = link.recv(32, socket.MSG_WAITALL)
        link.sendall(marker + hello)
        while True:
            link.sendall(flood)
    except OSError:
        link.close()
"""


def frame(header: object, payload: bytes = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack(">II", len(text), len(payload)) + text + payload


FLOODS = {
    "tiny frames": frame({"type": "x"}) * 2_000,
    "large headers": frame({"type": "x", "n": [[[1]]] * 1_600}) * 20,
    "large payloads": frame({"type": "x"}, bytes(256 * 1024)),
    "output sent again": frame({"type": "output", "agent": "agent-0", "offset": 0}, b"x" * 1_000) * 200,
    "agents that flip": b"".join(
        frame({"type": "agent", "name": "agent-0", "state": state, "exit_code": 1, "restarts": count})
        for count in range(1_000)
        for state in ("running", "restarting")
    ),
    "programs that nobody began": frame({"type": "exec-output", "exec": 1, "stream": "stdout"}, b"x") * 2_000,
    "noise": bytes(range(1, 256)) * 500,
}


@dataclass
class Site:
    """hostd with two guests: A floods, B is honest."""

    folder: Path
    orders: Orders
    sessions: Sessions
    links: SocketLinks
    moved: asyncio.Event

    async def until_artifact(self) -> None:
        while self.orders.progress[B].artifact is None:
            await self.moved.wait()
            self.moved.clear()


async def serve_honest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """B's guest, as QEMU's socket shows it."""
    guest = SimulatedGuest("boot-1", lambda agent: AgentScript(MUCH))
    marker = await reader.readexactly(MARKER_BYTES)
    frames = FrameReader()
    frames.expect(marker[len(MAGIC) :])
    assert list(frames.feed(marker)) == []
    writer.write(marker + encode_frame(guest.greet()))
    while content := await reader.read(64 * 1024):
        for message in frames.feed(content):
            for answer in guest.take(replace(message, payload=base64.b64decode(message.payload))):
                writer.write(encode_frame(answer))
            await writer.drain()
    writer.close()


def order(sandbox_id: SandboxId) -> Assignment:
    spec = SandboxSpec("box", agents=(Agent("agent-0", "custom", ("make",)),))
    return Assignment(sandbox_id, ACME, HOST, spec, Digest("sha256:" + "0" * 64), 64, Goal.RUN, 1, 1, 1)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """Both are ordered; nobody is attached yet."""
    with tempfile.TemporaryDirectory() as name:
        orders, links, moved = Orders(Path(name) / "state"), SocketLinks(), asyncio.Event()
        sessions = Sessions(orders, links, moved.set, lambda: time.time_ns() // 1_000_000)
        for sandbox_id in (A, B):
            orders.put_order(order(sandbox_id))
            orders.put_progress(begin(order(sandbox_id), "", ""))
        server = await asyncio.start_unix_server(serve_honest, f"{name}/b")
        yield Site(Path(name), orders, sessions, links, moved)
        await links.close()
        server.close()
        await server.wait_closed()


async def measure_lateness(late_s: list[float]) -> None:
    """How much later than asked this loop comes back, TICKS times."""
    for _ in range(TICKS):
        before_s = time.monotonic()
        await asyncio.sleep(TICK_S)
        late_s.append(time.monotonic() - before_s - TICK_S)


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_harms_nobody_else(site: Site, kind: str) -> None:
    """The neighbour's output and artifact arrive whole, whatever the other sends; hostd's other work goes on all the time."""
    hello = frame({"type": "hello", "version": LINK_VERSION, "boot_id": "a", "configured": False, "agents": {}})
    command = [sys.executable, "-c", FLOODER, f"{site.folder}/a", hello.hex()]
    pipe = asyncio.subprocess.PIPE
    flooder = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert flooder.stdout is not None
    assert flooder.stdin is not None
    flooder.stdin.write(FLOODS[kind].hex().encode())
    flooder.stdin.close()
    assert await flooder.stdout.readline() == b"ready\n"
    late_s: list[float] = []
    cpu_s, began_s = time.process_time(), time.monotonic()
    site.sessions.attach(A, f"{site.folder}/a")
    site.sessions.attach(B, f"{site.folder}/b")
    await asyncio.gather(measure_lateness(late_s), site.until_artifact())
    elapsed_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
    flooder.kill()
    await flooder.wait()
    late_s.sort()
    middle, high = (late_s[int(len(late_s) * share)] * 1_000 for share in (0.5, 0.99))
    failure = site.orders.progress[A].failure
    print(  # noqa: T201 (a measurement)
        f"\n{kind}: in {elapsed_s:.2f} s hostd used {cpu_s:.2f} s of CPU, loop late by {middle:.1f} ms (median), "
        f"{high:.1f} ms (p99), {late_s[-1] * 1000:.1f} ms (max); the flooder: {failure.code if failure else 'runs on'}"
    )
    assert site.orders.output_path(B, "agent-0").read_bytes() == MUCH
    assert site.orders.progress[B].failure is None
