"""Hosts as operators read them."""

from collections.abc import Sequence

from fleet.model.host import Host, HostCordon
from fleet.model.units import GIB, MIB
from mb.render.text import render_table, wrap


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
    return [*table, *images, *reasons, *cordons]


def _state(host: Host) -> str:
    if not host.is_alive:
        return "away"
    return "cordoned" if host.cordon is not None else "alive"


def _explain(cordon: HostCordon) -> str:
    return f"cordoned by {cordon.by}" + (f": {cordon.reason}" if cordon.reason else "")


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
