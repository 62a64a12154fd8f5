"""Copies files and folders into a running sandbox and out of it, by a program in the guest that reads or writes a tar.

What comes out is hostile: it is received whole into a nameless file, bounded by what the sandbox can hold, read by mb.tarread and
written by mb.writeback's rules. What goes in is read here and believed by the guest alone.
"""

import asyncio
import os
import posixpath
import stat
import sys
import tarfile
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from fleet.errors import BedplateError, ConflictError, HostFaultError, InvalidSpecError, UnavailableError
from fleet.model.assignment import Sandbox
from fleet.model.units import KIB, MIB
from mb.artifact import Change, ChangeKind
from mb.client import Client
from mb.console import Outbox
from mb.program import ROOT, USERS, Ended, Printed, Program
from mb.tarread import Node, NodeKind, read_nodes, tar_invalid
from mb.writeback import Action, Choices, Step, apply_writeback, left_alone, look, plan_writeback

# What a guest's tools may say about a failure.
SAID_BYTES_MAX = 4 * KIB
# "file 9223372036854775807 x"
HEADER_BYTES_MAX = 64
COPY_BYTES = 256 * KIB

# A file appears under its name when it is whole; its size tells whether it is.
_FILE_IN = """set -e
t=$1; case $t in */) mkdir -p -- "$t";; esac
if [ -d "$t" ]; then t=${t%/}/$2; fi
p=$(mktemp "$(dirname -- "$t")/.mb-cp.XXXXXX")
trap 'rm -f -- "$p"' EXIT; trap 'exit 1' HUP INT TERM
cat > "$p"; chmod "$4" -- "$p"
[ "$(stat -c %s -- "$p")" = "$3" ] || { echo 'it came in cut off' >&2; exit 1; }
mv -fT -- "$p" "$t" """
_TAR_IN = """set -e
t=$1; if [ -d "$t" ] && [ -n "$2" ]; then t=${t%/}/$2; fi
mkdir -p -- "$t"; exec tar -x -o -f - -C "$t" """
# Only what the reader here knows: files, folders, symlinks; no hard links, and names without "./".
_OUT = """set -e
if [ -d "$1" ]; then
echo folder; cd -- "$1"
find . -mindepth 1 \\( -type f -o -type d -o -type l \\) -printf '%P\\0' |
tar --format=pax --hard-dereference --no-recursion --null --files-from=- -c -f -
else
s=$(stat -L -c %s -- "$1"); x=; if [ -x "$1" ]; then x=x; fi
echo "file $s $x"; exec cat -- "$1"
fi"""
_TAR_OUT = 'exec tar -c -f - -C "$(dirname -- "$1")" -- "$(basename -- "$1")"'

Say = Callable[[int], None]
Write = Callable[[bytes], int]
Produce = Callable[[Write], None]


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied: the bytes that went over, the paths that were written here, and what was left alone, by reason.

    `paths` is None where the guest or whoever reads stdout does the writing.
    """

    size_bytes: int
    paths: int | None
    left: dict[str, int]


@dataclass(frozen=True, slots=True)
class Guest:
    """The sandbox that is copied to or from, and as whom there."""

    client: Client
    sandbox: Sandbox
    user: str = USERS[0]


async def copy_in(guest: Guest, source: Path | None, target: str, said: Say) -> Copied:
    """Copies a file or folder, or the tar on standard input when `source` is None, to `target` in the sandbox, as cp would."""
    words, produce = _plan_in(source, target)
    return await _feed(guest, words, produce, said)


def _plan_in(source: Path | None, target: str) -> tuple[tuple[str, ...], Produce]:
    """The guest's script with its arguments, and what writes its input."""
    if source is None:
        return (_TAR_IN, target, ""), _pass_stdin
    try:
        found = source.stat()
    except OSError as error:
        message = f"{source}: {error.strerror}"
        raise InvalidSpecError("source_invalid", message, "name a file that exists", field="SRC") from error
    name = "" if str(source) in (".", "..") else source.absolute().name
    if stat.S_ISDIR(found.st_mode):
        return (_TAR_IN, target, name), lambda write: _write_tar(source, write)
    if not stat.S_ISREG(found.st_mode):
        raise InvalidSpecError("source_invalid", f"{source} is no file or folder", "name a file or folder", field="SRC")
    words = (_FILE_IN, target, name, str(found.st_size), f"{found.st_mode & 0o777:o}")
    return words, lambda write: _write_file(source, write)


async def copy_out(guest: Guest, path: str, dest: Path, said: Say, *, with_git: bool = False) -> Copied:
    """Copies a file or folder of the sandbox to `dest`, as cp would; nothing is written before all of it is read and trusted."""
    is_content = path.endswith(("/.", "/")) or path in ("", ".", "..", "/")
    name = "" if is_content else posixpath.basename(path)
    with tempfile.TemporaryFile(dir=_nearest_folder(dest)) as stream:
        header = await _receive(guest, path, stream, said)
        return await asyncio.to_thread(_take_out, header, _place(dest, name), stream, with_git)


async def pass_out(guest: Guest, path: str, said: Say) -> Copied:
    """Writes a tar of a file or folder of the sandbox to standard output, byte for byte as the guest made it."""
    size_bytes = 0
    async for payload in _run(guest, (_TAR_OUT, path), Outbox()):
        size_bytes += len(payload)
        await asyncio.to_thread(_write_all, sys.stdout.buffer, payload)
        said(size_bytes)
    return Copied(size_bytes, None, {})


async def _receive(guest: Guest, path: str, stream: BinaryIO, said: Say) -> list[str]:
    resources = guest.sandbox.spec.resources
    bytes_max = (resources.disk_mib + resources.memory_mib) * MIB
    header, received = b"", 0
    async for payload in _run(guest, (_OUT, path), Outbox()):
        if b"\n" not in header:
            header += payload
            if b"\n" not in header[:HEADER_BYTES_MAX] and len(header) > HEADER_BYTES_MAX:
                raise tar_invalid("it does not say what it is")
            _, _, content = header.partition(b"\n")
        else:
            content = payload
        received += len(content)
        if received > bytes_max:
            raise tar_invalid(f"it is larger than all the disk and memory of {guest.sandbox.spec.name}")
        stream.write(content)
        said(received)
    stream.flush()
    words = header.partition(b"\n")[0].decode("utf-8", "replace").split(" ")
    if words == ["folder"]:
        return words
    if words[0] != "file" or len(words) != 3:
        raise tar_invalid("it does not say what it is")
    if words[1] != str(received):
        message = f"{path} changed while it was read: {received} bytes came of {words[1][:20]}"
        raise ConflictError("changed_meanwhile", message, "copy it again")
    return words


def _place(dest: Path, name: str) -> Path:
    return dest / name if name and dest.is_dir() else dest


def _take_out(header: list[str], place: Path, stream: BinaryIO, with_git: bool) -> Copied:
    size_bytes = stream.seek(0, os.SEEK_END)
    if header[0] == "folder":
        return _write_out(place, list(read_nodes(stream, size_bytes)), stream, with_git)
    node = Node(place.name, NodeKind.FILE, header[2] == "x", "", 0, size_bytes)
    return _write_out(place.parent, [node], stream, with_git)


def _write_out(folder: Path, nodes: list[Node], stream: BinaryIO, with_git: bool) -> Copied:
    if len({node.path for node in nodes}) != len(nodes):
        raise tar_invalid("a path is in it twice")
    changes = [Change(node.path, ChangeKind.ADDED, False, None, node) for node in nodes]
    here = look(folder, changes, stream, stream)
    steps = plan_writeback(changes, here, Choices(force=True, with_git=with_git))
    in_the_way = [step for step in steps if step.action is Action.CONFLICT]
    if in_the_way:
        first = in_the_way[0]
        message = f"nothing was written: {folder / first.change.path} is in the way ({first.reason})"
        raise ConflictError("in_the_way", message, "move it, or name another place")
    apply_writeback(folder, steps, stream)
    return Copied(sum(node.size_bytes for node in nodes), _count(steps, Action.WRITE), left_alone(steps))


def _count(steps: list[Step], action: Action) -> int:
    return sum(step.action is action for step in steps)


async def _feed(guest: Guest, words: tuple[str, ...], produce: Produce, said: Say) -> Copied:
    outbox, faults, sent = Outbox(), [], 0

    def write(payload: bytes) -> int:
        nonlocal sent
        sent += len(payload)
        said(sent)
        return outbox.write(payload) if payload else 0

    def run() -> None:
        try:
            produce(write)
            outbox.write(b"")
        except (BedplateError, OSError, ValueError) as error:
            # Its input has no end then: the program is ended by a signal, and what it made is not taken for whole.
            faults.append(error)
            outbox.fail()

    feeder = threading.Thread(target=run, daemon=True)
    feeder.start()
    try:
        async for _ in _run(guest, words, outbox):
            pass
    except (UnavailableError, HostFaultError):
        if not faults or isinstance(faults[0], BrokenPipeError):
            raise
    finally:
        outbox.close()
    if faults and not isinstance(faults[0], BrokenPipeError):
        message = f"nothing more was sent: {faults[0]}"
        raise HostFaultError("read_failed", message, "mend it and copy again") from faults[0]
    return Copied(sent, None, {})


async def _run(guest: Guest, words: tuple[str, ...], outbox: Outbox) -> AsyncIterator[bytes]:
    script, *arguments = words
    command = ("/bin/sh", "-c", script, "mb-cp", *arguments)
    program = Program(guest.sandbox.sandbox_id, command, env=(("LC_ALL", "C.UTF-8"),), user=guest.user)
    said = b""
    async for part in guest.client.live.run_program(program, outbox.parts()):
        if isinstance(part, Printed) and part.is_error:
            said = (said + part.payload)[:SAID_BYTES_MAX]
        elif isinstance(part, Printed):
            yield part.payload
        elif part.exit_code == 0:
            return
        else:
            raise _failure(guest, part, said)
    raise UnavailableError("copy_cut", "the call was cut; what was copied may not be whole", "copy it again")


def _failure(guest: Guest, ended: Ended, said: bytes) -> HostFaultError:
    text = " ".join(said.decode("utf-8", "replace").split()) or ended.message
    how = f"signal {ended.signal}" if ended.signal is not None else f"exit {ended.exit_code}"
    more = "" if guest.user == ROOT else "; --user root may more"
    next_step = f"name a path that is there and may be read or written{more}"
    return HostFaultError("copy_failed", f"in {guest.sandbox.spec.name}: {text or how}", next_step)


def _pass_stdin(write: Write) -> None:
    while payload := os.read(0, COPY_BYTES):
        write(payload)


def _write_file(source: Path, write: Write) -> None:
    with source.open("rb") as stream:
        while payload := stream.read(COPY_BYTES):
            write(payload)


def _write_tar(folder: Path, write: Write) -> None:
    sink: Any = _Sink(write)
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=COPY_BYTES) as tar:
        for entry in sorted(folder.iterdir()):
            tar.add(entry, entry.name, filter=_strip_owner)


class _Sink:
    """A file for tarfile that passes on what is written."""

    def __init__(self, write: Write) -> None:
        self.write = write


def _strip_owner(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if member.isdev() else member


def _write_all(stream: IO[bytes], payload: bytes) -> None:
    stream.write(payload)
    stream.flush()


def _nearest_folder(dest: Path) -> Path:
    """The folder of `dest` that is there: its disk is the one that the copy must fit on."""
    return next(folder for folder in (dest.absolute(), *dest.absolute().parents) if folder.is_dir())
