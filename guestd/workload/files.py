"""One agent's files, and what they say. Written by its supervisor, read by guestd.

<folder>/lock       held (flock) while the supervisor lives
<folder>/record     JSON, always RECORD_BYTES long: how the agent is, or how it ended
<folder>/output     merged stdout and stderr
<folder>/control    a FIFO: a line with a grace period in seconds means stop
"""

from __future__ import annotations

import contextlib
import json
import os

from guestd.fault import clean_text

# Full length from the start, so that an end can be recorded on a disk that the agent has filled.
RECORD_BYTES = 4096

RUNNING = "running"
RESTARTING = "restarting"
EXITED = "exited"
TIMED_OUT = "timed-out"
FAILED = "failed"

# Why output is cut: more than the agent's limit, or than the disk took.
CUT_BY_LIMIT, CUT_BY_DISK = "limit", "disk"


class Record:
    """How an agent is or how it ended, and after how many restarts; `cut` says why not all of its output is kept, if so."""

    __slots__ = ("cut", "exit_code", "message", "restarts", "signal", "state")

    def __init__(
        self,
        state: str,
        *,
        exit_code: int | None = None,
        signal: int | None = None,
        message: str = "",
        cut: str = "",
        restarts: int = 0,
    ) -> None:
        self.state = state
        self.exit_code = exit_code
        self.signal = signal
        self.message = clean_text(message)
        self.cut = cut
        self.restarts = restarts

    @property
    def has_ended(self) -> bool:
        """Whether nothing of the agent runs any more, or ever will."""
        return self.state not in (RUNNING, RESTARTING)

    def describe(self) -> dict[str, object]:
        """The fields of an `agent` frame, without name and offset."""
        fields: dict[str, object] = {"state": self.state, "restarts": self.restarts}
        if self.state != RUNNING:
            fields.update(exit_code=self.exit_code, signal=self.signal)
        if self.message:
            fields["message"] = self.message
        return fields


class AgentFiles:
    """The paths of one agent."""

    __slots__ = ("control", "folder", "lock", "output", "record")

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.lock = f"{folder}/lock"
        self.record = f"{folder}/record"
        self.output = f"{folder}/output"
        self.control = f"{folder}/control"

    def prepare(self) -> None:
        """The folder with every file, so that later none has to be made on a disk that is full. Safe to repeat."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self.control, 0o600)
        for path in (self.lock, self.output):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.write(descriptor, b" " * RECORD_BYTES)
            os.close(descriptor)

    def was_started(self) -> bool:
        """Whether the agent has ever been started; for whoever holds the lock."""
        with open(self.record, "rb") as stream:
            return bool(stream.read(RECORD_BYTES).strip())

    def put_record(self, record: Record) -> None:
        """Overwrite the record in place, by one write."""
        fields = {name: getattr(record, name) for name in Record.__slots__}
        descriptor = os.open(self.record, os.O_WRONLY | os.O_CLOEXEC)
        os.pwrite(descriptor, json.dumps(fields).encode().ljust(RECORD_BYTES), 0)
        os.close(descriptor)

    def load_record(self) -> Record:
        """The record; `running` while it is blank or being written."""
        try:
            with open(self.record, "rb") as stream:
                fields = json.loads(stream.read(RECORD_BYTES))
        except ValueError:
            return Record(RUNNING)
        return Record(fields.pop("state"), **fields)
