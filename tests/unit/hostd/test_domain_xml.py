"""The domain's XML: what a machine asks for and nothing else, and what no machine can ask for."""

from dataclasses import replace
from ipaddress import IPv4Address
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model.host import Accelerator
from fleet.model.ids import Digest, SandboxId
from hostd.drivers.domain_xml import (
    TCG_CMDLINE,
    QemuUser,
    domain_name,
    memory_limit_kib,
    parse_domain_name,
    render_domain,
)
from hostd.reconcile.state import BootFiles, Machine, Port, SourceDisk, mac_address

A = SandboxId("aaaaaaaaaaaa")
USER = QemuUser(64123, 64124)
ADDRESS = IPv4Address("10.77.0.2")
MACHINE = Machine(
    sandbox_id=A,
    tenant="acme",
    vcpus=2,
    memory_mib=1024,
    overhead_mib=208,
    accelerator=Accelerator.KVM,
    boot=BootFiles(Digest("sha256:" + "0" * 64), "/i/vmlinuz", "/i/initramfs.img", "/i/root.erofs", "quiet panic=-1"),
    scratch_path="/s/a.raw",
    link_path="/r/a.link",
    console_path="/l/a.console",
    generation_id="5a2b6f0e-1c55-4b0e-9a39-1f4a9d6f4a11",
    source_disks=(SourceDisk("source-0", "/d/one.erofs"), SourceDisk("source-1", "/d/two.erofs")),
    port=Port(A, mac_address(ADDRESS), ADDRESS, 16),
)


def render(machine: Machine = MACHINE) -> Element:
    return fromstring(render_domain(machine, USER))


def attribute(domain: Element, path: str, name: str) -> str | None:
    found = domain.find(path)
    assert found is not None, path
    return found.get(name)


def test_only_the_scratch_disk_can_be_written() -> None:
    """Image and sources are read-only at the device, each under the serial by which the guest finds it."""
    disks = {disk.findtext("serial"): disk for disk in render().iter("disk")}
    assert {name: disk.find("readonly") is not None for name, disk in disks.items()} == {
        "root": True,
        "scratch": False,
        "source-0": True,
        "source-1": True,
    }
    assert len({attribute(disk, "target", "dev") for disk in disks.values()}) == 4


def test_limits_are_there() -> None:
    """As many vCPUs of CPU time as there are vCPUs, memory that is neither dumped nor merged, and a bound for the whole VMM."""
    domain = render()
    assert (domain.findtext("vcpu"), domain.findtext("memory")) == ("2", "1024")
    assert (domain.findtext("cputune/global_period"), domain.findtext("cputune/global_quota")) == ("100000", "200000")
    assert attribute(domain, "memory", "dumpCore") == "off"
    assert domain.find("memoryBacking/nosharepages") is not None
    assert memory_limit_kib(MACHINE) == (1024 + 208) * 1024


def test_qemu_runs_as_its_own_user_and_relabels_nothing() -> None:
    """The label is by number, and libvirt hands no file of the host to that user."""
    label = render().find("seclabel")
    assert label is not None
    assert (label.findtext("label"), label.get("relabel"), label.get("model")) == ("+64123:+64124", "no", "dac")


def test_a_guest_has_no_more_devices_than_it_needs() -> None:
    """No display, no USB, no sound, no shared folder, no host device: what is not there cannot be attacked."""
    devices = render().find("devices")
    assert devices is not None
    assert sorted({device.tag for device in devices}) == [
        "channel",
        "controller",
        "disk",
        "emulator",
        "interface",
        "memballoon",
        "rng",
        "serial",
    ]
    assert {device.get("model") for device in devices.iter("controller")} == {"none"}


def test_the_tap_is_hostds() -> None:
    """libvirt takes the tap that has its rules already and makes none; without a port there is no interface at all."""
    domain = render()
    assert attribute(domain, "devices/interface/target", "dev") == f"bp-{A}"
    assert attribute(domain, "devices/interface/target", "managed") == "no"
    assert attribute(domain, "devices/interface/mac", "address") == "52:bd:0a:4d:00:02"
    assert render(replace(MACHINE, port=None)).find("devices/interface") is None


@pytest.mark.parametrize(
    ("accelerator", "kind", "cpu", "cmdline"),
    [
        (Accelerator.KVM, "kvm", "host-passthrough", "quiet panic=-1"),
        (Accelerator.TCG, "qemu", "maximum", f"quiet panic=-1 {TCG_CMDLINE}"),
    ],
)
def test_emulation_differs_where_it_must(accelerator: Accelerator, kind: str, cpu: str, cmdline: str) -> None:
    """CPU mitigations are switched off only where there is no CPU to mitigate."""
    domain = render(replace(MACHINE, accelerator=accelerator))
    assert domain.get("type") == kind
    assert attribute(domain, "cpu", "mode") == cpu
    assert domain.findtext("os/cmdline") == cmdline
    assert (domain.find("features/tcg") is not None) == (accelerator is Accelerator.TCG)


def test_it_ends_rather_than_starts_again() -> None:
    """Whatever a guest does to itself ends its domain: only hostd starts one."""
    domain = render()
    assert {domain.findtext(event) for event in ("on_poweroff", "on_reboot", "on_crash")} == {"destroy"}
    assert domain.findtext("genid") == MACHINE.generation_id


@pytest.mark.parametrize(
    "name", ["bp-", "bp-aaaaaaaaaaa", "aaaaaaaaaaaa", "bp-AAAAAAAAAAAA", "bp-aaaaaaaaaaaa-x", "web"]
)
def test_a_domain_of_somebody_else_is_left_alone(name: str) -> None:
    """Only names that we make are ours."""
    assert parse_domain_name(name) is None
    assert parse_domain_name(domain_name(A)) == A


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1))
def test_any_path_and_tenant_come_through(text: str) -> None:
    """Whatever is in a path stays in its place: nobody writes XML into a domain."""
    domain = render(replace(MACHINE, scratch_path=text, tenant=text))
    paths = [disk.find("source") for disk in domain.iter("disk") if disk.findtext("serial") == "scratch"]
    assert [path.get("file") for path in paths if path is not None] == [text]
    assert domain.findtext("title") == f"{text}/{A}"
