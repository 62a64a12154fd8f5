"""What hostd knows survives it, whole or not at all."""

from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, Goal, SandboxSpec
from hostd.files import remove_durable, sync_folder, write_durable
from hostd.orders import Orders
from hostd.reconcile.progress import Progress, begin

A, B = SandboxId("a" * 12), SandboxId("b" * 12)
SPEC = SandboxSpec("box", agents=(Agent("one", "custom", ("true",)),))
ORDER = Assignment(A, Tenant("acme"), HostId("host"), SPEC, Digest("sha256:" + "0" * 64), 64, Goal.RUN, 1, 1, 1)
PROGRESS = begin(ORDER, "10.77.0.2", "")


@pytest.fixture
def orders(tmp_path: Path) -> Orders:
    """Orders with one sandbox."""
    orders = Orders(tmp_path)
    orders.put_order(ORDER)
    orders.put_progress(PROGRESS)
    return orders


def test_everything_is_found_again(orders: Orders, tmp_path: Path) -> None:
    """Order and progress, by the next run on the same folder."""
    again = Orders(tmp_path)
    assert (again.orders, again.progress, again.folders()) == ({A: ORDER}, {A: PROGRESS}, {A})


def test_the_last_word_counts(orders: Orders, tmp_path: Path) -> None:
    """A changed order or progress replaces the one before."""
    stopped, configured = replace(ORDER, goal=Goal.STOP, generation=2), replace(PROGRESS, is_configured=True)
    orders.put_order(stopped)
    orders.put_progress(configured)
    again = Orders(tmp_path)
    assert (again.orders[A], again.progress[A]) == (stopped, configured)


def test_output_is_counted_anew(orders: Orders, tmp_path: Path) -> None:
    """The file is the truth: counters held in memory are not needed after a restart."""
    orders.hold_progress(replace(PROGRESS, agents=(replace(PROGRESS.agents[0], output_bytes=3),)))
    orders.output_path(A, "one").write_bytes(b"hello")
    assert orders.progress[A].agents[0].output_bytes == 3
    assert Orders(tmp_path).progress[A].agents[0].output_bytes == 5


def test_output_that_a_power_failure_took_leaves_no_gap(orders: Orders, tmp_path: Path) -> None:
    """Where earlier runs' output is shorter than it was, this run's follows what is left, from its own offset 0."""
    path = orders.output_path(A, "one")
    orders.put_progress(replace(PROGRESS, run=2, output_bases=(10,)))
    path.write_bytes(b"hell")
    again = Orders(tmp_path)
    assert (again.progress[A].output_bases, again.output_bytes(A, "one")) == ((4,), 0)
    path.write_bytes(b"hell" + b"new")
    assert again.output_bytes(A, "one") == 3


def test_forgetting_keeps_the_folder_and_removing_keeps_the_order(orders: Orders, tmp_path: Path) -> None:
    """The two are told apart, also after a restart; both may be repeated."""
    orders.forget_order(A)
    orders.forget_order(A)
    assert (Orders(tmp_path).orders, Orders(tmp_path).folders()) == ({}, {A})
    orders.put_order(ORDER)
    orders.remove_folder(A)
    orders.remove_folder(A)
    again = Orders(tmp_path)
    assert (again.orders, again.progress, again.folders()) == ({A: ORDER}, {}, frozenset())


def test_a_crash_while_a_folder_is_made_is_healed(tmp_path: Path) -> None:
    """A folder without its inside gets it with the next progress."""
    (tmp_path / "sandboxes" / A).mkdir(parents=True)
    orders = Orders(tmp_path)
    assert (orders.folders(), orders.progress) == ({A}, {})
    orders.put_progress(PROGRESS)
    orders.output_path(A, "one").write_bytes(b"x")


def test_what_is_not_ours_is_left_alone(orders: Orders, tmp_path: Path) -> None:
    """Half-written files and a stranger's are no orders."""
    for name in (f".{B}.new", "README", "UPPER", B + "x"):
        (tmp_path / "orders" / name).write_bytes(b"\xff")
    assert set(Orders(tmp_path).orders) == {A}


@pytest.mark.parametrize("place", [f"orders/{A}", f"sandboxes/{A}/progress"])
@pytest.mark.parametrize("content", [b"\xff\xff", b""])
def test_broken_state_stops_the_start(orders: Orders, tmp_path: Path, place: str, content: bytes) -> None:
    """A bad sector must not look like an order to remove a sandbox: hostd names the file and does not start."""
    (tmp_path / place).write_bytes(content)
    with pytest.raises(HostFaultError) as caught:
        assert not Orders(tmp_path).orders
    assert (caught.value.code, str(tmp_path / place) in caught.value.message) == ("state_unreadable", True)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A", ".hidden"])
def test_no_name_leads_out_of_the_folder(orders: Orders, name: str) -> None:
    """An agent's name is a file's name, or nobody asks."""
    with pytest.raises(AssertionError):
        orders.output_path(A, name)


def test_only_hostd_may_look(orders: Orders, tmp_path: Path) -> None:
    """Output is the tenant's: no other user of the host reads it."""
    for folder in ("orders", "sandboxes"):
        assert (tmp_path / folder).stat().st_mode & 0o077 == 0


def test_a_write_is_whole(tmp_path: Path) -> None:
    """What a crash left half written is overwritten, and a failure leaves the old content."""
    path = tmp_path / "file"
    (tmp_path / ".file.new").write_bytes(b"half of something longer")
    write_durable(path, b"one")
    assert path.read_bytes() == b"one"
    (tmp_path / ".file.new").mkdir()
    with pytest.raises(HostFaultError) as caught:
        write_durable(path, b"two")
    assert (caught.value.code, str(path) in caught.value.message, path.read_bytes()) == ("disk_failed", True, b"one")


def test_removing_is_idempotent_and_errors_are_named(tmp_path: Path) -> None:
    """What is gone is gone; what cannot go says so."""
    path = tmp_path / "file"
    path.touch()
    remove_durable(path)
    remove_durable(path)
    assert not path.exists()
    for act in (lambda: remove_durable(tmp_path), lambda: sync_folder(tmp_path / "none")):
        with pytest.raises(HostFaultError):
            act()


def test_sandboxes_are_kept_apart(tmp_path: Path) -> None:
    """Each sandbox has its own folder; one's progress never is another's."""
    orders = Orders(tmp_path)
    for sandbox_id in (A, B):
        orders.put_progress(Progress(sandbox_id, starts=1 if sandbox_id == A else 2))
    assert {id_: progress.starts for id_, progress in Orders(tmp_path).progress.items()} == {A: 1, B: 2}
