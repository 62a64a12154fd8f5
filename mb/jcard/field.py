"""One field of a jcard, as the reference page tells it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `name` is `table.key`, with `*` for keys of the user's own; `tests` prove that it is honoured or refused."""

    name: str
    kind: str
    default: str
    limits: str
    text: str
    tests: tuple[str, ...]
    ours: bool = False
    refused: bool = False
