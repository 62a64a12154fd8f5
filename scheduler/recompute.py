"""Makes a past decision again, from its record and the store as it was then, and compares: the same input, the same bytes.

What was decided on is etcd's history at the record's revision; creations that were accepted with their placement have no record
there, and are read from the first revisions after it.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fleet.codec import decode
from fleet.errors import InvalidSpecError, NotFoundError
from fleet.model.cycle import CycleRecord, Decision
from fleet.model.explanation import RecordCheck
from fleet.model.ids import SandboxId
from fleet.model.sandbox import SandboxRecord
from fleet.store.keyspace import RECORDS, ROOT, cycle_key
from fleet.store.port import CompactedError, EventKind, Listing, Store
from scheduler.contents import snapshot_of
from scheduler.decisions import digest_of, settings_digest, version
from scheduler.placement.explanation import Explanation
from scheduler.placement.plan import explain_turn, plan
from scheduler.placement.settings import Settings
from scheduler.placement.upkeep import cluster_of

# What was accepted with a decision was written within milliseconds of it.
SUBMITTED_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A decision made again: its record, in what it was compared, and what is behind one sandbox's part of it, if it had one."""

    record: CycleRecord
    checks: tuple[RecordCheck, ...]
    explanation: Explanation | None


async def recompute(store: Store, cycle: str, sandbox_id: SandboxId, settings: Settings) -> Recomputed:
    """Decides a cycle again and explains one sandbox's part of it.

    Raises NotFoundError `cycle_unknown`, `history_compacted` or `submission_unwritten` when what that takes is gone, and
    InvalidSpecError `cycle_unreadable` for a record that cannot be read.
    """
    record = await _record(store, cycle)
    try:
        listing = await store.list_prefix(ROOT, record.revision)
        submitted = await _submitted(store, record)
    except CompactedError as error:
        message = f"the store's history at revision {record.revision}, of decision {cycle}, is compacted"
        raise NotFoundError("history_compacted", message, "see docs/operator.md on how long etcd keeps it") from error
    # Pure, and seconds long for a large fleet: the event loop goes on meanwhile.
    return await asyncio.to_thread(_decide_again, record, listing, submitted, sandbox_id, settings)


async def _record(store: Store, cycle: str) -> CycleRecord:
    entry = await store.get(cycle_key(cycle)) if cycle else None
    if entry is None:
        message = f"there is no record of decision {cycle!r}"
        raise NotFoundError(
            "cycle_unknown", message, "records are kept for limits.cycles_kept_s; leave --recompute out"
        )
    try:
        return decode(CycleRecord, entry.value)
    except InvalidSpecError as error:
        message = f"the record of decision {cycle} cannot be read: {error.message}"
        raise InvalidSpecError("cycle_unreadable", message, "a scheduler of its version can read it") from error


async def _submitted(store: Store, record: CycleRecord) -> list[SandboxRecord]:
    wanted, found = set(record.submitted), dict[SandboxId, SandboxRecord]()
    try:
        async with asyncio.timeout(SUBMITTED_TIMEOUT_S):
            if wanted:
                async with store.watch(RECORDS, record.revision + 1) as batches:
                    async for batch in batches:
                        for event in batch:
                            sandbox_id = SandboxId(event.key.rpartition("/")[2])
                            if event.kind is EventKind.PUT and sandbox_id in wanted and sandbox_id not in found:
                                found[sandbox_id] = decode(SandboxRecord, event.value)
                        if len(found) == len(wanted):
                            break
    except TimeoutError as error:
        message = (
            f"of what was submitted in decision {record.cycle} some was never written: {sorted(wanted - set(found))}"
        )
        raise NotFoundError(
            "submission_unwritten", message, "it cannot be made again; leave --recompute out"
        ) from error
    return [found[one] for one in record.submitted]


def _decide_again(
    record: CycleRecord, listing: Listing, submitted: Sequence[SandboxRecord], sandbox_id: SandboxId, settings: Settings
) -> Recomputed:
    snapshot = snapshot_of(listing.entries, record.revision)
    cluster = cluster_of(snapshot, record.now_ms, settings.weights)
    waiting = [*(snapshot.pending() if record.is_full else ()), *submitted]
    made = plan(snapshot, cluster, waiting, now_ms=record.now_ms, seed=record.seed, settings=settings)
    checks = (
        RecordCheck("version", record.version, version()),
        RecordCheck("settings", record.settings_digest, settings_digest(settings)),
        RecordCheck("input", record.input_digest, snapshot.digest),
        RecordCheck("record", record.decisions_digest, digest_of(record.decisions)),
        RecordCheck("decisions", record.decisions_digest, digest_of(made.decisions)),
        RecordCheck("this one", _own(record.decisions, sandbox_id), _own(made.decisions, sandbox_id)),
    )
    wish = next((one for one in waiting if one.sandbox_id == sandbox_id), None)
    behind = explain_turn(snapshot, cluster, made, waiting, wish) if wish is not None else None
    return Recomputed(record, checks, behind)


def _own(decisions: Sequence[Decision], sandbox_id: SandboxId) -> str:
    own = next((one for one in decisions if one.sandbox_id == sandbox_id), None)
    if own is None:
        return "not decided"
    if own.refusal_codes:
        return f"refused: {' '.join(own.refusal_codes)}"
    devices = "".join(f" {share.device_id}:{share.milli}" for share in own.gpus)
    return f"{own.host_id}{devices} score {own.score}"
