"""The hash tree of a root disk, in the format that the kernel's dm-verity reads. PURE but for the stream it is given.

    data blocks | top level, one block | next level | … | hashes of data blocks

Version 1 without a superblock: each hash is of salt and block, and a hash block is filled up with zeros. Source: the kernel's
Documentation/admin-guide/device-mapper/verity.rst and verity_ctr() in drivers/md/dm-verity-target.c.
"""

import hashlib
from dataclasses import dataclass
from typing import BinaryIO

# The page size: dm-verity takes no larger block, and a smaller one would mean more hashes.
BLOCK_BYTES = 4096
# What the kernel calls the same algorithms.
ALGORITHMS = {"sha256": hashlib.sha256}


@dataclass(frozen=True, slots=True)
class Verity:
    """All that is needed to check a disk: how much of it is data, and what its tree's top hashes to (hex)."""

    algorithm: str
    data_blocks: int
    root_hash: str
    salt: str

    def render_option(self) -> str:
        """The word of the kernel command line that the initramfs reads."""
        return f"bedplate.verity={self.algorithm},{self.data_blocks},{self.root_hash},{self.salt}"


def append_tree(disk: BinaryIO, algorithm: str, salt: bytes) -> Verity:
    """Fills the disk up to whole blocks, appends its tree, and answers what checks it.

    Raises ValueError for a disk of less than two blocks: it would need no tree.
    """
    hashes = _hash_blocks(disk, algorithm, salt)
    data_blocks = len(hashes)
    if data_blocks < 2:
        raise ValueError(f"a disk of {data_blocks} blocks has no tree")
    levels = []
    while len(hashes) > 1:
        blocks = _pack(hashes)
        levels.append(b"".join(blocks))
        hashes = [_hash(block, algorithm, salt) for block in blocks]
    for level in reversed(levels):
        disk.write(level)
    return Verity(algorithm, data_blocks, hashes[0].hex(), salt.hex())


def _hash_blocks(disk: BinaryIO, algorithm: str, salt: bytes) -> list[bytes]:
    hashes = []
    disk.seek(0)
    while block := disk.read(BLOCK_BYTES):
        if len(block) < BLOCK_BYTES:
            fill = b"\0" * (BLOCK_BYTES - len(block))
            disk.write(fill)
            block += fill
        hashes.append(_hash(block, algorithm, salt))
    return hashes


def _pack(hashes: list[bytes]) -> list[bytes]:
    per_block = BLOCK_BYTES // len(hashes[0])
    return [
        b"".join(hashes[start : start + per_block]).ljust(BLOCK_BYTES, b"\0")
        for start in range(0, len(hashes), per_block)
    ]


def _hash(block: bytes, algorithm: str, salt: bytes) -> bytes:
    return ALGORITHMS[algorithm](salt + block).digest()
