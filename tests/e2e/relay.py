"""A way between two programs that a test can cut: bytes pass through it until it is, and then neither side hears anything."""

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 65536
# How soon a connection sees that it shall end.
LOOK_S = 0.1


class Relay:
    """Listens on loopback and passes on what comes to `target`. Cut, it takes calls and bytes, and drops them."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LOOK_S)
        self._threads: list[threading.Thread] = []
        self._era = 0
        self._is_closed = self.is_cut = False
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Within it nothing passes; then whoever was connected has to begin anew."""
        self.is_cut = True
        try:
            yield
        finally:
            self._era += 1
            self.is_cut = False

    def close(self) -> None:
        """Ends the listener and every connection."""
        self._is_closed = True
        for thread in tuple(self._threads):
            thread.join()

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with self._listener:
            while not self._is_closed:
                with suppress(TimeoutError):
                    self._start(self._carry, self._listener.accept()[0])

    def _carry(self, near: socket.socket) -> None:
        era = self._era
        with near, suppress(OSError), socket.create_connection(self._target) as far:
            other = {near: far, far: near}
            while era == self._era and not self._is_closed:
                for end in select.select([near, far], [], [], LOOK_S)[0]:
                    chunk = end.recv(CHUNK_BYTES)
                    if not chunk:
                        return
                    if not self.is_cut:
                        other[end].sendall(chunk)
