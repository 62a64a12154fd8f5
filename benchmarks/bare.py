"""Hosts of the benchmarks that pack: only what a plan looks at, on one image, with no VMM's memory."""

from fleet.model.host import Accelerator, Capacity, HostImage, HostRecord
from fleet.model.ids import Digest, HostId
from fleet.model.sandbox import NetworkMode

IMAGE = HostImage("base:latest", Digest("sha256:" + "b" * 64))


def bare_host(name: str, capacity: Capacity) -> HostRecord:
    """A host of that capacity without labels, devices or an address."""
    return HostRecord(
        host_id=HostId(name),
        address="",
        capacity=capacity,
        labels=(),
        images=(IMAGE,),
        accelerator=Accelerator.SIMULATED,
        accelerator_reason="",
        network_modes=(NetworkMode.NONE,),
        version="",
        registered_at_ms=0,
    )
