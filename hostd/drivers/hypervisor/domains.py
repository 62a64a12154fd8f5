"""Domains of this host through libvirt. libvirt's objects and errors never leave this module.

Every domain is transient: when its VM ends, libvirt knows it no more, and nothing is left to be undefined. libvirt's calls
block, so they run one at a time on a thread of their own, pauses beside it; its events come from another (docs/decisions/0020), as
nudges.
Source: https://libvirt.org/html/libvirt-libvirt-domain.html.
"""

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import libvirt

from fleet.errors import HostFaultError
from fleet.model.host import Accelerator
from fleet.model.ids import SandboxId
from hostd.drivers.domain_xml import QemuUser, domain_name, memory_limit_kib, parse_domain_name, render_domain
from hostd.drivers.hypervisor.probe import AcceleratorProbe
from hostd.drivers.ports import VmUse
from hostd.reconcile.state import DomainState, Machine

T = TypeVar("T")

# A start takes seconds; where libvirt probes QEMU anew it was seen to take 56. Two minutes are a daemon that hangs.
CALL_TIMEOUT_S = 120.0
# A QEMU that is well stops its CPUs within milliseconds; one that has not by then hangs, and its lease ends in 3 s.
PAUSE_TIMEOUT_S = 2.0
PAUSES_AT_ONCE = 8
# A daemon that answers none of three pings is gone, and a call that waits for it fails.
KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 5, 3

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.RUNNING,
    # On its way out: the event of its end follows.
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: DomainState.PAUSED,
}


class LibvirtHypervisor:
    """The domains behind one libvirt URI, run as `user`; reconnects by itself when libvirtd was restarted."""

    def __init__(self, uri: str, user: QemuUser, probe: AcceleratorProbe) -> None:
        self._uri = uri
        self._user = user
        self._probe = probe
        self._connection: Any = None
        self._connecting = threading.Lock()
        self._nudges: list[Callable[[], None]] = []
        self._may_run: Callable[[], bool] = lambda: True
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="libvirt")
        # Pausing waits for QEMU itself to answer: one that hangs must hold up neither the others nor anything else.
        self._pauses = ThreadPoolExecutor(max_workers=PAUSES_AT_ONCE, thread_name_prefix="libvirt-pause")
        self._pausing: set[SandboxId] = set()

    async def probe_accelerator(self) -> tuple[Accelerator, str]:
        """What a probe guest booted on, and why nothing faster."""
        return await self._probe.run()

    async def list_domains(self) -> Mapping[SandboxId, DomainState]:
        """Every domain of ours; raises HostFaultError `domains_unlisted`."""
        return await self._call("domains_unlisted", "the domains", self._list)

    async def ensure_domain(self, machine: Machine) -> None:
        """Start the domain, or let a paused one run on; raises HostFaultError `domain_failed`."""
        xml = render_domain(machine, self._user)
        start = functools.partial(self._start, machine.sandbox_id, xml, memory_limit_kib(machine))
        await self._call("domain_failed", f"domain {domain_name(machine.sandbox_id)}", start)

    async def pause_domain(self, sandbox_id: SandboxId) -> None:
        """Stop the domain's CPUs, if they run; raises HostFaultError `domain_unpaused`, also while an earlier try hangs."""
        subject = f"domain {domain_name(sandbox_id)}"
        if sandbox_id in self._pausing:
            raise HostFaultError(
                "domain_unpaused", f"{subject}: QEMU has not answered yet", "the guard ends it in time"
            )
        self._pausing.add(sandbox_id)
        suspend = functools.partial(self._suspend, sandbox_id)
        await self._call("domain_unpaused", subject, suspend, self._pauses, PAUSE_TIMEOUT_S)

    async def remove_domain(self, sandbox_id: SandboxId) -> None:
        """End the domain at once; raises HostFaultError `domain_unremoved`."""
        subject = f"domain {domain_name(sandbox_id)}"
        await self._call("domain_unremoved", subject, functools.partial(self._remove, sandbox_id))

    async def measure(self) -> Mapping[SandboxId, VmUse]:
        """What every VM uses now; raises HostFaultError `domains_unmeasured`."""
        return await self._call("domains_unmeasured", "the domains", self._measure_all)

    def set_gate(self, may_run: Callable[[], bool]) -> None:
        """Ask `may_run`, on libvirt's thread, right before a domain runs."""
        self._may_run = may_run

    def on_change(self, nudge: Callable[[], None]) -> None:
        """Call `nudge` in this event loop whenever a domain's state may have changed."""
        self._nudges.append(functools.partial(_call_in_loop, asyncio.get_running_loop(), nudge))

    async def close(self) -> None:
        """Close the connection; domains run on."""
        self._nudges.clear()
        await self._call("hypervisor_unclosed", "the connection", self._disconnect)
        self._pool.shutdown(wait=False)
        self._pauses.shutdown(wait=False)

    async def _call(
        self,
        code: str,
        subject: str,
        function: Callable[[], T],
        pool: ThreadPoolExecutor | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> T:
        context = contextvars.copy_context()
        running = asyncio.get_running_loop().run_in_executor(pool or self._pool, context.run, function)
        # Whoever is cancelled hears no more of it, and nobody else need.
        running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(running)
        except TimeoutError as error:
            message = f"{subject}: libvirt did not answer in {timeout_s:.0f} s"
            raise HostFaultError(code, message, "see libvirtd's log; restarting it leaves VMs running") from error
        except libvirt.libvirtError as error:
            message = f"{subject}: {error.get_error_message() or error}"
            raise HostFaultError(code, message, f"check that libvirtd serves {self._uri}, and its log") from error

    def _list(self) -> dict[SandboxId, DomainState]:
        found: dict[SandboxId, DomainState] = {}
        for domain in self._connect().listAllDomains():
            sandbox_id = parse_domain_name(domain.name())
            state = _state(domain) if sandbox_id else DomainState.ABSENT
            if sandbox_id and state is not DomainState.ABSENT:
                found[sandbox_id] = state
        return found

    def _measure_all(self) -> dict[SandboxId, VmUse]:
        found = {}
        for domain in self._connect().listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            sandbox_id = parse_domain_name(domain.name())
            if sandbox_id is None:
                continue
            try:
                # info() ends with nanoseconds of CPU; `rss` is in KiB, QEMU's own, and needs no balloon.
                cpu_ns, rss_kib = domain.info()[4], domain.memoryStats().get("rss", 0)
            except libvirt.libvirtError as error:
                if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                    continue
                raise
            found[sandbox_id] = VmUse(cpu_ns // 1_000_000, rss_kib // 1024)
        return found

    def _start(self, sandbox_id: SandboxId, xml: str, limit_kib: int) -> None:
        connection = self._connect()
        domain = _find(connection, sandbox_id) or connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
        if _state(domain) is DomainState.PAUSED:
            # Whoever was interrupted here is followed by the next pass: a guest never runs without its limit.
            domain.setMemoryParameters({"hard_limit": limit_kib}, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            # Last: a start takes up to a minute, and the lease may have ended meanwhile.
            if self._may_run():
                domain.resume()

    def _suspend(self, sandbox_id: SandboxId) -> None:
        try:
            domain = _find(self._connect(), sandbox_id)
            if domain is not None and _state(domain) is DomainState.RUNNING:
                with _ended_meanwhile():
                    domain.suspend()
        finally:
            self._pausing.discard(sandbox_id)

    def _remove(self, sandbox_id: SandboxId) -> None:
        domain = _find(self._connect(), sandbox_id)
        if domain is not None:
            with _ended_meanwhile():
                domain.destroy()

    def _connect(self) -> Any:
        with self._connecting:
            return self._open()

    def _open(self) -> Any:
        if self._connection is not None and self._connection.isAlive():
            return self._connection
        _start_events()
        connection = libvirt.open(self._uri)
        connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None)
        self._connection = connection
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _on_event(self, *_event: Any) -> None:
        for nudge in tuple(self._nudges):
            nudge()


def _find(connection: Any, sandbox_id: SandboxId) -> Any:
    try:
        return connection.lookupByName(domain_name(sandbox_id))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


@contextmanager
def _ended_meanwhile() -> Iterator[None]:
    """Within it a domain may have ended by itself: that is no error."""
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            raise


def _state(domain: Any) -> DomainState:
    try:
        return _STATES.get(domain.state()[0], DomainState.DEAD)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return DomainState.ABSENT
        raise


def _call_in_loop(loop: asyncio.AbstractEventLoop, nudge: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(nudge)


@functools.cache
def _start_events() -> threading.Thread:
    """libvirt's event loop: one for the process, as libvirt has it. Its errors are raised, not printed."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()
    thread = threading.Thread(target=_run_events, name="libvirt-events", daemon=True)
    thread.start()
    return thread


def _run_events() -> None:
    # Without a timer the loop would sleep in poll() before the first connection has told it what to poll.
    libvirt.virEventAddTimeout(1000, lambda _timer, _opaque: None, None)
    while True:
        libvirt.virEventRunDefaultImpl()
