"""What this guest is and says: it answers the host's messages, and tells what its agents' files tell.

waiting -- configure --> configured (agents run, end) -- collect --> packing --> packed -- poweroff --> gone
a fault at any point: told as `failed`, again in each session, and nothing more is started
"""

from __future__ import annotations

import binascii
import contextlib
import math
import os

from guestd import VERSION
from guestd.configuration import Configuration, parse_configuration
from guestd.execs import Execs, sweep_programs
from guestd.fault import GuestFault
from guestd.machine import end_machine, measure_boot, measure_memory_mib, prepare_machine, read_boot_id, set_clock
from guestd.state import State, load_json, nudge, put_json
from guestd.streams import Stream
from guestd.workload import Cgroup, Crew, Record, end_all, fork_aside, take_lock
from guestd.workspace import ensure_sources

TYPE_CHECKING = False
if TYPE_CHECKING:
    import select
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from guestd.configuration import Source
    from guestd.link import Message, Outbox
    from guestd.secrets import Secrets

LINK_VERSION = 2


class Guest:
    """This guest, for as long as guestd runs; a restarted guestd finds all of it again in `state`."""

    def __init__(self, state: State, outbox: Outbox, *, secrets: Secrets, sources_folder: str, cgroups: str) -> None:
        self._state = state
        self._outbox = outbox
        self._secrets = secrets
        self._sources_folder = sources_folder
        self._cgroups = cgroups
        self._fields = state.load_configuration()
        self._failure = state.load_failure()
        self._configuration: Configuration | None = None
        self._crew: Crew | None = None
        self._outputs: dict[str, Stream] = {}
        self._records: dict[str, Record] = {}
        self._artifact: Stream | None = None
        self._artifact_about: dict[str, Any] = {}
        self._artifact_offset = 0
        self._is_collecting = False
        self._is_greeted = False
        self._is_resumed = False
        sweep_programs(cgroups)
        self._execs = Execs(outbox, lambda number: Cgroup(f"{cgroups}/exec-{number}"))
        # Agents of which the host knows, in this session, that their output is cut.
        self._told_truncated: set[str] = set()
        self._handlers: dict[str, Callable[[Message], None]] = {
            "secret": self._on_secret,
            "configure": self._on_configure,
            "resume": self._on_resume,
            "ack": self._on_ack,
            "collect": self._on_collect,
            "stop": self._on_stop,
            "poweroff": self._on_poweroff,
            **self._execs.handlers,
        }
        if self._fields is not None:
            self._set_up(self._fields)

    def greet(self) -> None:
        """Begins a session: says `hello`, and what has failed."""
        self.hang_up()
        self._is_greeted = True
        self._told_truncated.clear()
        self._load_records()
        agents = {
            name: {**self._records[name].describe(), "offset": output.size} for name, output in self._outputs.items()
        }
        about: dict[str, object] = {"version": LINK_VERSION, "guestd": VERSION, "boot_id": read_boot_id()}
        is_configured = self._fields is not None
        if not is_configured:
            about["boot"] = measure_boot()
        self._outbox.add("hello", {**about, "configured": is_configured, "agents": agents})
        if self._failure is not None:
            self._tell_failure(self._failure)

    def hang_up(self) -> None:
        """Ends the session: nothing is said until the next."""
        self._is_greeted = self._is_resumed = False
        self._execs.hang_up()

    def take(self, message: Message) -> None:
        """Does what the host says, and nothing for an unknown type; raises ValueError and its like for a field that is wrong."""
        handler = self._handlers.get(message.type)
        if handler is not None:
            handler(message)

    def look(self) -> None:
        """Tells the host of every agent that has ended or begun, and finds the artifact once it is packed."""
        if not self._is_greeted:
            return
        for name in self._load_records():
            fields = {"name": name, **self._records[name].describe(), "offset": self._outputs[name].size}
            self._outbox.add("agent", fields)
        if self._is_collecting and self._artifact is None:
            self._look_for_artifact()

    @property
    def next_at_s(self) -> float:
        """When something is due although nothing happens; infinite for never."""
        return self._execs.next_at_s

    @property
    def wants_rest(self) -> bool:
        """Whether an idle moment could be used."""
        return self._execs.wants_spare

    def watch(self, poll: select.poll) -> None:
        """Register all that can make anything here go on, besides the port and the nudges."""
        self._execs.watch(poll)

    def take_ends(self, ended: dict[int, int]) -> None:
        """Takes those of programs out of the wait statuses of children that have ended."""
        self._execs.take_ends(ended)

    def rest(self) -> None:
        """Uses an idle moment."""
        self._execs.rest()

    def fill(self) -> None:
        """Adds output and artifact to the outbox, as far as it has room and the host keeps up."""
        self._execs.fill()
        has_more = self._is_resumed
        while has_more and self._outbox.has_room:
            # One chunk of each in turn: an agent that prints much holds nobody up.
            chunks = [self._send_output(name, output) for name, output in self._outputs.items()]
            has_more = any([*chunks, self._send_artifact()])

    def watch_over(self) -> None:
        """Finds supervisors that were killed; for now and then, and for when a child has ended."""
        if self._crew is not None:
            self._crew.ensure_started()
        if self._is_collecting and self._artifact is None:
            self._start_packing()

    def beat(self, uptime_s: float) -> None:
        """Says that this guest is alive, also while it waits for its secrets; unless the host has not read what was said before."""
        if self._is_greeted and self._outbox.has_room:
            self._outbox.add("heartbeat", {"uptime_s": round(uptime_s, 1), "memory_used_mib": measure_memory_mib()})

    def _on_secret(self, message: Message) -> None:
        if self._fields is None:
            value = binascii.a2b_base64(message.payload, strict_mode=True) if message.payload else b""
            try:
                self._secrets.put(message.fields["name"], value)
            except OSError as error:
                self._fail(GuestFault("machine_failed", f"secrets cannot be kept in this guest: {error.strerror}"))

    def _on_configure(self, message: Message) -> None:
        if self._fields is not None:
            return
        self._fields = dict(message.fields)
        try:
            self._state.put_configuration(self._fields)
        except OSError as error:
            self._fail(GuestFault("disk_full", f"the sandbox's disk has no room to begin: {error.strerror}"))
            return
        self._set_up(self._fields, is_new=True)

    def _on_resume(self, message: Message) -> None:
        for name, offset in message.fields["agents"].items():
            if name in self._outputs:
                self._outputs[name].resume(int(offset))
        self._artifact_offset = int(message.fields["artifact"])
        if self._artifact is not None:
            self._artifact.resume(self._artifact_offset)
        self._is_resumed = True

    def _on_ack(self, message: Message) -> None:
        stream = self._artifact if message.fields.get("artifact") else self._outputs.get(message.fields["agent"])
        if stream is not None:
            stream.acknowledge(int(message.fields["offset"]))

    def _on_collect(self, _message: Message) -> None:
        # Not before the last agent has ended: what is packed must not change meanwhile.
        self._load_records()
        if all(record.has_ended for record in self._records.values()):
            self._is_collecting = True
            self._execs.close()
            # The windows of sessions, and what was opened beside them.
            Cgroup(f"{self._cgroups}/sessions").kill()
            self._start_packing()

    def _on_stop(self, message: Message) -> None:
        told = message.fields.get("grace_period_s")
        grace_period_s = None if told is None else float(told)
        if grace_period_s is not None and not 0 <= grace_period_s < math.inf:
            raise ValueError(f"a grace period of {grace_period_s}")
        if self._crew is not None:
            self._crew.stop(grace_period_s)

    def _on_poweroff(self, _message: Message) -> None:
        self._execs.close()
        end_all(self._cgroups)
        end_machine()

    def _set_up(self, fields: Mapping[str, Any], *, is_new: bool = False) -> None:
        """Everything the configuration asks for, done now or found done; nothing more is done after a fault."""
        if self._failure is not None:
            return
        try:
            self._configuration = configuration = parse_configuration(fields)
            if is_new:
                set_clock(configuration.clock_ms)
                self._secrets.require(configuration.secrets)
            prepare_machine(configuration)
            ensure_sources(configuration.sources, self._sources_folder)
        except GuestFault as fault:
            self._fail(fault)
            return
        self._crew = Crew(configuration.agents, self._state, self._cgroups)
        try:
            self._crew.ensure_started()
        except OSError as error:
            self._fail(GuestFault("disk_full", f"the sandbox's disk has no room for its agents: {error.strerror}"))
            return
        self._outputs = {name: Stream(files.output) for name, files in self._crew.files.items()}
        self._execs.open(configuration.secrets)
        self.look()

    def _start_packing(self) -> None:
        """Pack in a process of its own, unless one packs already or has: this one goes on speaking to the host."""
        self._look_for_artifact()
        configuration = self._configuration
        if self._artifact is not None or self._failure is not None or configuration is None:
            return
        self._state.release_reserve()
        lock = take_lock(f"{self._state.artifact_path}.lock")
        if lock is not None:
            fork_aside(lambda: _pack(self._state, configuration.sources, self._sources_folder), lock)

    def _look_for_artifact(self) -> None:
        about = load_json(self._state.artifact_about_path)
        if about is not None:
            self._artifact_about = about
            self._artifact = Stream(self._state.artifact_path)
            self._artifact.resume(self._artifact_offset)
        elif self._failure is None and (fault := self._state.load_failure()) is not None:
            self._fail(fault)

    def _send_output(self, name: str, output: Stream) -> bool:
        if (chunk := output.take_chunk()) is not None:
            self._outbox.add("output", {"agent": name, "offset": chunk[0]}, chunk[1])
        elif output.is_sent and name not in self._told_truncated and self._records[name].cut:
            self._told_truncated.add(name)
            self._outbox.add("truncated", {"agent": name, "offset": output.size, "reason": self._records[name].cut})
        return chunk is not None

    def _send_artifact(self) -> bool:
        if self._artifact is None or not self._is_collecting or (chunk := self._artifact.take_chunk()) is None:
            return False
        self._outbox.add("artifact", {**self._artifact_about, "offset": chunk[0]}, chunk[1])
        return True

    def _fail(self, fault: GuestFault) -> None:
        self._failure = fault
        # A disk that has no room for it will have none for anything else: a guestd after this one finds the same.
        with contextlib.suppress(OSError):
            self._state.put_failure(fault)
        if self._is_greeted:
            self._tell_failure(fault)

    def _tell_failure(self, fault: GuestFault) -> None:
        self._outbox.add("failed", {"code": fault.code, "message": fault.message})

    def _load_records(self) -> list[str]:
        """Reads the records of agents that had not ended; the names of those of which there is news."""
        changed = []
        for name, files in self._crew.files.items() if self._crew is not None else ():
            known = self._records.get(name)
            if known is None or not known.has_ended:
                self._records[name] = found = files.load_record()
                if known is None or known.describe() != found.describe():
                    changed.append(name)
        return changed


def _pack(state: State, sources: Sequence[Source], folder: str) -> None:
    """Leaves the artifact or a failure in `state`, whatever happens."""
    # Only the process that packs pays for these imports.
    from guestd.artifact import pack_artifact  # noqa: PLC0415

    try:
        put_json(state.artifact_about_path, pack_artifact(sources, folder, state.artifact_path))
    except GuestFault as fault:
        _give_up_packing(state, fault)
    except Exception as error:
        _give_up_packing(state, GuestFault("artifact_failed", f"the changes cannot be packed: {error!r}"))
    nudges = state.open_nudges()
    nudge(nudges)


def _give_up_packing(state: State, fault: GuestFault) -> None:
    # It may have taken the last of the disk, and the failure must be written.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(state.artifact_path)
    state.put_failure(fault)
