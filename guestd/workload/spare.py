"""A child that is forked and confined ahead of time and waits for what to become: an exec costs no fork then.

It holds none of guestd's descriptors, and ends when guestd does: its request then reads as empty.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os

from guestd.workload.aside import DESCRIPTORS_MAX
from guestd.workload.confine import ROOT, become_agent, become_program, enter_confinement
from guestd.workload.terminal import TIOCSCTTY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

    from guestd.workload.cgroup import Cgroup

# Short of memory the kernel should take what an owner runs by hand before it takes an agent.
OOM_SCORE_ADJ = 500
REQUEST_BYTES = 64 * 1024


class Spare:
    """The waiting child, and this side's ends of its pipes."""

    __slots__ = ("cgroup", "pid", "report", "request", "stderr", "stdin", "stdout")

    def __init__(self, cgroup: Cgroup) -> None:
        """Forks it into `cgroup`, which exists; raises OSError."""
        opened: list[int] = []
        try:
            for _ in range(5):
                opened += os.pipe()
            self.pid = os.fork()
        except OSError:
            _close(opened)
            raise
        requested, self.request, self.report, report, stdin, self.stdin, self.stdout, stdout, self.stderr, stderr = (
            opened
        )
        if self.pid == 0:
            _wait_to_become(cgroup, requested, report, (stdin, stdout, stderr))
        _close([requested, report, stdin, stdout, stderr])
        for descriptor in (self.report, self.stdin, self.stdout, self.stderr):
            os.set_blocking(descriptor, False)
        self.cgroup = cgroup

    def begin(self, request: Mapping[str, Any]) -> None:
        """It becomes the program of `request`: command, env, workdir, user, terminal (a device's path, or empty)."""
        content = json.dumps(request).encode()
        assert len(content) <= REQUEST_BYTES, "a request is one frame's header, and a pipe takes it at once"
        os.write(self.request, content)
        os.close(self.request)

    def discard(self) -> None:
        """It ends, having become nothing."""
        _close([self.request, self.report, self.stdin, self.stdout, self.stderr])


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _wait_to_become(cgroup: Cgroup, requested: int, report: int, streams: tuple[int, int, int]) -> NoReturn:
    def prepare() -> tuple[str, list[str], dict[str, str]]:
        # What a collection touches would be copied.
        gc.disable()
        enter_confinement(cgroup, oom_score_adj=OOM_SCORE_ADJ)
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        _close_all_but(requested, report)
        content = os.read(requested, REQUEST_BYTES)
        if not content:
            os._exit(0)
        request = json.loads(content)
        if request["terminal"]:
            _take_terminal(request["terminal"])
        if request["user"] != ROOT:
            become_agent()
        return request["workdir"], request["command"], request["env"]

    become_program(prepare, report)


def _close_all_but(first: int, second: int) -> None:
    # Above all the port, and other programs' pipes: held open here they would never end.
    low, high = sorted((first, second))
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, DESCRIPTORS_MAX)


def _take_terminal(path: str) -> None:
    """The terminal controls this session and is all three streams."""
    terminal = os.open(path, os.O_RDWR)
    fcntl.ioctl(terminal, TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(terminal, number)
    os.close(terminal)
