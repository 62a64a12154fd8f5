"""A real guest whose CPUs all burn is busy and not wedged; one whose QEMU stands still is, until it goes on. hostd's own exec."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator

import pytest

from fleet.model.sandbox import Agent
from hostd.reconcile.execs import ExecEnded, ExecOutput, Program
from hostd.reconcile.patience import UNRESPONSIVE_S
from tests.integration.guestd.parts import A, Host, Site, Vm, pack_tree

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(600)]

# Eight processes that never wait, for the guest's one CPU.
BURN = ["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait"]
BEATS = 8
CONTENT = bytes(range(256)) * 2_000
ROUNDS = 20


@pytest.fixture
async def burning(site: Site) -> AsyncIterator[tuple[Host, Vm]]:
    """A guest whose agent burns, and hostd's conversation with it."""
    agent = Agent("burner", "custom", tuple(BURN))
    vm, order = await site.start([(pack_tree({"a.txt": "a\n"}), "/workspace", False)], [agent])
    host = Host(site.folder / "state", vm, order)
    try:
        await host.until(lambda: any(agent.started_at_ms for agent in host.progress.agents))
        yield host, vm
    finally:
        await host.crash()
        vm.process.kill()
        vm.process.wait()


async def until_beat(host: Host) -> float:
    """Seconds until the guest's next heartbeat; hostd looks at it every second, as its passes do."""
    known, began_s = len(host.links.of_type("heartbeat")), time.monotonic()
    while len(host.links.of_type("heartbeat")) == known:
        host.sessions.lateness(A)
        assert host.sessions.notice(A) is None
        await asyncio.sleep(1)
    return time.monotonic() - began_s


async def run(host: Host, content: bytes, *command: str) -> tuple[bytes, ExecEnded]:
    running = await host.sessions.open_exec(A, Program(command, "/workspace"))

    async def feed() -> None:
        await running.write(content)
        await running.end_input()

    feeding, printed = asyncio.create_task(feed()), b""
    while not isinstance(event := await running.next(), ExecEnded):
        printed += event.payload if isinstance(event, ExecOutput) else b""
    await feeding
    return printed, event


async def test_busy_is_not_wedged(burning: tuple[Host, Vm]) -> None:
    """While every CPU burns the guest is heard and runs programs; with QEMU stopped it is unresponsive until that goes on."""
    host, vm = burning
    gaps_s = [await until_beat(host) for _ in range(BEATS)]
    assert await run(host, CONTENT, "cat") == (CONTENT, ExecEnded(0, None, ""))
    took_ms = []
    for _ in range(ROUNDS):
        began_s = time.monotonic()
        assert (await run(host, b"", "true"))[1].exit_code == 0
        took_ms.append((time.monotonic() - began_s) * 1000)
    took_ms.sort()
    print(  # noqa: T201 (a measurement)
        f"\nheartbeats while burning: at most {max(gaps_s):.1f} s apart; true: {took_ms[ROUNDS // 2]:.0f} ms (median), "
        f"{took_ms[-1]:.0f} ms (max)"
    )
    vm.process.send_signal(signal.SIGSTOP)
    try:
        while (notice := host.sessions.notice(A)) is None:  # noqa: ASYNC110 (silence wakes nobody)
            await asyncio.sleep(1)
        assert (notice.code, host.sessions.silent_s(A) >= UNRESPONSIVE_S) == ("guest_unresponsive", True)
    finally:
        vm.process.send_signal(signal.SIGCONT)
    await host.until(lambda: host.sessions.notice(A) is None)
    assert (await run(host, b"", "true"))[1].exit_code == 0
