"""guestd's one loop: bytes from the port, nudges from supervisors, a heartbeat; then all that may be sent.

hung up -- a byte arrives --> hunting for MAGIC -- marker --> in session; a read of 0 bytes at any time --> hung up
"""

from __future__ import annotations

import math
import select
import time

from guestd.link import FrameError, FrameReader, Outbox
from guestd.state import take_nudges
from guestd.workload import reap_children

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from guestd.guest import Guest
    from guestd.port import Port

HEARTBEAT_S = 5.0
# A port without a host is always "ready": it is not polled but asked this often whether one has come.
RECONNECT_S = 0.1
# So long without anything to do, and it is time for what nobody waits for.
REST_S = 0.05


class Loop:
    """Runs the guest on a port. What stands in no session is dropped, here and by the host."""

    def __init__(self, port: Port, nudges: int, guest: Guest, outbox: Outbox) -> None:
        self._port = port
        self._nudges = nudges
        self._guest = guest
        self._outbox = outbox
        self._reader = FrameReader()
        self._is_hung_up = False
        self._started_at_s = time.monotonic()
        self._beat_at_s = self._started_at_s + HEARTBEAT_S

    def run(self) -> NoReturn:
        """Until the machine ends."""
        while True:
            self.turn(self._wait_s())

    def turn(self, wait_s: float) -> None:
        """Wait for something to happen, at most so long, and do all that it calls for."""
        poll = select.poll()
        poll.register(self._nudges, select.POLLIN)
        if not self._is_hung_up:
            poll.register(self._port.descriptor, select.POLLIN | (0 if self._outbox.is_empty else select.POLLOUT))
        self._guest.watch(poll)
        is_idle = not poll.poll(wait_s * 1000)
        self._receive()
        is_due = time.monotonic() >= self._beat_at_s
        has_program_ended = self._reap(is_due=is_due)
        if take_nudges(self._nudges) or is_due:
            self._guest.look()
        if is_due:
            self._beat_at_s = time.monotonic() + HEARTBEAT_S
            self._guest.beat(time.clock_gettime(time.CLOCK_BOOTTIME))
        self._guest.fill()
        self._outbox.flush(self._port.write)
        if is_idle or has_program_ended:
            self._guest.rest()

    def _reap(self, *, is_due: bool) -> bool:
        """Children that have ended; whether any of them was a program's."""
        ended = reap_children()
        count = len(ended)
        self._guest.take_ends(ended)
        if ended or is_due:
            self._guest.watch_over()
        return len(ended) < count

    def _wait_s(self) -> float:
        wait_s = min(self._beat_at_s, self._guest.next_at_s) - time.monotonic()
        if self._is_hung_up:
            wait_s = min(wait_s, RECONNECT_S)
        if self._guest.wants_rest:
            wait_s = min(wait_s, REST_S)
        # Rounded up: poll waits whole milliseconds, and would return just before what is due.
        return max(0.0, math.ceil(wait_s * 1000) / 1000)

    def _receive(self) -> None:
        content = self._port.read()
        self._is_hung_up = content == b""
        if self._is_hung_up:
            self._reader.reset()
            self._outbox.clear()
            self._guest.hang_up()
        if content:
            try:
                self._take(content)
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError, FrameError):
                self._break()

    def _take(self, content: bytes) -> None:
        nonce, messages = self._reader.feed(content)
        if nonce is not None:
            self._outbox.restart(nonce)
            self._guest.greet()
        for message in messages:
            self._guest.take(message)

    def _break(self) -> None:
        """The host made no sense."""
        self._reader.reset()
        self._guest.hang_up()
        self._outbox.resync()
