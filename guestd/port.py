"""The virtio port that leads to the host (linux/drivers/char/virtio_console.c), as a descriptor that never blocks."""

from __future__ import annotations

import contextlib
import os
import time

PORT_NAME = "org.bedplate.guest.0"
PORTS_DIR = "/sys/class/virtio-ports"
READ_BYTES = 64 * 1024
# The driver names its ports while we start, and a guestd that was killed holds the port for a moment.
OPEN_TRIES, OPEN_INTERVAL_S = 1500, 0.02


class Port:
    """Bytes from and to the host, over whatever is connected to the port at the moment."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        os.set_blocking(descriptor, False)

    def read(self) -> bytes | None:
        """What has come, None when nothing has, b"" when no host is connected."""
        try:
            return os.read(self.descriptor, READ_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b""

    def write(self, content: memoryview) -> int:
        """How many bytes of `content` were taken: 0 when the host takes none now, or none is connected."""
        try:
            return os.write(self.descriptor, content)
        except (BlockingIOError, ConnectionError):
            return 0


def open_port(name: str = PORT_NAME, ports_dir: str = PORTS_DIR) -> Port:
    """The port of that name, found without udev, which has not run yet; raises OSError when none comes up."""
    for _ in range(OPEN_TRIES):
        with contextlib.suppress(OSError):
            for entry in os.listdir(ports_dir):
                if _read_name(f"{ports_dir}/{entry}/name") == name:
                    return Port(os.open(f"/dev/{entry}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        time.sleep(OPEN_INTERVAL_S)
    raise FileNotFoundError(f"no virtio port is called {name}, or another process holds it")


def _read_name(path: str) -> str:
    with open(path) as stream:
        return stream.read().strip()
