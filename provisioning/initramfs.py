"""Writes the initramfs: busybox, a handful of kernel modules, and one script. Not compressed: an emulated CPU copies faster."""

import stat
from pathlib import Path

from provisioning.cpio import CpioMember, write_cpio
from provisioning.modules import load_order, read_module, read_modules, unpacked_name
from provisioning.recipe import Recipe
from provisioning.rootfs import GUEST_DIR

APPLETS = ("insmod", "mkdir", "mount", "poweroff", "reboot", "sh", "sleep", "switch_root", "umount", "chmod")
FOLDERS = ("bin", "dev", "lib", "lib/modules", "lower", "new", "proc", "scratch", "sys")


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
    members += [CpioMember(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox") for applet in APPLETS]
    members += [
        CpioMember("lib/modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in names).encode()),
        CpioMember("bin/busybox", stat.S_IFREG | 0o755, (root / "usr/bin/busybox").read_bytes()),
        CpioMember("init", stat.S_IFREG | 0o755, (GUEST_DIR / "initramfs-init").read_bytes()),
        # The kernel opens it for PID 1 before anything is mounted.
        CpioMember("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
    ]
    return write_cpio(members, recipe.epoch_s)
