"""Agents' output on its way to the user: raw bytes into files and pipes, harmless text onto a terminal."""

import codecs
from typing import BinaryIO, TextIO

from mb.render.text import clean

# A line that never ends is passed on in pieces of this size, so that it is not held back.
LINE_BYTES_MAX = 64 * 1024


class OutputPrinter:
    """Prints agents' output; with `prefix` every line begins with its agent's name, and is printed once it is whole."""

    def __init__(self, stream: TextIO, *, prefix: bool) -> None:
        self._stream = stream
        self._prefix = prefix
        self._is_terminal = stream.isatty()
        self._pending: dict[str, bytes] = {}
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}

    def write(self, agent: str, payload: bytes) -> None:
        """Prints the next bytes of an agent."""
        if not self._prefix:
            self._print(agent, payload)
            return
        *lines, rest = (self._pending.get(agent, b"") + payload).split(b"\n")
        for line in lines:
            self._print(agent, agent.encode() + b" | " + line + b"\n")
        if len(rest) > LINE_BYTES_MAX:
            self._print(agent, agent.encode() + b" | " + rest + b"\n")
            rest = b""
        self._pending[agent] = rest

    def finish(self, agent: str) -> None:
        """Prints what is left of an agent's last line."""
        rest = self._pending.pop(agent, b"")
        if rest:
            self._print(agent, agent.encode() + b" | " + rest + b"\n")

    def _print(self, agent: str, payload: bytes) -> None:
        if not self._is_terminal:
            binary: BinaryIO = self._stream.buffer
            binary.write(payload)
            binary.flush()
            return
        decoder = self._decoders.setdefault(agent, codecs.getincrementaldecoder("utf-8")("replace"))
        # Bare carriage returns could overwrite a line with another; they are dropped.
        self._stream.write(clean(decoder.decode(payload).replace("\r", ""), keep="\n\t"))
        self._stream.flush()
