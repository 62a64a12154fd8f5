"""Hosts as operators read them."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from fleet.model.host import Drain, Host, HostCordon
from fleet.model.units import GIB, MIB
from mb.render.text import count, render_table, wrap


def render_hosts(hosts: Sequence[Host]) -> list[str]:
    """A table of what each host carries of what it can, then its images."""
    if not hosts:
        return ["no hosts; one registers itself when its hostd starts"]
    ordered = sorted(hosts, key=lambda host: host.record.host_id)
    table = render_table(("HOST", "STATE", "ACCEL", "VCPUS", "MEMORY GIB", "DISK GIB", "SANDBOXES"), map(_row, ordered))
    images = [
        line
        for host in ordered
        for image in host.record.images
        for line in wrap("image", f"{image.name or '(no tag)'} {image.digest[:19]}… on {host.record.host_id}", 7)
    ]
    reasons = [
        line
        for host in ordered
        if host.record.accelerator_reason
        for line in wrap("note", f"{host.record.host_id}: {host.record.accelerator_reason}", 7)
    ]
    cordons = [
        line
        for host in ordered
        if host.cordon is not None
        for line in wrap("note", f"{host.record.host_id}: {_explain(host.cordon)}", 7)
    ]
    notes = [
        line for host in ordered for note in _notes(host) for line in wrap("note", f"{host.record.host_id}: {note}", 7)
    ]
    return [*table, *images, *reasons, *cordons, *notes]


def render_drain(drain: Drain, total: int = 0) -> list[str]:
    """How far a drain has come, of `total` sandboxes if that is known, and why some have not left."""
    host_id = drain.host.record.host_id
    if not drain.left and not drain.moving:
        return [f"{host_id} is drained: nothing runs there" + (f"; {total} left it" if total else "")]
    gone = f", {total - drain.left - drain.moving} gone" if total else ""
    lines = wrap(host_id, f"{drain.left} left, {drain.moving} moving{gone}")
    for one in drain.stragglers:
        lines += wrap("", f"{one.name} of {one.tenant} ({one.code}): {one.message}")
    return lines


def _state(host: Host) -> str:
    if not host.is_alive:
        return "away"
    if host.cordon is not None:
        return "draining" if host.cordon.is_draining else "cordoned"
    return "waits" if host.losses is not None and host.losses.until_ms > time.time() * 1000 else "alive"


def _explain(cordon: HostCordon) -> str:
    word = f"drained, {cordon.moves_max} at a time," if cordon.is_draining else "cordoned"
    return f"{word} by {cordon.by}" + (f": {cordon.reason}" if cordon.reason else "")


def _notes(host: Host) -> Iterator[str]:
    """What else an operator should know: what it takes more of than it has, whom it turns away, how often it was lost."""
    record = host.record
    if record.vcpu_overcommit_milli > 1000:
        yield f"promises {record.vcpu_overcommit_milli / 1000:g} vCPUs for each of its {record.capacity.vcpus}"
    if record.taints:
        taints = ", ".join(f"{taint.name}={taint.value}" for taint in record.taints)
        yield f"takes only what tolerates {taints}"
    if len(record.numa_nodes) > 1:
        nodes = ", ".join(f"{node.node}: {node.vcpus} vCPUs, {_gib(node.memory_mib)} GiB" for node in record.numa_nodes)
        yield f"NUMA nodes {nodes}"
    if not record.is_fenced:
        yield "keeps its VMs when it is lost: nothing of it is placed anew"
    if host.losses is not None:
        until = f", takes nothing new before {_moment(host.losses.until_ms)}" if host.losses.until_ms else ""
        yield f"lost {count(len(host.losses.at_ms), 'time')} of late, last {_moment(host.losses.at_ms[-1])}{until}"


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%H:%M:%S UTC")


def _row(host: Host) -> tuple[str, ...]:
    capacity, reserved = host.record.capacity, host.reserved
    return (
        host.record.host_id,
        _state(host),
        host.record.accelerator,
        f"{reserved.vcpus}/{capacity.vcpus}",
        f"{_gib(reserved.memory_mib)}/{_gib(capacity.memory_mib)}",
        f"{_gib(reserved.disk_mib)}/{_gib(capacity.disk_mib)}",
        f"{reserved.sandboxes}/{capacity.sandboxes}",
    )


def _gib(size_mib: int) -> str:
    return f"{size_mib * MIB / GIB:.1f}".removesuffix(".0")
