"""Real guests: the image of this checkout under emulation, with hostd's own links and sessions on the other side."""

import asyncio
import hashlib
import io
import os
import subprocess
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, Goal, SandboxSpec, Source
from hostd.drivers.guest import SocketLinks
from hostd.drivers.image import ScratchDisks, SourceStore
from hostd.drivers.ports import LinkMessage
from hostd.orders import Orders
from hostd.reconcile.progress import Progress, begin
from hostd.reconcile.session import Sessions

A = SandboxId("aaaaaaaaaaaa")
ACME = Tenant("acme")
ADDRESS, MAC = "10.0.2.15", "52:bd:0a:00:02:0f"
MEMORY_MIB = 512
SCRATCH_MIB = 512
# A boot takes 5 s alone; on a machine full of emulated CPUs many times that. Only a test that fails waits as long.
PATIENCE_S = 240.0
OUTPUT_BYTES_MAX = 4_000_000
LINK_NAME = "org.bedplate.guest.0"


@dataclass(frozen=True)
class Boot:
    """The files of the image."""

    kernel: Path
    initramfs: Path
    root: Path
    cmdline: str


@dataclass
class Vm:
    """One running QEMU; `started_at_s` is when it was launched."""

    process: subprocess.Popen[bytes]
    link_path: Path
    console_path: Path
    started_at_s: float

    async def wait(self) -> int:
        """QEMU's exit code, after the guest has powered off."""
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.to_thread(self.process.wait)

    def console(self) -> str:
        return self.console_path.read_text(errors="replace")


def pack_tree(tree: Mapping[str, str | bytes | None]) -> bytes:
    """A source's tar: text is a file, bytes are an executable, None is a folder; "-> x" is a symlink to x."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in sorted(tree.items()):
            member = tarfile.TarInfo(path)
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str) and content.startswith("-> "):
                member.type, member.linkname = tarfile.SYMTYPE, content[3:]
            else:
                encoded = content.encode() if isinstance(content, str) else content
                member.mode, member.size = 0o755 if isinstance(content, bytes) else 0o644, len(encoded)
                archive.addfile(member, io.BytesIO(encoded))
                continue
            archive.addfile(member)
    return packed.getvalue()


async def put_source(store: SourceStore, content: bytes) -> Digest:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    digest = Digest("sha256:" + hashlib.sha256(content).hexdigest())
    await store.put(ACME, digest, len(content), chunks())
    return digest


def launch(boot: Boot, folder: Path, scratch: str, disks: list[str], initramfs: Path | None = None) -> Vm:
    """Starts QEMU as hostd's domains are, without a network behind the device."""
    link, console = folder / "link.sock", folder / "console.log"
    arguments = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max"]
    arguments += ["-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    arguments += ["-kernel", str(boot.kernel), "-initrd", str(initramfs or boot.initramfs), "-append", boot.cmdline]
    arguments += ["-serial", f"file:{console}", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    arguments += ["-chardev", f"socket,id=link,path={link},server=on,wait=off"]
    arguments += ["-device", f"virtserialport,chardev=link,name={LINK_NAME}"]
    arguments += ["-netdev", "user,restrict=on,id=net", "-device", f"virtio-net-pci,netdev=net,mac={MAC}"]
    serials = {"root": (str(boot.root), "on"), "scratch": (scratch, "off")}
    serials.update({f"source-{index}": (path, "on") for index, path in enumerate(disks)})
    for serial, (path, readonly) in serials.items():
        arguments += ["-drive", f"file={path},if=none,id={serial},format=raw,readonly={readonly},cache=unsafe"]
        arguments += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
    started_at_s = time.monotonic()
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
    return Vm(process, link, console, started_at_s)


class RecordingLinks:
    """hostd's links, with a record of what passed and when."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.links = SocketLinks()
        self._changed = changed
        self.received: list[tuple[float, LinkMessage]] = []

    def attach(
        self, sandbox_id: SandboxId, link_path: str, receive: Callable[[SandboxId, LinkMessage], Awaitable[None]]
    ) -> None:
        async def record(sandbox_id: SandboxId, message: LinkMessage) -> None:
            self.received.append((time.monotonic(), message))
            await receive(sandbox_id, message)
            self._changed()

        self.links.attach(sandbox_id, link_path, record)

    async def send(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        for agent in message.fields.get("agents", ()) if message.type == "configure" else ():
            # The real limit is what nobody wants to wait for in a test.
            agent["output_max_bytes"] = OUTPUT_BYTES_MAX
        await self.links.send(sandbox_id, message)

    async def detach(self, sandbox_id: SandboxId) -> None:
        await self.links.detach(sandbox_id)

    def first_at_s(self, type_: str) -> float:
        return next(at_s for at_s, message in self.received if message.type == type_)

    def of_type(self, type_: str) -> list[LinkMessage]:
        return [message for _, message in self.received if message.type == type_]


class Host:
    """One run of hostd's conversation with the guest; the next run has the same folder."""

    def __init__(self, folder: Path, vm: Vm, order: Assignment) -> None:
        self.order = order
        self.orders = Orders(folder)
        self._changed = asyncio.Event()
        self.links = RecordingLinks(self._changed.set)
        self.sessions = Sessions(
            self.orders, self.links, self._changed.set, lambda: time.time_ns() // 1_000_000, prefix_length=24
        )
        self.orders.put_order(order)
        if A not in self.orders.progress:
            self.orders.put_progress(begin(order, ADDRESS, ""))
        self.sessions.attach(A, str(vm.link_path))

    @property
    def progress(self) -> Progress:
        return self.orders.progress[A]

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                await self._changed.wait()
                self._changed.clear()

    def output(self, agent: str) -> bytes:
        path = self.orders.output_path(A, agent)
        return path.read_bytes() if path.exists() else b""

    async def finish(self) -> None:
        """Until the artifact is stored or the sandbox has failed; then the guest powers off."""
        await self.until(lambda: self.progress.artifact is not None or self.progress.failure is not None)
        await self.links.send(A, LinkMessage("poweroff"))

    async def crash(self) -> None:
        await self.links.links.close()


@dataclass
class Site:
    """A folder with what a sandbox needs, and the VMs started there."""

    boot: Boot
    folder: Path
    vms: list[Vm] = field(default_factory=list)

    async def start(
        self,
        sources: list[tuple[bytes, str, bool]],
        agents: list[Agent],
        *,
        initramfs: Path | None = None,
        replace_disk: Path | None = None,
    ) -> tuple[Vm, Assignment]:
        """A VM with `sources` (tar, guest path, readonly) and the order for it; `replace_disk` stands in for their disks."""
        store = SourceStore(self.folder / "sources")
        digests = [await put_source(store, content) for content, _, _ in sources]
        scratch = await ScratchDisks(self.folder / "scratch", (os.geteuid(), os.getegid())).ensure_scratch(
            A, SCRATCH_MIB
        )
        disks = [str(replace_disk or await store.ensure_disk(ACME, digest)) for digest in digests]
        wanted = tuple(
            Source(digest, len(content), path, readonly)
            for digest, (content, path, readonly) in zip(digests, sources, strict=True)
        )
        spec = SandboxSpec("box", sources=wanted, agents=tuple(agents))
        self.vms.append(launch(self.boot, self.folder, scratch, disks, initramfs))
        return self.vms[-1], Assignment(A, ACME, HostId("host-1"), spec, digests[0], 64, Goal.RUN, 1, 1, 1)

    def close(self) -> None:
        """Ends the VMs that run still."""
        for vm in self.vms:
            vm.process.kill()
            vm.process.wait()
