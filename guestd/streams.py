"""Files on their way to the host: sent in order, at most AHEAD_BYTES_MAX ahead of what the host holds durably."""

from __future__ import annotations

import os

from guestd.link import PAYLOAD_BYTES_MAX

AHEAD_BYTES_MAX = 1024 * 1024


class Stream:
    """One file that only grows. What has been sent counts for one session, the file for ever."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._sent = 0
        self._acked = 0

    @property
    def size(self) -> int:
        """How many bytes there are by now."""
        return os.fstat(self._file).st_size

    @property
    def is_sent(self) -> bool:
        """Whether everything there is by now has been sent."""
        return self._sent >= self.size

    def resume(self, offset: int) -> None:
        """The host holds everything before `offset`: go on from there."""
        self._sent = self._acked = min(max(offset, 0), self.size)

    def acknowledge(self, offset: int) -> None:
        """The host holds everything before `offset`."""
        self._acked = min(max(self._acked, offset), self._sent)

    def take_chunk(self) -> tuple[int, bytes] | None:
        """Offset and bytes of what may be sent next, or None for nothing now."""
        count = min(self._acked + AHEAD_BYTES_MAX - self._sent, PAYLOAD_BYTES_MAX)
        content = os.pread(self._file, count, self._sent) if count > 0 else b""
        if not content:
            return None
        offset, self._sent = self._sent, self._sent + len(content)
        return offset, content
