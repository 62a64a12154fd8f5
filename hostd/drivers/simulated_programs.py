"""The programs of a simulated guest beside its agents (docs/guest-link.md, exec): deterministic, and true to their windows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hostd.drivers.ports import LinkMessage

WINDOW_BYTES = 256 * 1024
OUTPUT_FRAME_BYTES = 64 * 1024
SIGHUP = 1


@dataclass(slots=True)
class _SimulatedProgram:
    number: int
    unsent: bytearray = field(default_factory=bytearray)
    sent: int = 0
    acked: int = 0
    taken: int = 0
    reads_input: bool = False
    exit_code: int | None = None
    signal: int | None = None

    def flush(self) -> list[LinkMessage]:
        """All that may be said now."""
        messages = []
        while self.unsent and (room := WINDOW_BYTES - (self.sent - self.acked)):
            piece = bytes(self.unsent[: min(room, OUTPUT_FRAME_BYTES)])
            del self.unsent[: len(piece)]
            self.sent += len(piece)
            messages.append(LinkMessage("exec-output", {"exec": self.number, "stream": "stdout"}, piece))
        return messages

    @property
    def has_ended(self) -> bool:
        return not self.unsent and (self.exit_code is not None or self.signal is not None)


class SimulatedPrograms:
    """["cat"] gives its input back, ["yes", "N"] prints N bytes, ["exit", "N"], ["sleep"] until a signal; the rest exits with 0."""

    def __init__(self) -> None:
        self.running: dict[int, _SimulatedProgram] = {}

    def clear(self) -> None:
        """A session has ended, and every program with it."""
        self.running.clear()

    def take(self, message: LinkMessage) -> list[LinkMessage]:
        """The answers to one message about a program; one that is over has none."""
        if message.type == "exec":
            return self._begin(message.fields)
        program = self.running.get(message.fields["exec"])
        if program is None:
            return []
        answers: list[LinkMessage] = []
        match message.type:
            case "exec-input":
                answers += _take_input(program, message)
            case "exec-ack":
                program.acked = message.fields["bytes"]
            case "exec-signal":
                program.signal = message.fields["signal"]
            case "exec-close":
                program.unsent.clear()
                program.signal = SIGHUP
        return [*answers, *self._go_on(program)]

    def _begin(self, fields: Mapping[str, Any]) -> list[LinkMessage]:
        program = _SimulatedProgram(fields["exec"])
        match list(fields["command"]):
            case ["cat"]:
                program.reads_input = True
            case ["yes", count]:
                program.unsent, program.exit_code = bytearray(b"y" * int(count)), 0
            case ["exit", code]:
                program.exit_code = int(code)
            case ["sleep", *_]:
                pass
            case _:
                program.exit_code = 0
        self.running[program.number] = program
        return [LinkMessage("exec-started", {"exec": program.number}), *self._go_on(program)]

    def _go_on(self, program: _SimulatedProgram) -> list[LinkMessage]:
        messages = program.flush()
        if program.has_ended:
            del self.running[program.number]
            ended = {"exec": program.number, "exit_code": program.exit_code, "signal": program.signal, "message": ""}
            messages.append(LinkMessage("exec-ended", ended))
        return messages


def _take_input(program: _SimulatedProgram, message: LinkMessage) -> list[LinkMessage]:
    program.taken += len(message.payload)
    if program.reads_input:
        program.unsent += message.payload
        program.exit_code = 0 if message.fields["end"] else None
    return [LinkMessage("exec-input-ack", {"exec": program.number, "bytes": program.taken})] if message.payload else []
