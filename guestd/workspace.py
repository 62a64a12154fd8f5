"""Puts sources where agents find them: read-only EROFS disks, under an overlay on the scratch disk unless they are readonly.

    <folder>/<index>/lower      the source's disk, read-only; the device itself is read-only too
    <folder>/<index>/upper      what agents change, work/ beside it
    <guest_path>                the overlay, or for a readonly source its disk

Only root passes <folder>; agents see guest_path alone.
"""

from __future__ import annotations

import errno
import os
import stat

from guestd import AGENT_ID
from guestd.fault import GuestFault
from guestd.kernel import MS_NOATIME, MS_NODEV, MS_NOSUID, MS_RDONLY, mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestd.configuration import Source

BLOCK_DIR = "/sys/block"

_FLAGS = MS_NOSUID | MS_NODEV | MS_NOATIME
# Without these features every change is plain in the upper tree: a whiteout, an opaque folder, or the whole file.
_PLAIN = "redirect_dir=off,index=off,metacopy=off"


def ensure_sources(sources: Sequence[Source], folder: str) -> None:
    """Every source is mounted at its path; raises GuestFault `source_failed`. Safe to repeat after a restart."""
    for index, source in enumerate(sources):
        try:
            _ensure_source(source, f"{folder}/{index}")
        except OSError as error:
            message = f"the source for {source.guest_path} (disk {source.serial}) cannot be mounted: {error}"
            raise GuestFault("source_failed", message) from error


def find_disk(serial: str, block_dir: str = BLOCK_DIR) -> str:
    """The device of the disk with that serial; raises FileNotFoundError."""
    for name in sorted(os.listdir(block_dir)):
        try:
            with open(f"{block_dir}/{name}/serial") as stream:
                found = stream.read().strip()
        except FileNotFoundError:
            continue
        if found == serial:
            return f"/dev/{name}"
    raise FileNotFoundError(f"no disk has the serial {serial}")


def _ensure_source(source: Source, folder: str) -> None:
    _make_folders(source.guest_path)
    if os.path.ismount(source.guest_path):
        return
    if source.readonly:
        mount(find_disk(source.serial), source.guest_path, "erofs", _FLAGS | MS_RDONLY)
        return
    lower, upper, work = f"{folder}/lower", f"{folder}/upper", f"{folder}/work"
    for path in (lower, upper, work):
        os.makedirs(path, mode=0o700, exist_ok=True)
    if not os.path.ismount(lower):
        mount(find_disk(source.serial), lower, "erofs", _FLAGS | MS_RDONLY)
    # The overlay's own root takes owner and mode of the upper one. Once: in a later boot it is as agents left it.
    if os.stat(upper).st_uid != AGENT_ID:
        os.chmod(upper, stat.S_IMODE(os.stat(lower).st_mode))
        os.chown(upper, AGENT_ID, AGENT_ID)
    options = f"lowerdir={lower},upperdir={upper},workdir={work},{_PLAIN}"
    mount("overlay", source.guest_path, "overlay", _FLAGS, options)


def _make_folders(path: str) -> None:
    """Folders up to `path`; each new one belongs to whom its parent belongs, so that what lies in the agent's home is its own.

    A sandbox that is started again is as its agents left it: a symlink of theirs on the way would have what they own mounted
    wherever they like. Raises OSError for one.
    """
    parent = os.path.dirname(path)
    if parent == path:
        return
    _make_folders(parent)
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        os.mkdir(path, 0o755)
        owner = os.stat(parent)
        os.chown(path, owner.st_uid, owner.st_gid)
        return
    if stat.S_ISLNK(found.st_mode) and found.st_uid != 0:
        raise OSError(errno.ELOOP, "a symlink that is not root's stands in the way", path)
