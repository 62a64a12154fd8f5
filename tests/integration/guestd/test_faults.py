"""What goes wrong around a running guest: guestd is killed, hostd comes and goes, a root inside does its worst, a disk is bad."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.model.sandbox import Agent, AgentPhase, Goal
from provisioning.cpio import CpioMember, write_cpio
from tests.integration.guestd.parts import A, Boot, Host, Site, pack_tree

pytestmark = [pytest.mark.root, pytest.mark.vm]

# Runs as root beside guestd, in this test only: kills guestd when an agent asks for it, and attacks the source's disk.
ROOT_SCRIPT = r"""#!/bin/sh
say() { echo "$*" >>/run/bedplate/scratch/root-said; }
disk=
while [ ! -e /workspace/wanted ]; do sleep 0.1; done
for found in /sys/block/vd*; do
    read -r serial <"$found/serial"
    [ "$serial" = source-0 ] && disk=/dev/${found##*/}
done
before=$(sha256sum <"$disk")
blockdev --setrw "$disk"
dd if=/dev/zero of="$disk" bs=4096 count=8 conv=fsync 2>/dev/null && say written
mount -o remount,rw "$disk" /run/bedplate/scratch/sources/0/lower 2>/dev/null && say remounted
echo 3 >/proc/sys/vm/drop_caches
[ "$before" = "$(sha256sum <"$disk")" ] && say same
cp /run/bedplate/scratch/root-said /workspace/root-said
for pid in $(cat /sys/fs/cgroup/bedplate/guestd/cgroup.procs); do
    read -r _ _ _ parent _ <"/proc/$pid/stat"
    case "$(tr '\0' ' ' <"/proc/$parent/cmdline")" in
    *guestd-loop*) kill -9 "$pid" && touch /workspace/killed ;;
    esac
done
"""
# The initramfs that follows replaces this file: the image's own, with one line more.
SWITCH = "exec switch_root"
START_ROOT = """
init=/new/usr/lib/bedplate/init
busybox cp /root-script /new/run/root-script
{ echo '#!/bin/sh'; echo '/bin/sh /run/root-script </dev/null &'; busybox cat $init; } >$init.new
busybox mv $init.new $init
chmod 0755 $init
"""

COUNTER = """
import os, pathlib, time
print("pid", os.getpid(), flush=True)
for number in range(2000):
    print(number, "x" * 500, flush=True)
    if number == 1000:
        pathlib.Path("/workspace/wanted").touch()
        while not pathlib.Path("/workspace/killed").exists():
            time.sleep(0.05)
raise SystemExit(5)
"""


def build_hostile_initramfs(boot: Boot, folder: Path) -> Path:
    """The image's initramfs, and after it one more whose init also starts ROOT_SCRIPT."""
    init = Path("provisioning/guest/initramfs-init").read_text()
    assert SWITCH in init
    members = [
        CpioMember("init", 0o100755, init.replace(SWITCH, START_ROOT + SWITCH).encode()),
        CpioMember("root-script", 0o100755, ROOT_SCRIPT.encode()),
    ]
    path = folder / "initramfs.img"
    path.write_bytes(boot.initramfs.read_bytes() + write_cpio(members, 0))
    return path


async def test_guestd_killed_in_mid_run_loses_nothing(site: Site) -> None:
    """kill -9 of guestd: its agent runs on, is not started again, and its output and exit code are complete.

    The same boot has a root that attacks the source's disk, which stays as it was, and a hostd that goes away and comes back.
    """
    initramfs = build_hostile_initramfs(site.boot, site.folder)
    agents = [Agent("counter", "custom", ("python3", "-c", COUNTER)), Agent("sleeper", "custom", ("sleep", "1000"))]
    vm, order = await site.start([(pack_tree({"a.txt": "a\n"}), "/workspace", False)], agents, initramfs=initramfs)
    first = Host(site.folder / "state", vm, order)
    await first.until(lambda: first.orders.output_bytes(A, "counter") > 100_000)
    await first.crash()
    second = Host(site.folder / "state", vm, order)
    try:
        await second.until(lambda: second.orders.progress[A].agents[0].phase is AgentPhase.FAILED)
        # By now, or while no hostd was there.
        assert "restart 1 of 5" in vm.console()
        hellos = [*first.links.of_type("hello"), *second.links.of_type("hello")]
        boots = {message.fields["boot_id"] for message in hellos}
        assert len(boots) == 1
        await second.until(lambda: bool(second.links.of_type("heartbeat")))
        second.orders.put_order(replace(order, goal=Goal.STOP))
        await second.sessions.press_on(A)
        await second.finish()
        assert await vm.wait() == 0
    finally:
        await second.crash()
    counter, sleeper = second.progress.agents
    lines = second.output("counter").decode().splitlines()
    assert [line.split()[0] for line in lines] == ["pid", *map(str, range(2000))]
    assert (counter.exit_code, sleeper.signal, sleeper.exit_code) == (5, 15, None)
    with tarfile.open(second.orders.artifact_path(A)) as archive:
        said = archive.extractfile("0/root-said")
        assert said is not None
        assert said.read() == b"same\n"
        listing = archive.extractfile("changes.json")
        assert listing is not None
        changes = [change["path"] for change in json.load(listing)["sources"][0]["changes"]]
    assert changes == ["killed", "root-said", "wanted"]
    beat = second.links.of_type("heartbeat")[0].fields
    assert beat["uptime_s"] > 0
    assert 0 < beat["memory_used_mib"] < 512


async def test_a_bad_source_is_a_failure_with_its_reason(boot: Boot, tmp_path: Path) -> None:
    """A disk that is no EROFS ends the sandbox with a code and a sentence, and no agent is started."""
    bad = tmp_path / "bad.erofs"
    bad.write_bytes(bytes(1024 * 1024))
    site = Site(boot, tmp_path)
    content = pack_tree({"a.txt": "a\n"})
    vm, order = await site.start([(content, "/workspace", False)], [Agent("a", "custom", ("true",))], replace_disk=bad)
    host = Host(tmp_path / "state", vm, order)
    try:
        await host.finish()
        assert await vm.wait() == 0
    finally:
        await host.crash()
        site.close()
    failure = host.progress.failure
    assert failure is not None
    assert failure.code == "source_failed"
    assert "/workspace (disk source-0) cannot be mounted" in failure.message
    assert host.links.of_type("agent") == []


async def test_a_full_disk_hides_no_end(boot: Boot, tmp_path: Path) -> None:
    """An agent that fills the disk is told with its exit code and why its output is cut, and the small change is still packed."""
    site = Site(boot, tmp_path)
    fill = "echo small > /workspace/small; cat /dev/zero > /tmp/fill; echo full; exit 4"
    agents = [Agent("filler", "custom", ("sh", "-c", fill))]
    vm, order = await site.start([(pack_tree({"a.txt": "a\n"}), "/workspace", False)], agents)
    host = Host(tmp_path / "state", vm, order)
    try:
        await host.finish()
        assert await vm.wait() == 0
    finally:
        await host.crash()
        site.close()
    (filler,) = host.progress.agents
    assert (filler.exit_code, filler.output_truncated) == (4, True)
    assert filler.reason is not None
    assert "its output was cut: No space left on device" in filler.reason.message
    assert host.progress.artifact is not None
    assert host.progress.artifact.changes == 1
