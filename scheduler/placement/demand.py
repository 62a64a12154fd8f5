"""What a sandbox asks of a host: its request class, which many sandboxes share, and its own wish, which is its alone. PURE."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fleet.model.host import Accelerator, overhead_mib
from fleet.model.ids import NO_HOST, Digest, HostId, Tenant
from fleet.model.sandbox import Affinity, ImageRef, Label, NetworkMode, Resources, SandboxSpec

# One device and one vCPU, in the thousandths that are given away.
DEVICE_MILLI = 1000
VCPU_MILLI = 1000
NO_TENANT = Tenant("")


@dataclass(frozen=True, slots=True)
class Demand:
    """A request class: all that filters look at, and what of the scores does not depend on the single sandbox.

    `gpu_milli` is of each of its `gpus` devices. Memory is the guest's own; what its VMM takes is the host's to add.
    """

    vcpu_milli: int
    memory_mib: int
    disk_mib: int = 0
    gpus: int = 0
    gpu_milli: int = DEVICE_MILLI
    gpu_models: tuple[str, ...] = ()
    gpu_memory_mib: int = 0
    labels: tuple[Label, ...] = ()
    tolerations: tuple[Label, ...] = ()
    prefer_labels: tuple[Label, ...] = ()
    network_mode: NetworkMode = NetworkMode.NONE
    image: ImageRef = field(default_factory=ImageRef)

    @property
    def is_fraction(self) -> bool:
        """Whether it takes parts of devices, which only shareable ones can give."""
        return 0 < self.gpu_milli < DEVICE_MILLI

    def memory_on(self, accelerator: Accelerator) -> int:
        """Memory in MiB with what its VMM takes on a host of that accelerator."""
        return self.memory_mib + overhead_mib(Resources(vcpus=-(-self.vcpu_milli // VCPU_MILLI)), accelerator)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the sandboxes to come look like: one form of request, whose share of all is its popularity."""

    vcpu_milli: int
    memory_mib: int
    gpus: int = 0
    gpu_milli: int = DEVICE_MILLI
    gpu_models: tuple[str, ...] = ()
    gpu_memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """What one sandbox wants beside its class: sources of its tenant, its parent's neighbourhood, hosts that it must not go to.

    `pinned_host` is the only one that counts for a further run: its disk is there.
    """

    tenant: Tenant = NO_TENANT
    sources: tuple[Digest, ...] = ()
    affinity: Affinity = Affinity.ANY
    parent_host: HostId = NO_HOST
    parent_rack: str = ""
    avoid_hosts: frozenset[HostId] = frozenset()
    pinned_host: HostId = NO_HOST

    @property
    def is_plain(self) -> bool:
        """Whether the class alone decides."""
        return self == ANYWHERE


ANYWHERE = Wish()


def demand_of(spec: SandboxSpec, image: ImageRef | None = None) -> Demand:
    """The request class of a spec; `image` is the very one that a further run needs."""
    resources, placement = spec.resources, spec.placement
    return Demand(
        vcpu_milli=resources.vcpus * VCPU_MILLI,
        memory_mib=resources.memory_mib,
        disk_mib=resources.disk_mib,
        gpus=resources.gpus,
        gpu_milli=resources.gpu_milli or DEVICE_MILLI,
        gpu_models=resources.gpu_models,
        gpu_memory_mib=resources.gpu_memory_mib,
        labels=spec.require_labels,
        tolerations=placement.tolerations,
        prefer_labels=placement.prefer_labels,
        network_mode=spec.network.mode,
        image=image or spec.image,
    )


def shape_of(demand: Demand) -> Shape:
    """The form of a request, without what only some hosts offer."""
    return Shape(
        demand.vcpu_milli,
        demand.memory_mib,
        demand.gpus,
        demand.gpu_milli if demand.gpus else DEVICE_MILLI,
        demand.gpu_models,
        demand.gpu_memory_mib,
    )


def takes_device(request: Demand | Shape) -> Callable[[str, int, bool], bool]:
    """Whether a device of that model, memory in MiB and shareability can serve the request, when free."""

    def takes(model: str, memory_mib: int, is_shareable: bool) -> bool:
        is_wanted = not request.gpu_models or model in request.gpu_models
        return (
            is_wanted and memory_mib >= request.gpu_memory_mib and (is_shareable or request.gpu_milli == DEVICE_MILLI)
        )

    return takes
