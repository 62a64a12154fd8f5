"""Output that is asked for afterwards: as text, byte for byte, or as objects for programs."""

import codecs
import sys
from collections.abc import Callable
from typing import Any, Protocol

from mb.render.output import OutputPrinter

Print = Callable[[Any], None]


class Sink(Protocol):
    """Where agents' output goes."""

    def take(self, agent: str, offset: int, payload: bytes) -> None:
        """The next bytes of an agent, which begin at `offset` of its output."""

    def finish(self, agent: str) -> None:
        """There is no more of that agent's."""

    def close(self) -> None:
        """There is no more of any."""


class TextSink:
    """Prints output as it comes; with `prefix` each line begins with its agent's name."""

    def __init__(self, *, prefix: bool) -> None:
        self._printer = OutputPrinter(sys.stdout, prefix=prefix)

    def take(self, agent: str, offset: int, payload: bytes) -> None:  # noqa: ARG002 (a place says nothing to people)
        """Prints the next bytes."""
        self._printer.write(agent, payload)

    def finish(self, agent: str) -> None:
        """Prints what was held back of a last line."""
        self._printer.finish(agent)

    def close(self) -> None:
        """All is printed."""


class LineSink:
    """Prints an object for each piece, at once."""

    def __init__(self, begin: int, print_line: Print) -> None:
        self._begin = begin
        self._print_line = print_line
        self._texts: dict[str, _Text] = {}

    def take(self, agent: str, offset: int, payload: bytes) -> None:
        """Prints a piece; a character that comes in two is printed with its second."""
        text = self._texts.setdefault(agent, _Text(self._begin))
        text.add(offset, payload)
        self._print_line(text.cut(agent))

    def finish(self, agent: str) -> None:
        """Prints a character that was never whole."""
        text = self._texts.setdefault(agent, _Text(self._begin))
        if text.end():
            self._print_line(text.cut(agent))

    def close(self) -> None:
        """All is printed."""


class ObjectSink:
    """Prints one object at the end, or with `is_list` a list of one for each agent."""

    def __init__(self, begin: int, print_all: Print, *, is_list: bool) -> None:
        self._begin = begin
        self._print_all = print_all
        self._is_list = is_list
        self._texts: dict[str, _Text] = {}

    def take(self, agent: str, offset: int, payload: bytes) -> None:
        """Holds the next bytes."""
        self._texts.setdefault(agent, _Text(self._begin)).add(offset, payload)

    def finish(self, agent: str) -> None:
        """Holds what is left."""
        self._texts.setdefault(agent, _Text(self._begin)).end()

    def close(self) -> None:
        """Prints what was held."""
        printed = [text.cut(agent) for agent, text in self._texts.items()]
        self._print_all(printed if self._is_list else printed[0])


class _Text:
    """What of one agent's output is not printed yet, decoded."""

    def __init__(self, begin: int) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[str] = []
        self._offset: int | None = None
        self._next = begin

    def add(self, offset: int, payload: bytes) -> None:
        self._offset = offset if self._offset is None else self._offset
        self._next = offset + len(payload)
        self._pieces.append(self._decoder.decode(payload))

    def end(self) -> str:
        """What was left of a character."""
        self._pieces.append(self._decoder.decode(b"", final=True))
        return self._pieces[-1]

    def cut(self, agent: str) -> dict[str, Any]:
        """The object for what came since the last one."""
        offset = self._next if self._offset is None else self._offset
        printed = {"agent": agent, "offset": offset, "next_offset": self._next, "text": "".join(self._pieces)}
        self._pieces.clear()
        self._offset = None
        return printed
