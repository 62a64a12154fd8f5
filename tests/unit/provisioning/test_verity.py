"""The hash tree of a root disk: what the kernel expects, and another for each byte that changes."""

import hashlib
import io

import pytest

from provisioning.verity import BLOCK_BYTES, append_tree

SALT = bytes.fromhex("ab" * 32)


def _disk(blocks: int) -> bytes:
    return b"".join(hashlib.sha256(str(number).encode()).digest() * 128 for number in range(blocks))


# Made by veritysetup 2.6.1: format --no-superblock --hash=sha256 --salt=abab…
@pytest.mark.parametrize(
    ("blocks", "root_hash", "tree_digest"),
    [
        (
            300,
            "e0d7620c0a0d95b5eb1b22a183fcb3f693be2f1bca97aeee45234e77117d76a2",
            "d2a3ceed3df9eed340013d67e04fa5ec694a8d156a5d6fa6be687960a4fc3542",
        ),
        (
            20000,
            "30931be0921e66f14959a6f0594658113a2cd31a740c89517a31d684eb2188f9",
            "940800036ccb3823663a06883e84b0d504bdb4e9b9f70e124ea719cc74646003",
        ),
    ],
    ids=["two levels", "three levels"],
)
def test_the_tree_is_the_one_that_veritysetup_makes(blocks: int, root_hash: str, tree_digest: str) -> None:
    """The format is the kernel's, not ours: the same tree and top as the reference program's, over all levels."""
    disk = io.BytesIO(_disk(blocks))
    made = append_tree(disk, "sha256", SALT)
    assert (made.data_blocks, made.root_hash) == (blocks, root_hash)
    content = disk.getvalue()
    assert content[: blocks * BLOCK_BYTES] == _disk(blocks)
    assert hashlib.sha256(content[blocks * BLOCK_BYTES :]).hexdigest() == tree_digest


def test_every_byte_counts() -> None:
    """A flipped bit in the first, a middle and the last block, or another salt, gives another top."""
    data = _disk(5)
    tops = {
        append_tree(io.BytesIO(data), "sha256", SALT).root_hash,
        append_tree(io.BytesIO(data), "sha256", b"").root_hash,
    }
    for offset in (0, 2 * BLOCK_BYTES + 17, len(data) - 1):
        changed = bytearray(data)
        changed[offset] ^= 1
        tops.add(append_tree(io.BytesIO(bytes(changed)), "sha256", SALT).root_hash)
    assert len(tops) == 5


def test_a_disk_is_filled_up_to_whole_blocks() -> None:
    """The kernel reads whole blocks: what is hashed is what will be read."""
    disk = io.BytesIO(_disk(2) + b"tail")
    made = append_tree(disk, "sha256", SALT)
    assert made.data_blocks == 3
    assert disk.getvalue()[2 * BLOCK_BYTES :].startswith(b"tail" + b"\0" * (BLOCK_BYTES - 4))
    assert len(disk.getvalue()) == 4 * BLOCK_BYTES


def test_the_command_line_has_all_that_checks_the_disk() -> None:
    """One word without spaces, in the four parts that the initramfs takes apart."""
    option = append_tree(io.BytesIO(_disk(2)), "sha256", SALT).render_option()
    name, _, parts = option.partition("=")
    algorithm, blocks, root_hash, salt = parts.split(",")
    assert (name, algorithm, blocks, len(root_hash), salt) == ("bedplate.verity", "sha256", "2", 64, SALT.hex())
    assert " " not in option


def test_a_disk_too_small_for_a_tree_is_refused() -> None:
    """One block would be its own top; no root disk is that small."""
    with pytest.raises(ValueError, match="no tree"):
        append_tree(io.BytesIO(b"x"), "sha256", SALT)
