"""Domains through libvirt, and what they may run on: the only home of libvirt."""

from hostd.drivers.hypervisor.domains import LibvirtHypervisor
from hostd.drivers.hypervisor.probe import AcceleratorProbe

__all__ = ["AcceleratorProbe", "LibvirtHypervisor"]
