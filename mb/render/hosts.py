"""Hosts as operators read them."""

from collections.abc import Sequence

from fleet.model.host import Host
from fleet.model.units import GIB, MIB
from mb.render.text import render_table, wrap


def render_hosts(hosts: Sequence[Host]) -> list[str]:
    """A table of what each host carries of what it can, then its images."""
    if not hosts:
        return ["no hosts; one registers itself when its hostd starts"]
    ordered = sorted(hosts, key=lambda host: host.record.host_id)
    table = render_table(("HOST", "ALIVE", "ACCEL", "VCPUS", "MEMORY GIB", "DISK GIB", "SANDBOXES"), map(_row, ordered))
    images = [
        line
        for host in ordered
        for image in host.record.images
        for line in wrap("image", f"{image.name} {image.digest[:19]}… on {host.record.host_id}", 7)
    ]
    reasons = [
        line
        for host in ordered
        if host.record.accelerator_reason
        for line in wrap("note", f"{host.record.host_id}: {host.record.accelerator_reason}", 7)
    ]
    return [*table, *images, *reasons]


def _row(host: Host) -> tuple[str, ...]:
    capacity, reserved = host.record.capacity, host.reserved
    return (
        host.record.host_id,
        "yes" if host.is_alive else "no",
        host.record.accelerator,
        f"{reserved.vcpus}/{capacity.vcpus}",
        f"{_gib(reserved.memory_mib)}/{_gib(capacity.memory_mib)}",
        f"{_gib(reserved.disk_mib)}/{_gib(capacity.disk_mib)}",
        f"{reserved.sandboxes}/{capacity.sandboxes}",
    )


def _gib(size_mib: int) -> str:
    return f"{size_mib * MIB / GIB:.1f}".removesuffix(".0")
