"""Which kernel modules an image carries: the dependency closure of a few names. Reads an unpacked root, changes nothing."""

import lzma
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import HostFaultError

# The largest module of the cloud kernel unpacks to 6 MB; more than this is no module.
MODULE_MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class KernelModules:
    """The modules of one kernel: dependencies by path and paths by name (dashes written as underscores)."""

    release: str
    folder: Path
    depends: dict[str, tuple[str, ...]]
    builtin: frozenset[str]


def read_modules(root: Path) -> KernelModules:
    """Reads modules.dep of the one kernel in `root`. Raises HostFaultError when there is not exactly one."""
    folders = sorted((root / "usr/lib/modules").iterdir())
    if len(folders) != 1:
        raise HostFaultError("kernel_not_found", f"one kernel is needed, not {[folder.name for folder in folders]}")
    folder = folders[0]
    depends = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        depends[path] = tuple(needed.split())
    builtin = frozenset(module_name(line) for line in (folder / "modules.builtin").read_text().splitlines())
    return KernelModules(folder.name, folder, depends, builtin)


def module_name(path: str) -> str:
    """`kernel/drivers/x/virtio-rng.ko.xz` is the module `virtio_rng`."""
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


def load_order(modules: KernelModules, names: tuple[str, ...]) -> tuple[str, ...]:
    """The paths to load for `names`, each after everything it needs; builtin ones are left out.

    Raises HostFaultError for a name this kernel does not have.
    """
    by_name = {module_name(path): path for path in modules.depends}
    ordered: list[str] = []

    def visit(path: str) -> None:
        if path not in ordered:
            for needed in modules.depends[path]:
                visit(needed)
            ordered.append(path)

    for name in names:
        plain = name.replace("-", "_")
        if plain in modules.builtin:
            continue
        if plain not in by_name:
            raise HostFaultError("kernel_module_not_found", f"kernel {modules.release} has no module {name}")
        visit(by_name[plain])
    return tuple(ordered)


def read_module(modules: KernelModules, path: str) -> bytes:
    """A module's content, unpacked: emulated CPUs take longer to unpack xz than to read."""
    content = (modules.folder / path).read_bytes()
    if path.endswith(".xz"):
        content = lzma.LZMADecompressor().decompress(content, MODULE_MAX_BYTES)
    return content


def unpacked_name(path: str) -> str:
    """The module's path without the compression's suffix."""
    return path.removesuffix(".xz")
