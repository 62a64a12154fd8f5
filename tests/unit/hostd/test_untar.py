"""A hostile tar writes nothing outside of its folder, and is refused by the name of its fault."""

import io
import os
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import InvalidSpecError
from hostd.drivers.image import untar
from hostd.drivers.image.untar import DEPTH_MAX, PATH_BYTES_MAX, READ_BYTES_MAX, unpack_source

Member = tuple[str, bytes, dict[str, Any]]


def a_file(name: str, content: bytes = b"x", **fields: Any) -> Member:
    return name, content, fields


def a_folder(name: str) -> Member:
    return name, b"", {"type": tarfile.DIRTYPE}


def a_link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    return name, b"", {"type": kind, "linkname": target}


def pack(path: Path, *members: Member) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, fields in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return path


def tree(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = str(path.readlink()) if path.is_symlink() else "/" if path.is_dir() else path.read_text()
        found[str(path.relative_to(folder))] = kind
    return found


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Packs members, unpacks them beside a folder that must stay as it is, and shows what came out."""

    def unpack(*members: Member) -> dict[str, str]:
        return unpack_tar(pack(tmp_path / "source.tar", *members), tmp_path)

    return unpack


def unpack_tar(tar: Path, tmp_path: Path) -> dict[str, str]:
    victim, folder = tmp_path / "victim", tmp_path / "tree"
    victim.mkdir()
    folder.mkdir()
    try:
        with tar.open("rb") as stream:
            unpack_source(stream, folder)
    finally:
        assert tree(victim) == {}
        assert {path.name for path in tmp_path.iterdir()} <= {"source.tar", "victim", "tree"}
    return tree(folder)


def test_a_clean_tree_comes_out(unpack: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """Files, folders and symlinks, with the one bit of the mode that matters; an absolute symlink is only text."""
    out = unpack(
        a_folder("."),
        a_folder("src"),
        a_file("src/run", b"go", mode=0o4755),
        a_file("README", b"", mode=0o600),
        a_link("src/etc", "/etc/passwd"),
        a_link("up", "../../victim"),
    )
    assert out == {"README": "", "src": "/", "src/etc": "/etc/passwd", "src/run": "go", "up": "../../victim"}
    assert (tmp_path / "tree/src/run").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "tree/README").stat().st_mode & 0o7777 == 0o644


HOSTILE = {
    "absolute": [a_file("/tmp/x")],
    "climbing": [a_file("../victim/x")],
    "climbing inside": [a_folder("a"), a_file("a/../../victim/x")],
    "symlink parent": [a_link("a", "../victim"), a_file("a/x")],
    "absolute symlink parent": [a_link("a", "/tmp"), a_file("a/x")],
    "folder behind a symlink": [a_link("a", ".."), a_file("a/victim/x")],
    "folder made behind a symlink": [a_link("a", ".."), a_folder("a/victim/b"), a_file("a/victim/b/x")],
    "symlink over folder": [a_folder("a"), a_link("a", "../victim"), a_file("a/x")],
    "folder over symlink": [a_link("a", "../victim"), a_folder("a"), a_file("a/x")],
    "file through symlink": [a_link("a", "../victim/x"), a_file("a")],
    "hard link": [a_file("a"), a_link("b", "a", tarfile.LNKTYPE)],
    "hard link outside": [a_link("b", "/etc/passwd", tarfile.LNKTYPE)],
    "device": [("null", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})],
    "disk": [("sda", b"", {"type": tarfile.BLKTYPE})],
    "fifo": [("pipe", b"", {"type": tarfile.FIFOTYPE})],
    "unknown type": [("odd", b"", {"type": b"Z"})],
    "twice": [a_file("a"), a_file("a")],
    "twice spelled apart": [a_file("a"), a_file("./a")],
    "no parent": [a_file("a/b")],
    "the folder itself as a file": [a_file(".")],
    "the folder itself as a link": [a_link(".", "/etc")],
    "file as parent": [a_file("a"), a_file("a/b")],
    "deep": [a_folder("/".join("d" * count)) for count in range(1, DEPTH_MAX + 2)],
    "long": [a_file("x" * (PATH_BYTES_MAX + 1))],
    "long part": [a_file("x" * 256)],
    "long target": [a_link("a", "x" * PATH_BYTES_MAX)],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_tar_is_refused(unpack: Callable[..., dict[str, str]], members: list[Member]) -> None:
    """Nothing is written outside, nothing through a symlink, nothing twice; the error is the sender's."""
    with pytest.raises(InvalidSpecError) as caught:
        unpack(*members)
    assert caught.value.code == "source_invalid"
    assert len(caught.value.message) < 500


def test_as_deep_as_allowed(unpack: Callable[..., dict[str, str]]) -> None:
    """The limit itself is within it."""
    assert len(unpack(*HOSTILE["deep"][:-1])) == DEPTH_MAX


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    header = bytearray(
        struct.pack(
            "100s8s8s8s12s12s8s1s100s6s2s",
            name,
            *[b"0000644"] * 3,
            size,
            b"0" * 11,
            b" " * 8,
            kind,
            b"",
            b"ustar",
            b"00",
        )
    )
    header += bytes(512 - len(header))
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


NEGATIVE = b"\xff" * 11 + b"\xfe"
PAX_NUL = b"20 linkpath=/etc\0/x\n"
RAW = {
    "negative size": raw_header(b"a", NEGATIVE) + bytes(1024),
    "size of gigabytes": raw_header(b"a", b"77777777777") + bytes(1024),
    "pax header of gigabytes": raw_header(b"a", b"77777777777", b"x") + bytes(1024),
    "pax header past the limit": raw_header(b"a", b"%011o" % (READ_BYTES_MAX + 1), b"x") + bytes(READ_BYTES_MAX * 2),
    "long name past the limit": raw_header(b"a", b"%011o" % (READ_BYTES_MAX + 1), b"L") + bytes(READ_BYTES_MAX * 2),
    "endless pax headers": (raw_header(b"a", b"%011o" % 9, b"x") + b"9 a=bcd\n".ljust(512, b"\0")) * 3000,
    "endless global headers": (raw_header(b"a", b"%011o" % 9, b"g") + b"9 a=bcd\n".ljust(512, b"\0")) * 3000,
    "NUL in a target": raw_header(b"a", b"%011o" % 20, b"x")
    + PAX_NUL.ljust(512, b"\0")
    + raw_header(b"a", b"0", b"2")
    + bytes(1024),
    "name that is no UTF-8": raw_header(b"\xff\xfe", b"0") + bytes(1024),
    "cut in a file": raw_header(b"a", b"%011o" % 2000) + bytes(512),
    "nothing": b"",
    "noise": os.urandom(4096),
}


@pytest.mark.parametrize("content", RAW.values(), ids=RAW.keys())
def test_a_forged_header_is_refused(tmp_path: Path, content: bytes) -> None:
    """What tarfile itself would stumble over, read gigabytes for, or count backwards from, is the sender's error."""
    (tmp_path / "source.tar").write_bytes(content)
    with pytest.raises(InvalidSpecError) as caught:
        unpack_tar(tmp_path / "source.tar", tmp_path)
    assert caught.value.code == "source_invalid"


def test_a_sparse_file_counts_whole(tmp_path: Path) -> None:
    """A file that claims terabytes of holes is refused before it is written."""
    header = bytearray(raw_header(b"a", b"%011o" % 0, b"S"))
    # GNU's old sparse format: the real size at 483 (tar(5)).
    header[483:495] = b"\x80" + (2**42).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "source.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(InvalidSpecError, match="MiB"):
        unpack_tar(tmp_path / "source.tar", tmp_path)


@pytest.mark.slow
def test_too_many_members(tmp_path: Path) -> None:
    """The number of members is bounded, those that write nothing included."""
    (tmp_path / "source.tar").write_bytes(raw_header(b".", b"0", b"5") * (untar.MEMBERS_MAX + 1) + bytes(1024))
    with pytest.raises(InvalidSpecError, match="members"):
        unpack_tar(tmp_path / "source.tar", tmp_path)


PARTS = st.sampled_from(["a", "b", "..", ".", "victim", "", "/"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
MEMBERS = st.one_of(
    st.builds(a_file, NAMES),
    st.builds(a_folder, NAMES),
    st.builds(a_link, NAMES, NAMES),
    st.builds(a_link, NAMES, st.just("/tmp")),
)


@given(members=st.lists(MEMBERS, max_size=6))
def test_no_tar_leaves_its_folder(tmp_path_factory: pytest.TempPathFactory, members: list[Member]) -> None:
    """Whatever links and paths are mixed: what is written lies in the folder, or the tar is refused."""
    folder = tmp_path_factory.mktemp("tar")
    with suppress(InvalidSpecError):
        unpack_tar(pack(folder / "source.tar", *members), folder)
