"""What hostd keeps on its own disk: orders, progress, output and artifacts. It knows neither etcd nor any driver.

    <state>/orders/<id>             the assignment as last received
    <state>/sandboxes/<id>/progress
    <state>/sandboxes/<id>/output/<agent>
    <state>/sandboxes/<id>/artifact

An order is on the disk before anything is done about it, so that a restart without etcd goes on with the same orders.
Whatever changes is in the journal before it is here. On a full disk nothing begins; a reserve lets what ends be written still.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fleet.codec import decode, encode
from fleet.errors import HostFaultError, InvalidSpecError
from fleet.model.assignment import Assignment
from fleet.model.event import Event
from fleet.model.ids import Digest, SandboxId, Tenant, is_sandbox_id
from fleet.model.sandbox import Goal
from fleet.model.units import MIB
from hostd.clock import now_ms
from hostd.files import Reserve, disk_faults, remove_durable, sync_folder, write_durable
from hostd.journal import Journal
from hostd.reconcile.progress import Progress, is_over
from hostd.reconcile.transitions import describe_order, describe_progress, describe_removal
from hostd.reconcile.words import OUTPUT_BYTES_MAX

T = TypeVar("T")

# Orders, progress and events of a thousand sandboxes that end, at two blocks each.
RESERVE_BYTES = 8 * MIB
# Ends that a full disk did not take; more are lost to the journal, and to nothing else.
UNRECORDED_MAX = 1000

_AGENT_FILE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Orders:
    """The orders of this host and what became of them, in memory and on the disk at once."""

    def __init__(
        self,
        state_dir: Path,
        host_id: str = "local",
        now_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._now_ms = now_ms
        self._unrecorded: list[Event] = []
        self._orders_dir = state_dir / "orders"
        self._sandboxes_dir = state_dir / "sandboxes"
        for folder in (self._orders_dir, self._sandboxes_dir):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        self.journal = Journal(state_dir / "journal", f"host/{host_id}")
        self._reserve = Reserve(state_dir / "reserve", RESERVE_BYTES)
        self._reserve.take()
        self._orders = {id_: self._load_order(id_) for id_ in _names(self._orders_dir)}
        self._progress = {id_: progress for id_ in self.folders() if (progress := self._load_progress(id_))}

    @property
    def orders(self) -> Mapping[SandboxId, Assignment]:
        """Every order, by sandbox."""
        return self._orders

    @property
    def progress(self) -> Mapping[SandboxId, Progress]:
        """Every sandbox's progress; a sandbox whose folder is removed has none."""
        return self._progress

    def named_sources(self) -> frozenset[tuple[Tenant, Digest]]:
        """The sources of every order's sandbox."""
        orders = self._orders.values()
        return frozenset((order.tenant, source.digest) for order in orders for source in order.spec.sources)

    def folders(self) -> frozenset[SandboxId]:
        """Sandboxes that have a folder on this host."""
        return frozenset(_names(self._sandboxes_dir))

    def put_order(self, order: Assignment) -> None:
        """Remembers an order, durably."""
        known, progress = self._orders.get(order.sandbox_id), self._progress.get(order.sandbox_id)
        if known == order:
            return
        is_ending = order.goal is not Goal.RUN
        if not is_ending and not self._reserve.take():
            message = f"{self._orders_dir}: no room is left to write down how a sandbox would end"
            raise HostFaultError("disk_failed", message, "free space on the host")
        events = describe_order(known, order, progress, at_ms=self._now_ms(), origin=self.journal.origin)

        def write() -> None:
            self._record(events)
            write_durable(self._orders_dir / order.sandbox_id, encode(order))

        self._write(write, may_use_reserve=is_ending)
        self._orders[order.sandbox_id] = order

    def forget_order(self, sandbox_id: SandboxId) -> None:
        """Drops an order that nobody gives any more."""
        remove_durable(self._orders_dir / sandbox_id)
        self._orders.pop(sandbox_id, None)

    def hold_progress(self, progress: Progress) -> None:
        """Remembers a sandbox's counters until the next put_progress; a restart counts the output files anew."""
        events = self._describe(progress)
        if events:
            # An end that the disk does not take ends the sandbox all the same; the journal has it once there is room.
            try:
                self._record(events)
            except HostFaultError:
                self._unrecorded = [*self._unrecorded, *events][-UNRECORDED_MAX:]
        self._progress[progress.sandbox_id] = progress

    def put_progress(self, progress: Progress) -> None:
        """Remembers a sandbox's progress, durably."""
        folder = self._sandboxes_dir / progress.sandbox_id
        events = self._describe(progress)

        def write() -> None:
            self._record(events)
            if not (folder / "output").exists():
                with disk_faults(folder):
                    (folder / "output").mkdir(parents=True, exist_ok=True)
                sync_folder(self._sandboxes_dir)
            write_durable(folder / "progress", encode(progress))

        order = self._orders.get(progress.sandbox_id)
        self._write(write, may_use_reserve=order is not None and is_over(progress, order.goal))
        self._progress[progress.sandbox_id] = progress

    def record(self, sandbox_id: SandboxId, kind: str, *, actor: str, detail: str, cause: str = "") -> None:
        """Writes an event of a sandbox that changes neither order nor progress; raises HostFaultError `disk_failed`."""
        order, progress = self._orders[sandbox_id], self._progress.get(sandbox_id)
        about = Event(sandbox_id, order.tenant, "", 0, self._now_ms(), actor, kind, cause, detail=detail)
        self._record([replace(about, generation=order.generation, run=progress.run if progress else order.run)])

    def remove_folder(self, sandbox_id: SandboxId) -> None:
        """Deletes a sandbox's progress, output and artifact; raises HostFaultError `disk_failed` when some of it stays."""
        order, progress = self._orders.get(sandbox_id), self._progress.get(sandbox_id)
        folder = self._sandboxes_dir / sandbox_id
        if order is not None and folder.exists():
            removal = describe_removal(order, progress, at_ms=self._now_ms(), origin=self.journal.origin)
            self._write(lambda: self._record([removal]), may_use_reserve=True)
        self._progress.pop(sandbox_id, None)
        with disk_faults(folder), suppress(FileNotFoundError):
            shutil.rmtree(folder)
        sync_folder(self._sandboxes_dir)
        self._reserve.take()

    def output_path(self, sandbox_id: SandboxId, agent: str) -> Path:
        """Where an agent's output is kept. `agent` must be a name from the spec."""
        assert _AGENT_FILE.fullmatch(agent)
        return self._sandboxes_dir / sandbox_id / "output" / agent

    def output_bytes(self, sandbox_id: SandboxId, agent: str) -> int:
        """How much of an agent's output of this run is held; the file has that of earlier runs before it."""
        return max(0, _size(self.output_path(sandbox_id, agent)) - self._output_base(sandbox_id, agent))

    def output_room(self, sandbox_id: SandboxId, agent: str) -> int:
        """How much of an agent's output this run may leave: OUTPUT_BYTES_MAX are of all its runs together."""
        return max(0, OUTPUT_BYTES_MAX - self._output_base(sandbox_id, agent))

    def partial_artifact_path(self, sandbox_id: SandboxId) -> Path:
        """Where an artifact grows until it is whole."""
        return self.artifact_path(sandbox_id).with_name(".artifact.part")

    def artifact_path(self, sandbox_id: SandboxId) -> Path:
        """Where a sandbox's artifact is kept."""
        return self._sandboxes_dir / sandbox_id / "artifact"

    def _describe(self, progress: Progress) -> list[Event]:
        order, known = self._orders.get(progress.sandbox_id), self._progress.get(progress.sandbox_id)
        return describe_progress(order, known, progress, at_ms=self._now_ms(), origin=self.journal.origin)

    def _record(self, events: Sequence[Event]) -> None:
        """The one way into the journal."""
        if events:
            self.journal.append([*self._unrecorded, *events])
            self._unrecorded = []

    def _write(self, write: Callable[[], None], *, may_use_reserve: bool) -> None:
        try:
            write()
        except HostFaultError:
            if not may_use_reserve or not self._reserve.release():
                raise
            write()

    def _output_base(self, sandbox_id: SandboxId, agent: str) -> int:
        progress = self._progress.get(sandbox_id)
        if progress is None:
            return 0
        names = [status.name for status in progress.agents]
        return progress.output_bases[names.index(agent)] if progress.output_bases else 0

    def _load_order(self, sandbox_id: SandboxId) -> Assignment:
        path = self._orders_dir / sandbox_id
        order = _load(Assignment, path)
        if order.sandbox_id != sandbox_id:
            raise _unreadable(path, "it is another sandbox's")
        return order

    def _load_progress(self, sandbox_id: SandboxId) -> Progress | None:
        path = self._sandboxes_dir / sandbox_id / "progress"
        if not path.exists():
            return None
        progress = _load(Progress, path)
        if progress.sandbox_id != sandbox_id:
            raise _unreadable(path, "it is another sandbox's, or empty")
        sizes = [_size(self.output_path(sandbox_id, agent.name)) for agent in progress.agents]
        # A hostd that knew no runs wrote no bases. Output is not fsynced: what a power failure took of earlier runs' is gone, and
        # this run's follows what is left.
        known = progress.output_bases or (0,) * len(progress.agents)
        bases = tuple(min(base, size) for base, size in zip(known, sizes, strict=True))
        agents = tuple(
            replace(agent, output_bytes=size - base)
            for base, size, agent in zip(bases, sizes, progress.agents, strict=True)
        )
        return replace(progress, run=max(1, progress.run), output_bases=bases, agents=agents)


def _load(kind: type[T], path: Path) -> T:
    # What cannot be read is not skipped: a sandbox that nobody ordered is removed, and no bad sector may order that.
    try:
        with disk_faults(path):
            return decode(kind, path.read_bytes())
    except InvalidSpecError as error:
        raise _unreadable(path, error.message) from error


def _unreadable(path: Path, message: str) -> HostFaultError:
    next_step = "restore the file; or remove it, and the sandbox with it"
    return HostFaultError("state_unreadable", f"{path}: {message}", next_step)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _names(folder: Path) -> list[SandboxId]:
    return [SandboxId(path.name) for path in sorted(folder.iterdir()) if is_sandbox_id(path.name)]
