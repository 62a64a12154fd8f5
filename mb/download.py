"""Fetches content into temporary files and believes none of it before its digest is right."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from fleet.errors import InvalidSpecError, NotFoundError
from fleet.model.admission import SOURCE_BYTES_MAX
from fleet.model.assignment import Sandbox
from fleet.model.ids import Digest
from fleet.model.sandbox import Artifact
from fleet.model.units import MIB
from mb.artifact import Change, read_artifact, read_tree
from mb.client import Client
from mb.live import Chunk
from mb.tarread import Node

# What a host keeps of one sandbox at most (docs/guest-link.md).
ARTIFACT_BYTES_MAX = 1024 * MIB


@dataclass(frozen=True, slots=True)
class SourceChanges:
    """What became of one source: its tar and tree as they went in, and the changes to it."""

    guest_path: str
    stream: BinaryIO
    tree: Mapping[str, Node]
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class Result:
    """What a sandbox changed, per source; the contents of new nodes are in `stream`, those of old ones in their source's."""

    sandbox: Sandbox
    stream: BinaryIO
    sources: tuple[SourceChanges, ...]


def artifact_of(sandbox: Sandbox) -> Artifact:
    """A sandbox's artifact; raises NotFoundError while it has none."""
    if sandbox.status is None or sandbox.status.artifact is None:
        next_step = f"see mb status {sandbox.spec.name}; an artifact is there once its agents have ended"
        raise NotFoundError("artifact_missing", f"sandbox {sandbox.spec.name} has no artifact", next_step)
    return sandbox.status.artifact


@contextmanager
def temporary_files(count: int) -> Iterator[list[BinaryIO]]:
    """That many files without a name, gone when the context ends."""
    with ExitStack() as stack:
        yield [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]


async def fetch_artifact(client: Client, sandbox: Sandbox, stream: BinaryIO) -> None:
    """Writes a sandbox's artifact into `stream`; raises InvalidSpecError `digest_mismatch` when it is not the one told."""
    artifact = artifact_of(sandbox)
    chunks = client.fetch_artifact(sandbox.sandbox_id)
    await _receive(chunks, stream, artifact.digest, ARTIFACT_BYTES_MAX)


async def fetch_result(client: Client, sandbox: Sandbox, files: list[BinaryIO]) -> Result:
    """A sandbox's changes with the sources they are against; needs one more file than the sandbox has sources."""
    artifact_of(sandbox)
    stream, *source_streams = files
    sources = sandbox.spec.sources
    for source, source_stream in zip(sources, source_streams, strict=True):
        await _receive(
            client.fetch_source(source.digest, sandbox.tenant), source_stream, source.digest, SOURCE_BYTES_MAX
        )
    await fetch_artifact(client, sandbox, stream)
    trees = [await asyncio.to_thread(read_tree, one, _size(one)) for one in source_streams]
    guest_paths = [source.guest_path for source in sources]
    changes = await asyncio.to_thread(read_artifact, stream, _size(stream), guest_paths, trees)
    found = zip(guest_paths, source_streams, trees, changes, strict=True)
    return Result(sandbox, stream, tuple(SourceChanges(*parts) for parts in found))


async def _receive(chunks: AsyncIterator[Chunk], stream: BinaryIO, digest: Digest, bytes_max: int) -> None:
    hasher, received = hashlib.sha256(), 0
    async for chunk in chunks:
        received += len(chunk.payload)
        if received > bytes_max:
            break
        hasher.update(chunk.payload)
        stream.write(chunk.payload)
    if "sha256:" + hasher.hexdigest() != digest:
        message = f"what arrived has not the digest {digest}"
        raise InvalidSpecError("digest_mismatch", message, "try again; if it stays so, see the host's log")


def _size(stream: BinaryIO) -> int:
    stream.flush()
    return stream.seek(0, 2)
