"""The programs that owners run by hand in this guest: the `exec` frames of docs/guest-link.md, for one session at a time.

Nothing here outlives guestd or its session. What a program prints goes to the outbox as far as that has room; none of it is kept.
"""

from __future__ import annotations

import binascii
import contextlib
import math
import os

from guestd.fault import clean_text
from guestd.workload import AGENT, NOT_EXECUTABLE, ROOT, Cgroup, Program, Spare, build_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    import select
    from collections.abc import Callable, Mapping
    from typing import Any

    from guestd.link import Message, Outbox

# As docs/guest-link.md has it.
PROGRAMS_MAX = 16
PIDS_MAX = 512
ID_MAX = 2**62
SIGNAL_MAX = 64


class Execs:
    """By id, the programs of this session; and those of earlier ones, until they are gone."""

    def __init__(self, outbox: Outbox, make_cgroup: Callable[[int], Cgroup]) -> None:
        self._outbox = outbox
        self._make_cgroup = make_cgroup
        self._programs: dict[int, Program] = {}
        # Hung up by a session that is over: ended, and not spoken of.
        self._abandoned: list[Program] = []
        self._leaving: list[Cgroup] = []
        self._spare: Spare | None = None
        self._count = 0
        self._is_open = False
        self._secrets: tuple[str, ...] = ()
        self.handlers: dict[str, Callable[[Message], None]] = {
            "exec": self._on_exec,
            "exec-input": self._on_input,
            "exec-ack": self._on_ack,
            "exec-resize": self._on_resize,
            "exec-signal": self._on_signal,
            "exec-close": self._on_close,
        }

    @property
    def wants_spare(self) -> bool:
        """Whether the next program would cost a fork."""
        return self._is_open and self._spare is None

    @property
    def next_at_s(self) -> float:
        """When something is due although nothing happens; infinite for never."""
        return min((program.next_at_s for program in self._all()), default=math.inf)

    def open(self, secrets: tuple[str, ...]) -> None:
        """From now on programs are run; they are told where these secrets lie."""
        self._is_open, self._secrets = True, secrets

    def close(self) -> None:
        """No program runs any more, and none is run from now on."""
        self._is_open = False
        for program in self._all():
            program.kill()
        if self._spare is not None:
            self._spare.discard()
            self._leaving.append(self._spare.cgroup)
            self._spare = None

    def hang_up(self) -> None:
        """The session is over, and with it its programs."""
        for program in self._programs.values():
            program.hang_up()
            self._abandoned.append(program)
        self._programs.clear()

    def watch(self, poll: select.poll) -> None:
        """Register all that can make a program go on."""
        for program in self._all():
            program.watch(poll, has_room=self._outbox.has_urgent_room)

    def take_ends(self, ended: dict[int, int]) -> None:
        """Takes those of its own out of the wait statuses of children that have ended."""
        for program in self._all():
            if program.pid in ended:
                program.end(ended.pop(program.pid))
        if self._spare is not None and self._spare.pid in ended:
            del ended[self._spare.pid]
            self._spare.discard()
            self._leaving.append(self._spare.cgroup)
            self._spare = None

    def fill(self) -> None:
        """Moves input on, adds output to the outbox as far as it has room, and tells of ends."""
        for exec_id, program in self._programs.items():
            taken = program.take_input_ack()
            if taken is not None:
                self._outbox.add_urgent("exec-input-ack", {"exec": exec_id, "bytes": taken})
        has_more = True
        while has_more and self._outbox.has_urgent_room:
            # One chunk of each in turn: a program that prints much holds none of the others up.
            has_more = sum(self._send_output(exec_id, program) for exec_id, program in self._programs.items()) > 0
        self._tell_ends()
        self._forget_abandoned()

    def rest(self) -> None:
        """What nobody waits for: cgroups are taken away, the next program's child is forked."""
        self._leaving = [cgroup for cgroup in self._leaving if not cgroup.remove()]
        if self.wants_spare:
            # Without memory or processes for one, the next exec will say so.
            with contextlib.suppress(OSError):
                self._spare = self._fork()

    def _all(self) -> list[Program]:
        return [*self._programs.values(), *self._abandoned]

    def _on_exec(self, message: Message) -> None:
        exec_id = _whole(message.fields["exec"], ID_MAX)
        if exec_id in self._programs:
            raise ValueError(f"exec {exec_id} runs already")
        request, terminal = _parse_request(message.fields, self._secrets)
        if not self._is_open:
            self._refuse(exec_id, "this guest runs no programs now")
        elif len(self._programs) >= PROGRAMS_MAX:
            self._refuse(exec_id, f"{PROGRAMS_MAX} programs run already")
        else:
            try:
                self._programs[exec_id] = self._start(request, terminal)
            except OSError as error:
                self._refuse(exec_id, f"this guest cannot start it: {error.strerror or error}")
            else:
                self._outbox.add_urgent("exec-started", {"exec": exec_id})

    def _on_input(self, message: Message) -> None:
        content = binascii.a2b_base64(message.payload, strict_mode=True) if message.payload else b""
        if (program := self._find(message)) is not None:
            program.take_input(content, is_end=bool(message.fields.get("end")))

    def _on_ack(self, message: Message) -> None:
        count = _whole(message.fields["bytes"], ID_MAX)
        if (program := self._find(message)) is not None:
            program.acknowledge(count)

    def _on_resize(self, message: Message) -> None:
        columns, rows = int(message.fields["columns"]), int(message.fields["rows"])
        if (program := self._find(message)) is not None:
            program.resize(columns, rows)

    def _on_signal(self, message: Message) -> None:
        number = _whole(message.fields["signal"], SIGNAL_MAX)
        if (program := self._find(message)) is not None:
            program.signal(number)

    def _on_close(self, message: Message) -> None:
        if (program := self._find(message)) is not None:
            program.hang_up()

    def _find(self, message: Message) -> Program | None:
        return self._programs.get(_whole(message.fields["exec"], ID_MAX))

    def _start(self, request: Mapping[str, Any], terminal: tuple[int, int] | None) -> Program:
        spare, self._spare = self._spare or self._fork(), None
        try:
            return Program(spare, request, terminal)
        except (OSError, ValueError):
            self._leaving.append(spare.cgroup)
            raise

    def _fork(self) -> Spare:
        self._count += 1
        cgroup = self._make_cgroup(self._count)
        try:
            cgroup.create(pids_max=PIDS_MAX)
            return Spare(cgroup)
        except OSError:
            # It is tried again twenty times a second while there is no memory for it.
            self._leaving.append(cgroup)
            raise

    def _refuse(self, exec_id: int, why: str) -> None:
        fields = {"exec": exec_id, "exit_code": NOT_EXECUTABLE, "signal": None, "message": clean_text(why)}
        self._outbox.add_urgent("exec-ended", fields)

    def _send_output(self, exec_id: int, program: Program) -> bool:
        chunk = program.take_output()
        if chunk is not None:
            self._outbox.add_urgent("exec-output", {"exec": exec_id, "stream": chunk[0]}, chunk[1])
        return chunk is not None

    def _tell_ends(self) -> None:
        for exec_id, program in list(self._programs.items()):
            program.tend()
            if program.is_over:
                self._outbox.add_urgent("exec-ended", {"exec": exec_id, **program.describe_end()})
                del self._programs[exec_id]
                self._bury(program)

    def _forget_abandoned(self) -> None:
        for program in self._abandoned:
            program.tend()
            if program.is_over:
                self._bury(program)
        self._abandoned = [program for program in self._abandoned if not program.is_over]

    def _bury(self, program: Program) -> None:
        program.close()
        self._leaving.append(program.cgroup)


def sweep_programs(cgroups: str) -> None:
    """Ends what a guestd that was killed has left running: nobody knows of it any more."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(cgroups):
            if name.startswith("exec-"):
                cgroup = Cgroup(f"{cgroups}/{name}")
                cgroup.kill()
                cgroup.remove()


def _parse_request(
    fields: Mapping[str, Any], secrets: tuple[str, ...]
) -> tuple[dict[str, object], tuple[int, int] | None]:
    """What a spare child is told, and the size of the terminal; raises ValueError and its like for a field that is wrong."""
    command = [str(argument) for argument in fields["command"]]
    user = fields.get("user") or AGENT
    if not command or user not in (AGENT, ROOT):
        raise ValueError("a command for no user, or none")
    wanted = fields.get("terminal")
    term = str(wanted["term"]) if wanted is not None else ""
    own = {str(key): str(value) for key, value in fields.get("env") or ()}
    env = build_environment(own, user=user, term=term, secrets=secrets)
    request = {"command": command, "workdir": str(fields.get("workdir") or env["HOME"]), "env": env, "user": user}
    return request, None if wanted is None else (int(wanted["columns"]), int(wanted["rows"]))


def _whole(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"no whole number from 0 to {most}")
    return value
