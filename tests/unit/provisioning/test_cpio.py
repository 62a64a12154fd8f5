"""The initramfs archive: what the kernel can unpack, the same bytes for the same members."""

import random
import stat

import pytest

from provisioning.cpio import CpioMember, read_cpio, write_cpio

MTIME_S = 1754697600
MEMBERS = [
    CpioMember("bin", stat.S_IFDIR | 0o755),
    CpioMember("bin/sh", stat.S_IFLNK | 0o777, b"busybox"),
    CpioMember("init", stat.S_IFREG | 0o755, b"#!/bin/sh\n"),
    CpioMember("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
    CpioMember("dev", stat.S_IFDIR | 0o755),
]


def test_members_come_in_one_order_whatever_order_they_are_given_in() -> None:
    """The same members make the same archive: an image's digest must not depend on how a folder was listed."""
    shuffled = random.Random(7).sample(MEMBERS, len(MEMBERS))
    assert write_cpio(shuffled, MTIME_S) == write_cpio(MEMBERS, MTIME_S)


def test_a_folder_comes_before_what_is_in_it() -> None:
    """The kernel creates members in order and does not make missing parents."""
    archive = write_cpio(MEMBERS, MTIME_S)
    assert archive.index(b"dev\0") < archive.index(b"dev/console\0")


def test_every_member_begins_on_a_multiple_of_four() -> None:
    """The kernel reads headers, names and contents at four-byte boundaries (buffer-format.rst)."""
    archive = write_cpio([CpioMember("a" * length, stat.S_IFREG | 0o644, b"x" * length) for length in range(1, 9)], 0)
    assert [offset for offset in range(len(archive)) if archive.startswith(b"070701", offset) and offset % 4] == []
    assert archive.count(b"070701") == 9


@pytest.mark.parametrize("path", ["", "/init", "a" * 256])
def test_a_path_that_cannot_be_unpacked_is_refused(path: str) -> None:
    """A bad path is found by the builder, not by a kernel that skips the member in silence."""
    with pytest.raises(ValueError, match="cannot be a member's path"):
        write_cpio([CpioMember(path, stat.S_IFREG | 0o644)], MTIME_S)


def test_a_path_given_twice_is_refused() -> None:
    """Two members of one path would mean that the later silently wins."""
    with pytest.raises(ValueError, match="twice"):
        write_cpio([MEMBERS[0], MEMBERS[0]], MTIME_S)


def test_what_was_written_is_read() -> None:
    """A difference between two archives is named by member, so each must be found with its content."""
    found = {path: content for path, (_, content) in read_cpio(write_cpio(MEMBERS, MTIME_S))}
    assert found == {member.path: member.content for member in MEMBERS}
