"""Every transition is in the journal before it is acted on, and a full disk ends what it must without losing the rest."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from fleet.model.event import Event
from fleet.model.sandbox import Goal, Phase
from hostd.drivers.ports import LinkMessage
from hostd.journal import Cursor
from hostd.orders import Orders
from hostd.reconcile.diff import VM_DIED
from hostd.reconcile.progress import fail
from tests.integration.hostd.parts import A, B, Hostd, Room

pytestmark = pytest.mark.timeout(60)


def events_of(orders: Orders) -> list[Event]:
    return orders.journal.read(Cursor(), A)[0]


async def test_a_life_is_told(tmp_path: Path) -> None:
    """From order to removal: who did what, why, and the state before and after."""
    room = Room(tmp_path)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("exit 3"))
        await hostd.until_phase(Phase.FAILED)
        await hostd.until_released()
        hostd.accept(room.order("exit 3", goal=Goal.REMOVE, generation=2))
        await hostd.until_gone()
        told = [(event.kind, event.before, event.after, event.cause, event.actor) for event in events_of(hostd.orders)]
    assert told == [
        ("order.taken", "", "run", "goal_run", "scheduler"),
        ("run.begun", "", "starting", "goal_run", "scheduler"),
        ("agent.phase_changed", "waiting", "running", "", "guest"),
        ("sandbox.phase_changed", "starting", "running", "", "guest"),
        ("agent.phase_changed", "running", "failed", "agent_failed", "guest"),
        ("sandbox.phase_changed", "running", "failed", "agent_failed", "host/local"),
        ("order.taken", "run", "remove", "goal_remove", "scheduler"),
        ("sandbox.phase_changed", "failed", "removing", "goal_remove", "scheduler"),
        ("sandbox.removed", "removing", "removed", "goal_remove", "host/local"),
    ]


async def test_a_stop_and_a_start_are_told(tmp_path: Path) -> None:
    """The next run begins where the last one was stopped, and names itself."""
    room = Room(tmp_path)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        hostd.accept(room.order("sleep", goal=Goal.STOP, generation=2))
        await hostd.until_phase(Phase.STOPPED)
        await hostd.until_released()
        hostd.accept(room.order("sleep", generation=3, run=2))
        await hostd.until_phase(Phase.RUNNING)
        phases = [
            (event.before, event.after, event.run)
            for event in events_of(hostd.orders)
            if event.kind in ("run.begun", "sandbox.phase_changed")
        ]
    assert phases == [
        ("", "starting", 1),
        ("starting", "running", 1),
        ("running", "stopped", 1),
        ("stopped", "starting", 2),
        ("starting", "running", 2),
    ]


async def test_what_cannot_be_recorded_is_not_done(tmp_path: Path) -> None:
    """The event comes first: a state that could not be written was told of, one that was written always is."""
    room = Room(tmp_path)
    orders = Orders(tmp_path / "state")
    hostd = Hostd(room)
    hostd.reconciler.accept(room.order("sleep"))
    del orders
    (tmp_path / "state" / "sandboxes" / A / ".progress.new").mkdir()
    failed = fail(hostd.orders.progress[A], VM_DIED)
    with pytest.raises(HostFaultError):
        hostd.orders.put_progress(failed)
    assert hostd.orders.progress[A].failure is None
    assert events_of(hostd.orders)[-1].cause == "vm_died"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 16 MiB, in this test run's own namespace."""
    assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test mounts: run it in private namespaces"
    libc, folder = ctypes.CDLL(None, use_errno=True), tmp_path / "small"
    folder.mkdir()
    assert libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=16m") == 0
    yield folder
    assert libc.umount2(str(folder).encode(), 2) == 0


def fill(folder: Path) -> Path:
    path = folder / "filler"
    with path.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)):
            pass
    return path


@pytest.mark.root
async def test_on_a_full_disk_nothing_begins_and_everything_may_end(small_disk: Path, tmp_path: Path) -> None:
    """Real ENOSPC: a new sandbox is refused, a removal is carried out, and with room again work goes on."""
    room = Room(tmp_path)
    orders = Orders(small_disk)
    order = room.order("sleep")
    hostd = Hostd(room, orders=orders)
    async with hostd.running():
        hostd.accept(order)
        await hostd.until_phase(Phase.RUNNING)
        filler = fill(small_disk)
        with pytest.raises(HostFaultError) as caught:
            hostd.accept(room.order("sleep", sandbox_id=B))
        assert caught.value.code == "disk_failed"
        hostd.accept(replace(order, goal=Goal.REMOVE, generation=2))
        await hostd.until_gone()
        assert [event.kind for event in events_of(orders)][-1] == "sandbox.removed"
        filler.unlink()
        assert orders.progress == {}
        hostd.accept(room.order("sleep", sandbox_id=B))
        await hostd.until_phase(Phase.RUNNING, B)
        assert set(Orders(small_disk).orders) == {A, B}


@pytest.mark.root
async def test_a_sandbox_whose_state_cannot_be_written_ends_clearly(small_disk: Path, tmp_path: Path) -> None:
    """A guest whose news the full disk does not take fails with `host_disk_failed`; its VM goes, and a removal ends it wholly."""
    room = Room(tmp_path)
    orders = Orders(small_disk)
    hostd = Hostd(room, orders=orders)
    async with hostd.running():
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        filler = fill(small_disk)
        ended = {"name": "agent-0", "state": "exited", "exit_code": 0, "offset": 5}
        await hostd.sessions.receive(A, LinkMessage("agent", ended))
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason is not None
        assert status.reason.code == "host_disk_failed"
        await hostd.until_released()
        filler.unlink()
        hostd.accept(room.order("sleep", goal=Goal.REMOVE, generation=2))
        await hostd.until_gone()
        assert [event.cause for event in events_of(orders) if event.after == "failed"][-1] == "host_disk_failed"
