"""Writes the initramfs: busybox, dmsetup, a handful of kernel modules, and one script.

Not compressed: an emulated CPU copies faster.
"""

import stat
from pathlib import Path

from provisioning.cpio import CpioMember, write_cpio
from provisioning.modules import load_order, read_module, read_modules, unpacked_name
from provisioning.programs import LOADER, LOADER_ALIAS, needed_files
from provisioning.recipe import Recipe
from provisioning.rootfs import GUEST_DIR

APPLETS = ("chmod", "grep", "insmod", "mkdir", "mount", "poweroff", "reboot", "sh", "sleep", "switch_root", "umount")
FOLDERS = (
    "bin",
    "dev",
    "lib",
    "lib/modules",
    "lib/x86_64-linux-gnu",
    "lib64",
    "lower",
    "new",
    "proc",
    "scratch",
    "sys",
)
# Loaded only where the CPU has the instructions: an emulated one is faster without.
SHA_NI_MODULE = "sha256_ssse3"


def build_initramfs(root: Path, recipe: Recipe) -> bytes:
    """The initramfs for the kernel in `root`, as an uncompressed cpio."""
    modules = read_modules(root)
    order = load_order(modules, recipe.early_modules)
    names = [unpacked_name(path).rsplit("/", 1)[-1] for path in order]
    members = [CpioMember(folder, stat.S_IFDIR | 0o755) for folder in FOLDERS]
    members += [
        CpioMember(f"lib/modules/{name}", stat.S_IFREG | 0o644, read_module(modules, path))
        for name, path in zip(names, order, strict=True)
    ]
    members += _dmsetup(root)
    (sha_ni,) = load_order(modules, (SHA_NI_MODULE,))
    members.append(CpioMember("lib/modules/sha-ni.ko", stat.S_IFREG | 0o644, read_module(modules, sha_ni)))
    members += [CpioMember(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox") for applet in APPLETS]
    members += [
        CpioMember("lib/modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in names).encode()),
        CpioMember("bin/busybox", stat.S_IFREG | 0o755, (root / "usr/bin/busybox").read_bytes()),
        CpioMember("init", stat.S_IFREG | 0o755, (GUEST_DIR / "initramfs-init").read_bytes()),
        # The kernel opens it for PID 1 before anything is mounted.
        CpioMember("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
    ]
    return write_cpio(members, recipe.epoch_s)


def _dmsetup(root: Path) -> list[CpioMember]:
    """The program that sets up device-mapper targets, with its libraries where the loader looks first."""
    places = {"usr/sbin/dmsetup": "bin/dmsetup", LOADER: LOADER_ALIAS}
    return [
        CpioMember(
            places.get(path, f"lib/x86_64-linux-gnu/{path.rsplit('/', 1)[-1]}"),
            stat.S_IFREG | 0o755,
            (root / path).read_bytes(),
        )
        for path in needed_files(root, "usr/sbin/dmsetup")
    ]
