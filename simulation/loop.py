"""An asyncio event loop on virtual time: nothing waits, time jumps to the next timer, and one callback is one step.

Every task belongs to a process of the simulation, by its context. A process that is dead runs none of its callbacks any more, as
after `kill -9`: no cancellation reaches its tasks and none of their cleanup runs. A frozen one runs them when it thaws.
"""

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from enum import Enum, auto
from typing import Any

# Virtual time begins here, in seconds since 1970: like today's, so that nothing that is written looks strange.
EPOCH_S = 1_700_000_000
BOOTED_S = 1_000.0


class Life(Enum):
    """Whether a process runs."""

    ALIVE = auto()
    FROZEN = auto()
    DEAD = auto()


class Process:
    """One program of the simulation, or the world itself."""

    def __init__(self, name: str, wall_offset_s: float = 0.0, drift: float = 0.0) -> None:
        self.name = name
        self.wall_offset_s = wall_offset_s
        self.drift = drift
        self.life = Life.ALIVE
        self.held: list[asyncio.Handle] = []
        # Tasks of a dead process are kept: one that is collected would run its cleanup.
        self.tasks: list[asyncio.Task[Any]] = []

    def kill(self) -> None:
        """It runs no more."""
        self.life = Life.DEAD
        self.held.clear()

    def freeze(self) -> None:
        """It stands still."""
        if self.life is Life.ALIVE:
            self.life = Life.FROZEN


WORLD = Process("world")
_PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("process", default=WORLD)


def current_process() -> Process:
    """The process whose callback runs."""
    return _PROCESS.get()


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs callbacks in the order in which they became due; `watch` is called after each."""

    def __init__(self, watch: Callable[[], None] = lambda: None) -> None:
        self._now_s = 0.0
        self._ready: deque[tuple[Process, asyncio.Handle]] = deque()
        self._timers: list[tuple[float, int, Process, asyncio.TimerHandle]] = []
        self._count = 0
        self.watch = watch
        self.steps = 0
        self.errors: list[BaseException] = []

    def time(self) -> float:
        return self._now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        context = contextvars.copy_context() if context is None else context
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((context.get(_PROCESS, WORLD), handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + max(0.0, delay), callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        context = contextvars.copy_context() if context is None else context
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, context.get(_PROCESS, WORLD), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer is skipped when its time comes."""

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def _create(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: contextvars.Context | None = None
    ) -> "asyncio.Task[Any]":
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        (context or contextvars.copy_context()).get(_PROCESS, WORLD).tasks.append(task)
        return task

    # The name is asyncio's.
    create_task = _create  # type: ignore[assignment]

    def run_in_executor(  # type: ignore[override]
        self, _executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """Runs it at once: a simulation has no threads."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # the rim: handed to whoever awaits
            future.set_exception(error)
        return future

    def monotonic_s(self) -> float:
        """The monotonic clock of the process whose callback runs: it drifts as its machine's does."""
        return BOOTED_S + self._now_s * (1 + current_process().drift)

    def wall_s(self) -> float:
        """Its wall clock, in seconds since 1970."""
        return EPOCH_S + self._now_s + current_process().wall_offset_s

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None:
            self.errors.append(error)

    def spawn(self, process: Process, body: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Runs `body` as a task of `process`."""
        context = contextvars.copy_context()
        context.run(_PROCESS.set, process)
        return self._create(body, context=context)

    def run_until(self, until_s: float, steps_max: int) -> None:
        """Steps until virtual time is there; raises RuntimeError after `steps_max` steps in all: something spins."""
        asyncio._set_running_loop(self)
        try:
            while self._advance(until_s):
                process, handle = self._ready.popleft()
                self._step(process, handle)
                if self.steps > steps_max:
                    raise RuntimeError(f"more than {steps_max} steps by {self._now_s:.1f} s of virtual time")
        finally:
            asyncio._set_running_loop(None)

    def _advance(self, until_s: float) -> bool:
        """Whether there is a callback to run before `until_s`; moves time to the next timer where nothing else is due."""
        while not self._ready:
            if not self._timers or self._timers[0][0] > until_s:
                self._now_s = until_s
                return False
            when, _, process, handle = heapq.heappop(self._timers)
            if handle.cancelled():
                continue
            self._now_s = max(self._now_s, when)
            self._ready.append((process, handle))
        return True

    def _step(self, process: Process, handle: asyncio.Handle) -> None:
        if process.life is Life.DEAD or handle.cancelled():
            return
        if process.life is Life.FROZEN:
            process.held.append(handle)
            return
        handle._run()
        self.steps += 1
        self.watch()


def thaw(loop: VirtualLoop, process: Process) -> None:
    """The process runs on, late."""
    if process.life is Life.FROZEN:
        process.life = Life.ALIVE
        loop._ready.extend((process, handle) for handle in process.held)
        process.held.clear()
