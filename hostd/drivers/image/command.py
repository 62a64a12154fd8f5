"""Runs mkfs and its like: bounded in time and output, the last words in the error."""

import asyncio
from asyncio.subprocess import DEVNULL, PIPE, STDOUT

from fleet.errors import HostFaultError

# mkfs of the largest source allowed (2 GiB) takes under a minute on the slowest disk measured; five minutes is a hang.
COMMAND_TIMEOUT_S = 300.0
# An error carries it to the client, which is told 400 characters (fleet.rpc).
TAIL_BYTES = 300
READ_BYTES = 64 * 1024


async def run_command(code: str, *arguments: str) -> None:
    """Runs a program to its end; raises HostFaultError `code` with its last words when it fails or hangs."""
    try:
        process = await asyncio.create_subprocess_exec(*arguments, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
    except OSError as error:
        raise HostFaultError(
            code, f"{arguments[0]} cannot be run: {error.strerror}", "install it on the host"
        ) from error
    assert process.stdout is not None
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            tail = await _read_tail(process.stdout)
            await process.wait()
    except TimeoutError as error:
        raise HostFaultError(code, f"{arguments[0]} hung for {COMMAND_TIMEOUT_S:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        words = tail.decode("utf-8", "replace").strip()
        raise HostFaultError(code, f"{arguments[0]} ended with code {process.returncode}: {words}")


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while content := await stream.read(READ_BYTES):
        tail = (tail + content)[-TAIL_BYTES:]
    return tail
