"""What touches the machine: libvirt, the network, disks, the guest link. Only hostd.__main__ chooses which."""
