"""hostd's configuration: what cannot work is refused at the start, by field, with what to write instead."""

from pathlib import Path

import pytest

from fleet.config import load_config, parse_config
from fleet.errors import InvalidSpecError
from hostd.config import HostdConfig
from hostd.drivers.domain_xml import QemuUser

USUAL = """
host_id = "rack1-07"
etcd = ["10.0.0.5:2379"]
listen = "10.0.1.7:7611"
[tls]
ca = "ca.crt"
certificate = "host.crt"
key = "host.key"
"""


def parse(text: str) -> HostdConfig:
    config = parse_config(HostdConfig, text, "hostd.toml")
    config.check()
    return config


def test_the_page_of_the_operator_is_true(tmp_path: Path) -> None:
    """The example in docs/operator.md loads, and says the defaults where it says so."""
    page = (Path(__file__).parents[3] / "docs" / "operator.md").read_text()
    example = page.split("## hostd")[1].split("```toml")[1].split("```")[0]
    path = tmp_path / "hostd.toml"
    path.write_text(example.replace('advertise = ""', 'advertise = "10.0.1.7:7611"'))
    shown, bare = load_config(HostdConfig, path), parse_config(HostdConfig, USUAL, "usual")
    shown.check()
    for name in ("libvirt_uri", "qemu_user", "images_dir", "state_dir", "run_dir", "log_dir", "network"):
        assert getattr(shown, name) == getattr(bare, name)
    assert shown.inventory.capacity == bare.inventory.capacity
    assert shown.inventory.labels == {"zone": "rack1"}


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"rack1-07"', '"Rack 1"', "host_id"),
        ('listen = "10.0.1.7:7611"', 'listen = "0.0.0.0:7611"', "advertise"),
        ('listen = "10.0.1.7:7611"', "", "advertise"),
        ("[tls]", '[network]\naddress = "10.77.0.0.1"\n[tls]', "network.address"),
        ("[tls]", "[inventory]\ncapcity = 3\n[tls]", "inventory.capcity"),
        ("[tls]", "[inventory.capacity]\nvcpus = true\n[tls]", "inventory.capacity.vcpus"),
        ('etcd = ["10.0.0.5:2379"]', "", "etcd"),
        ('etcd = ["10.0.0.5:2379"]', "etcd = []", "etcd"),
        ("[tls]", 'log_level = "loud"\n[tls]', "log_level"),
        ("[tls]", '[network]\naddress = "10.77.0.1/31"\n[tls]', "network.address"),
        ("[tls]", "[inventory.capacity]\nsandboxes = -1\n[tls]", "inventory.capacity.sandboxes"),
        ("[tls]", '[inventory.labels]\nrack = "rack 1!"\n[tls]', "inventory.labels.rack"),
    ],
)
def test_what_cannot_work_is_refused(old: str, new: str, field: str) -> None:
    """The error names the field and the next step."""
    with pytest.raises(InvalidSpecError) as caught:
        parse(USUAL.replace(old, new))
    assert (caught.value.field, bool(caught.value.next_step)) == (field, True)


def test_qemus_user_may_be_a_number_or_a_name() -> None:
    """A number needs no account; a name that this machine does not know is refused before any VM starts."""
    assert parse('qemu_user = "64123"\n' + USUAL).find_qemu_user() == QemuUser(64123, 64123)
    assert parse('qemu_user = "root"\n' + USUAL).find_qemu_user() == QemuUser(0, 0)
    with pytest.raises(InvalidSpecError, match="nobody-of-that-name"):
        parse('qemu_user = "nobody-of-that-name"\n' + USUAL).find_qemu_user()
