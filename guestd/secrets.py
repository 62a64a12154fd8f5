"""Values that lie on a tmpfs of their own and nowhere else: nothing here is written to a disk, logged, or told to anybody.

<folder>/NAME       0400, owned by the user agent; the folder 0500
"""

from __future__ import annotations

import os

from guestd import AGENT_ID
from guestd.configuration import SECRET_NAME
from guestd.fault import GuestFault
from guestd.kernel import MS_NODEV, MS_NOEXEC, MS_NOSUID, mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# As docs/guest-link.md and admission have them.
VALUE_BYTES_MAX = 64 * 1024
SECRETS_MAX = 32
# All values of a sandbox (256 KiB) in whole pages, and room to replace one of them at once.
TMPFS_OPTIONS = f"size=1m,nr_inodes=256,mode=0500,uid={AGENT_ID},gid={AGENT_ID}"


class Secrets:
    """The values of this boot, by name; a restarted guestd finds them again."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def put(self, name: str, value: bytes) -> None:
        """Keep a value, the last one of its name; raises ValueError past the limits, OSError when it cannot be kept."""
        if not SECRET_NAME.fullmatch(name):
            raise ValueError("a secret's name is no name of a variable")
        if len(value) > VALUE_BYTES_MAX or (name not in self.names() and len(self.names()) >= SECRETS_MAX):
            raise ValueError("too long a secret, or too many")
        self._ensure_mounted()
        path, temporary = f"{self._folder}/{name}", f"{self._folder}/.{name}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
        try:
            os.fchown(descriptor, AGENT_ID, AGENT_ID)
            left = memoryview(value)
            while left:
                left = left[os.write(descriptor, left) :]
        finally:
            os.close(descriptor)
        os.rename(temporary, path)

    def require(self, names: Sequence[str]) -> None:
        """Every one of these is there; raises GuestFault `secrets_missing`."""
        missing = sorted(set(names) - self.names())
        if missing:
            raise GuestFault("secrets_missing", f"no value has arrived for the secrets {', '.join(missing)}")

    def names(self) -> set[str]:
        """Of which secrets there are values."""
        if not os.path.ismount(self._folder):
            return set()
        return {name for name in os.listdir(self._folder) if SECRET_NAME.fullmatch(name)}

    def _ensure_mounted(self) -> None:
        if not os.path.ismount(self._folder):
            os.makedirs(self._folder, mode=0o500, exist_ok=True)
            mount("tmpfs", self._folder, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, TMPFS_OPTIONS)
