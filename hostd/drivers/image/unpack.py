"""Unpacks a source in a process of its own: bounded in memory, CPU and time, without privileges, ended whole.

A tar that is made for it costs its sender this process, and hostd nothing.
"""

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import HostFaultError, InvalidSpecError


@dataclass(frozen=True, slots=True)
class Bounds:
    """What unpacking may take: address space, CPU time, and time."""

    memory_bytes: int = 512 * 1024 * 1024
    cpu_s: int = 120
    timeout_s: float = 300.0


# The largest tree (200,000 paths, 2 GiB) takes a third of these on the slowest machine measured.
BOUNDS = Bounds()
# The child answers with one line of JSON; a traceback on stderr is not read.
ANSWER_BYTES_MAX = 4096

_CHILD = "hostd.drivers.image.unpack_child"
_NEXT = "pack it with mb; send less, or split it"


async def unpack_apart(tar: Path, folder: Path, bounds: Bounds = BOUNDS) -> None:
    """Unpacks `tar` into the empty `folder`, which the child owns meanwhile; raises as `unpack_source` does.

    Also InvalidSpecError `source_invalid` for a tar that takes more than the child may have.
    """
    with tar.open("rb") as stream:
        arguments = ("-m", _CHILD, str(folder), str(bounds.memory_bytes), str(bounds.cpu_s))
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=stream, stdout=PIPE, stderr=DEVNULL
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(bounds.timeout_s):
            answer = await process.stdout.read(ANSWER_BYTES_MAX)
            await process.wait()
    except TimeoutError as error:
        raise _too_costly(bounds) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0 or answer:
        raise _read_answer(answer, bounds)


def _read_answer(answer: bytes, bounds: Bounds) -> Exception:
    try:
        told = json.loads(answer)
    except ValueError:
        # Killed at a limit, before it could say anything.
        return _too_costly(bounds)
    if told["is_host_fault"]:
        return HostFaultError(told["code"], told["message"], told["next_step"])
    return InvalidSpecError(told["code"], told["message"], told["next_step"])


def _too_costly(bounds: Bounds) -> InvalidSpecError:
    limits = f"{bounds.memory_bytes // 1024**2} MiB of memory, {bounds.cpu_s} s of CPU and {bounds.timeout_s:.0f} s"
    return InvalidSpecError("source_invalid", f"the source cannot be unpacked within {limits}", _NEXT)
