"""The process beside each agent: starts it, keeps its output, ends it in time, and records its end last of all."""

from __future__ import annotations

import math
import os
import select
import signal
import time

from guestd.state import nudge
from guestd.workload.cgroup import Cgroup, is_populated
from guestd.workload.ending import Ending
from guestd.workload.files import (
    CUT_BY_DISK,
    CUT_BY_LIMIT,
    EXITED,
    FAILED,
    RESTARTING,
    RUNNING,
    TIMED_OUT,
    AgentFiles,
    Record,
)
from guestd.workload.launch import launch
from guestd.workload.restarting import Restarts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestd.configuration import Agent
    from guestd.workload.session import Session

READ_BYTES = 64 * 1024
# What a pipe can hold at most: that much may have been written before the last process ended.
PIPE_BYTES_MAX = 1024 * 1024
CONTROL_BYTES = 64
# A killed process leaves its cgroup in milliseconds; one that hangs in the kernel longer than this never will.
KILL_WAIT_S = 30.0
# A timeout that has run out while an agent was being started ends it at once; 0 would be none.
LEFT_MIN_S = 0.001


def supervise(agent: Agent, files: AgentFiles, cgroup: Cgroup, nudge_path: str) -> None:
    """Run the agent to its end, over all its restarts. Call it in a process of its own that holds the lock, for an agent that was
    never started.
    """
    files.put_record(Record(RUNNING))
    nudges = os.open(nudge_path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        record = _Supervision(agent, files, cgroup, nudges).run()
    except OSError as error:
        cgroup.kill()
        record = Record(FAILED, message=f"it cannot be run in this guest: {error}")
    files.put_record(record)
    nudge(nudges)


class _Supervision:
    def __init__(self, agent: Agent, files: AgentFiles, cgroup: Cgroup, nudges: int) -> None:
        self._agent = agent
        self._files = files
        self._cgroup = cgroup
        self._nudges = nudges
        self._output = os.open(files.output, os.O_WRONLY | os.O_CLOEXEC)
        self._control = os.open(files.control, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._session: Session | None = None
        # What its owner should know of an agent that runs.
        self._running_message = ""
        self._restarts = Restarts(agent.restart, agent.max_restarts)
        self._started_at_s = time.monotonic()
        # What the owner has said, while no start could hear it.
        self._is_stopped = False
        self._kept_bytes = 0
        self._cut = ""
        self._cut_message = ""

    def run(self) -> Record:
        """The end of the agent, when nothing of it runs any more and all of its output is in the file."""
        if self._agent.session:
            self._open_session()
        try:
            return self._run_all()
        finally:
            if self._session is not None:
                self._session.close()

    def _open_session(self) -> None:
        # Only an agent that has one pays for these imports.
        from guestd.workload.session import Session, has_tmux  # noqa: PLC0415

        self._session = Session(self._agent.session, self._files.output)
        if not has_tmux():
            self._running_message = "its image has no tmux: nobody can attach to its session"
            self._put(RUNNING)

    def _run_all(self) -> Record:
        while True:
            began_at_s = time.monotonic()
            record = self._run_once()
            if record.state != EXITED or self._is_stopped:
                return record
            pause_s = self._restarts.pause_after(record.exit_code, time.monotonic() - began_at_s)
            if pause_s is None:
                return self._give_up(record) if self._restarts.is_used_up else record
            self._put(RESTARTING, record)
            if (state := self._rest(pause_s)) != RUNNING:
                return self._note(state, record, "it was waiting to be started again")
            self._put(RUNNING)

    def _run_once(self) -> Record:
        self._cgroup.create(pids_max=self._agent.pids_max, memory_mib=self._agent.memory_mib)
        self._poll = select.poll()
        pid, failure = self._launch()
        ending = Ending(time.monotonic(), self._left_s(), self._agent.grace_period_s)
        status = self._watch(pid, ending)
        has_left = self._finish(ending)
        # Not until the pipe ends: another agent may have been handed the other end.
        for _ in range(PIPE_BYTES_MAX // READ_BYTES):
            if not self._keep_output():
                break
        if self._session is None:
            os.close(self._pipe)
        record = failure or self._judge(status, ending, has_left=has_left)
        record.restarts, record.cut = self._restarts.count, self._cut
        self._cgroup.remove()
        return record

    def _launch(self) -> tuple[int, Record | None]:
        if self._session is None:
            self._pipe, pipe_end = os.pipe()
            launched = launch(self._agent, self._cgroup, pipe_end)
            os.close(pipe_end)
            os.set_blocking(self._pipe, False)
            return launched
        self._pipe = self._session.master
        self._session.reset()
        launched = launch(self._agent, self._cgroup, self._session.slave)
        self._session.watch(self._poll)
        if self._restarts.count == 0 and not self._running_message:
            self._start_window()
        return launched

    def _start_window(self) -> None:
        from guestd.workload.session import start_window  # noqa: PLC0415

        try:
            start_window(self._agent.session, os.path.dirname(self._cgroup.path), self._agent.env)
        except OSError as error:
            self._running_message = f"its session cannot be shown: {error.strerror}"
            self._put(RUNNING)

    def _left_s(self) -> float:
        """Of the timeout, which counts from the first start; 0 for none."""
        if self._agent.timeout_s <= 0:
            return 0.0
        return max(LEFT_MIN_S, self._started_at_s + self._agent.timeout_s - time.monotonic())

    def _rest(self, pause_s: float) -> str:
        """Waits; `running` when the agent may start again, else how it ended: stopped or timed out meanwhile."""
        start_at_s = time.monotonic() + pause_s
        timeout_at_s = self._started_at_s + self._agent.timeout_s if self._agent.timeout_s > 0 else math.inf
        until_s = min(start_at_s, timeout_at_s)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if self._session is not None:
            self._session.watch(poll)
        while (wait_s := until_s - time.monotonic()) > 0:
            ready = {found for found, _ in poll.poll(math.ceil(wait_s * 1000))}
            if self._control in ready:
                os.read(self._control, CONTROL_BYTES)
                return EXITED
            if self._session is not None:
                self._session.take(ready, poll)
        return RUNNING if start_at_s < timeout_at_s else TIMED_OUT

    def _put(self, state: str, last: Record | None = None) -> None:
        """Put on record how the agent is now; a restart is told with how it ended before."""
        record = Record(state, cut=self._cut, restarts=self._restarts.count)
        if state == RUNNING:
            record.message = self._running_message
        if last is not None:
            record.exit_code, record.signal, record.message = last.exit_code, last.signal, last.message
        self._files.put_record(record)
        nudge(self._nudges)

    def _give_up(self, record: Record) -> Record:
        return self._note(EXITED, record, f"it has been started again {self._restarts.most} times, which is its most")

    def _note(self, state: str, record: Record, note: str) -> Record:
        message = "; ".join(filter(None, (record.message, note)))
        noted = Record(state, message=message, cut=self._cut, restarts=self._restarts.count)
        noted.exit_code, noted.signal = record.exit_code, record.signal
        return noted

    def _watch(self, pid: int, ending: Ending) -> int:
        """Until the main process has ended; its wait status."""
        process = os.pidfd_open(pid)
        for descriptor in (process, self._pipe, self._control):
            self._poll.register(descriptor, select.POLLIN)
        while process not in self._turn(ending):
            pass
        self._poll.unregister(process)
        os.close(process)
        ending.main_ended(time.monotonic())
        return os.waitpid(pid, 0)[1]

    def _finish(self, ending: Ending) -> bool:
        """Until no process of the agent is left; False when one hangs in the kernel."""
        events = self._cgroup.open_events()
        self._poll.register(events, select.POLLPRI)
        give_up_at_s = math.inf
        while is_populated(events) and time.monotonic() < give_up_at_s:
            self._turn(ending, give_up_at_s)
            if math.isinf(give_up_at_s) and math.isinf(ending.next_at_s):
                give_up_at_s = time.monotonic() + KILL_WAIT_S
        has_left = not is_populated(events)
        os.close(events)
        return has_left

    def _turn(self, ending: Ending, until_s: float = math.inf) -> set[int]:
        """Do what is due, wait for what happens next, take it; which descriptors were ready."""
        now_s = time.monotonic()
        if ending.must_ask(now_s):
            self._cgroup.signal(signal.SIGTERM)
        if ending.must_force(now_s):
            self._cgroup.kill()
        wait_s = min(ending.next_at_s, until_s) - time.monotonic()
        ready = {
            found for found, _ in self._poll.poll(None if math.isinf(wait_s) else max(0, math.ceil(wait_s * 1000)))
        }
        if self._control in ready:
            self._take_control(ending)
        if self._session is not None:
            self._session.take(ready, self._poll)
        if self._pipe in ready and self._keep_output() == 0:
            self._poll.unregister(self._pipe)
        return ready

    def _take_control(self, ending: Ending) -> None:
        for line in os.read(self._control, CONTROL_BYTES).split(b"\n")[:-1]:
            self._is_stopped = True
            ending.stop(time.monotonic(), float(line) if line else None)

    def _keep_output(self) -> int | None:
        """Moves one read from the pipe to the file; how many bytes came: 0 at the end, None for none now."""
        try:
            content = os.read(self._pipe, READ_BYTES)
        except BlockingIOError:
            return None
        if content and not self._cut:
            self._store(content)
        if content and self._session is not None:
            self._session.show(content, self._poll)
        return len(content)

    def _store(self, content: bytes) -> None:
        kept = content[: self._agent.output_max_bytes - self._kept_bytes]
        stored = 0
        try:
            while stored < len(kept):
                stored += os.write(self._output, kept[stored:])
        except OSError as error:
            self._cut, self._cut_message = CUT_BY_DISK, f"its output was cut: {error.strerror}"
        self._kept_bytes += stored
        if stored < len(content):
            self._cut = self._cut or CUT_BY_LIMIT
            self._put(RUNNING)
        nudge(self._nudges)

    def _judge(self, status: int, ending: Ending, *, has_left: bool) -> Record:
        code = os.waitstatus_to_exitcode(status)
        notes = [self._cut_message] if self._cut_message else []
        if self._cgroup.count_oom_kills():
            notes.append(f"it was killed for using more than its {self._agent.memory_mib} MiB of memory")
        if not has_left:
            notes.append("a process that it left behind hangs in the kernel")
        return Record(
            TIMED_OUT if ending.is_timed_out else EXITED,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            message="; ".join(notes),
        )
