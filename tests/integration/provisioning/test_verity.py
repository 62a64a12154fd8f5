"""A root disk that is changed under a guest, behind every check of the host: the guest does not go on with it."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from provisioning.build import ensure_image
from provisioning.cpio import CpioMember, write_cpio
from provisioning.imagestore import image_path
from provisioning.recipe import load_recipe
from provisioning.rootfs import GUEST_DIR
from provisioning.verify import verify_image

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(600)]

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
# A boot takes 3 s alone and reading the disk 10; emulated and on a busy machine many times that.
PATIENCE_S = 240
SCRATCH_BYTES = 64 * 1024 * 1024
QEMU = ["qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-M", "q35", "-m", "512"]
BARE = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]
# Our own first process up to where it would start the real root; then the whole disk is read, when the test says so.
LAST_STEP = "exec switch_root"
READ_ALL = """
echo "test: booted" >/new/dev/console
read -r _ </new/dev/console
busybox cat /new/dev/dm-0 >/dev/null && echo "test: all was read" >/new/dev/console
poweroff -f
"""


class Guest:
    """A guest of the image `base` on copies of its disks; `root` is the file behind its root disk."""

    def __init__(self, process: "subprocess.Popen[str]", root: Path) -> None:
        self.root = root
        self.console = ""
        self._is_over = False
        self._process = process
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def until(self, text: str) -> None:
        """Returns when the console said `text`."""
        with self._news:
            self._news.wait_for(lambda: text in self.console or self._is_over, PATIENCE_S)
        assert text in self.console, self.console[-3000:]

    def go_on(self) -> None:
        """Tells the guest to read its whole disk."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """The whole console, once QEMU has ended by itself."""
        self._process.wait(PATIENCE_S)
        self._reader.join()
        return self.console

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.console += line
                self._news.notify_all()
        with self._news:
            self._is_over = True
            self._news.notify_all()


@contextmanager
def _start(folder: Path, flipped_before: int | None = None) -> Iterator[Guest]:
    digest = ensure_image(load_recipe("base"), CACHE / "images", CACHE, print)[0]
    image = image_path(CACHE / "images", digest)
    root, scratch, initramfs = folder / "root", folder / "scratch", folder / "initramfs"
    shutil.copyfile(image / "root.erofs", root)
    if flipped_before is not None:
        flip_bit(root, flipped_before)
    with scratch.open("wb") as stream:
        stream.truncate(SCRATCH_BYTES)
    subprocess.run(["mkfs.ext4", "-q", str(scratch)], check=True)
    script = (GUEST_DIR / "initramfs-init").read_text().partition(LAST_STEP)[0] + READ_ALL
    members = write_cpio([CpioMember("init", 0o100755, script.encode())], 0)
    initramfs.write_bytes((image / "initramfs.img").read_bytes() + members)
    disks = []
    for name, options in (("root", ",readonly=on"), ("scratch", "")):
        disks += ["-drive", f"file={folder / name},if=none,id={name},format=raw,file.locking=off{options}"]
        disks += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
    boot = ["-kernel", str(image / "vmlinuz"), "-initrd", str(initramfs)]
    boot += ["-append", verify_image(image, digest).cmdline + " mitigations=off tsc=reliable no_timer_check"]
    process = subprocess.Popen(
        [*QEMU, *BARE, *boot, *disks], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    with process:
        guest = Guest(process, root)
        try:
            yield guest
        finally:
            process.kill()
            guest.end()
    for path in (root, scratch):
        path.unlink()


def flip_bit(path: Path, offset: int) -> None:
    """Changes one bit of a file in its place."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def test_an_unchanged_disk_is_read_to_its_end(tmp_path: Path) -> None:
    """Every block of the image is what its hash tree says: what follows is refused for the change alone."""
    with _start(tmp_path) as guest:
        guest.until("test: booted")
        guest.go_on()
        guest.until("test: all was read")
        assert "dm-verity" not in guest.end()


def test_a_bit_flipped_under_a_running_guest_panics_it(tmp_path: Path) -> None:
    """Whoever writes to the file behind a running guest's disk, past the host's check, gets no changed byte into the guest."""
    with _start(tmp_path) as guest:
        guest.until("test: booted")
        flip_bit(guest.root, guest.root.stat().st_size // 2)
        guest.go_on()
        console = guest.end()
    assert "Kernel panic - not syncing: dm-verity device corrupted" in console, console[-3000:]
    assert "test: all was read" not in console


def test_a_disk_flipped_before_the_boot_is_not_mounted(tmp_path: Path) -> None:
    """One bit in the filesystem's first block, and the guest ends before anything of the root runs."""
    with _start(tmp_path, flipped_before=1024 + 8) as guest:
        console = guest.end()
    assert "Kernel panic - not syncing: dm-verity device corrupted" in console, console[-3000:]
    assert "test: booted" not in console


def test_a_changed_hash_tree_is_not_believed(tmp_path: Path) -> None:
    """The tree lies on the same disk as the data: one bit of it changed is found against its top in the command line."""
    digest = ensure_image(load_recipe("base"), CACHE / "images", CACHE, print)[0]
    cmdline = verify_image(image_path(CACHE / "images", digest), digest).cmdline
    data_blocks = int(cmdline.partition("bedplate.verity=")[2].split(",")[1])
    with _start(tmp_path, flipped_before=data_blocks * 4096) as guest:
        console = guest.end()
    assert "Kernel panic - not syncing: dm-verity device corrupted" in console, console[-3000:]
    assert "test: booted" not in console
