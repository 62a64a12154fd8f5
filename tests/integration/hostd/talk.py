"""hostd's sessions with a guest that the test speaks for, frame by frame."""

from pathlib import Path
from typing import Any

from fleet.errors import UnavailableError
from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, Goal, Reason, SandboxSpec
from hostd.drivers.ports import LinkMessage, LinkReceiver
from hostd.orders import Orders
from hostd.reconcile.progress import Progress, begin
from hostd.reconcile.session import Sessions

A, B = SandboxId("aaaaaaaaaaaa"), SandboxId("bbbbbbbbbbbb")
DIGEST = Digest("sha256:" + "0" * 64)


class Pipe:
    """GuestLinks whose guests are the test: what hostd sends is kept, what it receives the test says."""

    def __init__(self) -> None:
        self.sent: list[LinkMessage] = []
        self.is_down = False

    def attach(self, sandbox_id: SandboxId, link_path: str, receive: LinkReceiver) -> None:
        pass

    async def send(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        if self.is_down:
            raise UnavailableError("link_down", "down", "")
        self.sent.append(message)

    async def detach(self, sandbox_id: SandboxId) -> None:
        pass


class Talk:
    """One host with two sandboxes, A's guest being spoken for by the test."""

    def __init__(self, folder: Path, secrets: tuple[str, ...] = (), timeout_s: float = 0.0) -> None:
        self.folder = folder
        self.now_s = 1.0
        self.start()
        for sandbox_id in (A, B):
            agents = tuple(Agent(name, "custom", ("true",), timeout_s=timeout_s) for name in ("one", "two"))
            order = Assignment(
                sandbox_id,
                Tenant("acme"),
                HostId("host"),
                SandboxSpec("box", agents=agents, secrets=secrets),
                DIGEST,
                64,
                Goal.RUN,
                1,
                1,
                1,
            )
            self.orders.put_order(order)
            self.orders.put_progress(begin(order, "", ""))

    def start(self) -> None:
        """hostd starts, again if it ran before."""
        self.orders, self.pipe = Orders(self.folder), Pipe()
        self.sessions = Sessions(self.orders, self.pipe, lambda: None, self.now_ms, clock=lambda: self.now_s)
        for sandbox_id in (A, B):
            self.sessions.attach(sandbox_id, "")

    def now_ms(self) -> int:
        return int(self.now_s * 1000)

    async def say(self, type_: str, payload: bytes = b"", **fields: Any) -> None:
        await self.sessions.receive(A, LinkMessage(type_, fields, payload))

    async def greet(self, **changes: Any) -> None:
        await self.say("connected")
        await self.say("hello", **{"version": 2, "configured": False, "agents": {}, **changes})

    async def run(self) -> None:
        """Until both agents run."""
        await self.greet()
        for name in ("one", "two"):
            await self.say("agent", name=name, state="running")

    def listen_for(self, seconds: float) -> Reason | None:
        """Time goes on while hostd looks at A every five seconds, and says at the end whether it has waited too long."""
        lateness = None
        for elapsed in range(0, int(seconds), 5):
            self.now_s += min(5, seconds - elapsed)
            lateness = self.sessions.lateness(A)
        return lateness

    async def end(self) -> None:
        """Until both agents have ended and the artifact is asked for."""
        await self.run()
        for name in ("one", "two"):
            await self.say("agent", name=name, state="exited", exit_code=0, offset=0)
        assert self.sent()[-1] == "collect"

    def sent(self) -> list[str]:
        return [message.type for message in self.pipe.sent]

    @property
    def progress(self) -> Progress:
        return self.orders.progress[A]

    def failure(self) -> str:
        return self.progress.failure.code if self.progress.failure else ""

    def assert_neighbour_unharmed(self) -> None:
        assert self.orders.progress[B] == begin(self.orders.orders[B], "", "")
