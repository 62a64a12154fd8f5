"""The terminal of an agent that can be watched: the supervisor holds it, and a tmux window shows it through a socket.

    agent <-- PTY --> supervisor <-- /run/bedplate/session-NAME (unix socket) --> guestd.relay, in a window of tmux

Output goes to the agent's file first, whoever watches. A viewer that does not keep up loses its connection, never the agent's time.
What viewers send are frames of guestd.relay: keys, and the size of their window.
"""

from __future__ import annotations

import contextlib
import os
import select
import termios
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, socket

from guestd import AGENT_ID
from guestd.relay import FRAME, KEYS, KEYS_BYTES_MAX, SIZE
from guestd.workload.cgroup import Cgroup
from guestd.workload.confine import become_agent, build_environment, enter_confinement
from guestd.workload.terminal import SESSION_TERM, open_terminal, resize_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

FOLDER = "/run/bedplate"
TMUX = "/usr/bin/tmux"
TMUX_SOCKET = f"{FOLDER}/tmux"
# As a terminal is when nobody says how large it is; the first viewer's window changes it.
COLUMNS, ROWS = 80, 24
# The window's relay, and whoever looks for himself.
VIEWERS_MAX = 4
# What a new viewer sees of what was: a few screens.
HISTORY_BYTES = 16 * 1024
# tmux, its windows' relays, and shells that people open beside them.
SESSIONS_PIDS_MAX = 256

_RELAY = (
    "import sys; sys.path.insert(0, '/usr/lib/bedplate/guestd.pyz'); from guestd.relay import main; main(sys.argv[1])"
)


class Session:
    """One agent's terminal, over all its starts. Closes with its process."""

    def __init__(self, name: str, output_path: str) -> None:
        """Raises OSError."""
        self.name = name
        self._output_path = output_path
        self.master, self.slave = open_terminal(is_agents=True)
        self._attributes = termios.tcgetattr(self.slave)
        # Logs hold the bytes that the program wrote, as without a terminal.
        self._attributes[1] &= ~termios.OPOST
        resize_terminal(self.master, COLUMNS, ROWS)
        self._path = f"{FOLDER}/session-{name}"
        self._viewers: dict[int, tuple[socket, bytearray]] = {}
        self._listener = self._listen()

    def reset(self) -> None:
        """As it was at first, whatever the last start has made of it."""
        termios.tcsetattr(self.slave, termios.TCSANOW, self._attributes)

    def watch(self, poll: select.poll) -> None:
        """Register those that may come and those that are there."""
        for descriptor in (self._listener.fileno(), *self._viewers):
            poll.register(descriptor, select.POLLIN)

    def take(self, ready: set[int], poll: select.poll) -> None:
        """New viewers, keys and sizes."""
        if self._listener.fileno() in ready:
            self._accept(poll)
        for descriptor in ready & self._viewers.keys():
            viewer, waiting = self._viewers[descriptor]
            try:
                content = viewer.recv(KEYS_BYTES_MAX)
            except BlockingIOError:
                continue
            except OSError:
                content = b""
            waiting += content
            if not content or not self._take_frames(waiting):
                self._drop(descriptor, poll)

    def show(self, content: bytes, poll: select.poll) -> None:
        """Give viewers what the agent has written."""
        for descriptor, (viewer, _) in list(self._viewers.items()):
            try:
                is_kept_up = viewer.send(content) == len(content)
            except OSError:
                is_kept_up = False
            if not is_kept_up:
                self._drop(descriptor, poll)

    def close(self) -> None:
        """Viewers see the end, and their windows close."""
        for viewer, _ in self._viewers.values():
            viewer.close()
        self._viewers.clear()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _listen(self) -> socket:
        # tmux makes its socket here as the user agent; what root has here stays root's.
        os.chmod(FOLDER, 0o1777)  # noqa: S103 (as /tmp; only root has more in it, behind modes of its own)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
        listener.bind(self._path)
        # The owner last: from then on agents can put something else in its place.
        os.chmod(self._path, 0o600)
        os.chown(self._path, AGENT_ID, AGENT_ID)
        listener.listen(VIEWERS_MAX)
        return listener

    def _accept(self, poll: select.poll) -> None:
        try:
            descriptor, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        viewer = socket(fileno=descriptor)
        viewer.setblocking(False)
        if len(self._viewers) >= VIEWERS_MAX:
            viewer.close()
            return
        self._viewers[descriptor] = (viewer, bytearray())
        poll.register(descriptor, select.POLLIN)
        with open(self._output_path, "rb") as output, contextlib.suppress(OSError):
            output.seek(max(0, os.fstat(output.fileno()).st_size - HISTORY_BYTES))
            viewer.send(output.read(HISTORY_BYTES))

    def _take_frames(self, waiting: bytearray) -> bool:
        """Whether all that is complete made sense."""
        while len(waiting) >= FRAME.size:
            kind, first, second = FRAME.unpack_from(waiting)
            if kind == SIZE:
                resize_terminal(self.master, first, second)
                del waiting[: FRAME.size]
            elif kind == KEYS and first <= KEYS_BYTES_MAX:
                if len(waiting) < FRAME.size + first:
                    return True
                # Keys that the terminal has no room for are lost, as on any terminal.
                with contextlib.suppress(OSError):
                    os.write(self.master, waiting[FRAME.size : FRAME.size + first])
                del waiting[: FRAME.size + first]
            else:
                return False
        return True

    def _drop(self, descriptor: int, poll: select.poll) -> None:
        poll.unregister(descriptor)
        self._viewers.pop(descriptor)[0].close()


def has_tmux() -> bool:
    """Whether this image can show sessions."""
    return os.access(TMUX, os.X_OK)


def start_window(name: str, cgroups: str, env: Mapping[str, str]) -> None:
    """Starts the tmux session of that name, beside everything else; raises OSError only when it cannot be tried."""
    cgroup = Cgroup(f"{cgroups}/sessions")
    cgroup.create(pids_max=SESSIONS_PIDS_MAX)
    if os.fork() == 0:
        _become_window(name, cgroup, env)


def _become_window(name: str, cgroup: Cgroup, env: Mapping[str, str]) -> NoReturn:
    try:
        enter_confinement(cgroup)
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        become_agent()
        os.nice(10)
        command = ["new-session", "-d", "-s", name, "-x", str(COLUMNS), "-y", str(ROWS)]
        relay = ["/usr/bin/python3", "-I", "-S", "-c", _RELAY, f"{FOLDER}/session-{name}"]
        arguments = [TMUX, "-S", TMUX_SOCKET, "-f", "/dev/null", *command, *relay]
        os.execve(TMUX, arguments, build_environment(env, term=SESSION_TERM))  # noqa: S606
    finally:
        os._exit(1)
