"""Whatever tree is packed comes out the same on a host, and mb reads its own tars."""

import io
import os
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hostd.drivers.image.untar import unpack_source
from mb.artifact import read_tree
from mb.pack import pack_folder

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..", ".bedplateignore") and len(name.encode()) < 200
)
FILES = st.tuples(st.binary(max_size=1500), st.booleans())
LINKS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
TREES = st.recursive(FILES | LINKS, lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=12).filter(
    lambda tree: isinstance(tree, dict)
)


def write(folder: Path, tree: dict[str, object]) -> None:
    folder.mkdir()
    for name, node in tree.items():
        path = folder / name
        if isinstance(node, dict):
            write(path, node)
        elif isinstance(node, str):
            path.symlink_to(node)
        else:
            content, is_executable = node  # type: ignore[misc]
            path.write_bytes(content)
            path.chmod(0o750 if is_executable else 0o640)


def read(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in folder.iterdir():
        if path.is_symlink():
            found[path.name] = os.readlink(path)  # noqa: PTH115 (a Path would normalise the target)
        elif path.is_dir():
            found[path.name] = read(path)
        else:
            found[path.name] = (path.read_bytes(), bool(path.stat().st_mode & 0o111))
    return found


@given(TREES)
def test_a_packed_tree_is_unpacked_as_it_was(tree: dict[str, object]) -> None:
    """Names, contents, symlinks and `x`: what the agent sees is what was there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "one", tree)
        with (folder / "source.tar").open("wb") as stream:
            packed = pack_folder(folder / "one", stream)
        (folder / "two").mkdir()
        with (folder / "source.tar").open("rb") as tar:
            unpack_source(tar, folder / "two")
        assert read(folder / "two") == read(folder / "one") == tree
        assert pack_folder(folder / "two") == packed


@given(TREES)
def test_mb_reads_what_it_packs(tree: dict[str, object]) -> None:
    """The reader of hostile tars accepts every honest one."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / "one", tree)
        stream = io.BytesIO()
        packed = pack_folder(Path(name) / "one", stream)
        nodes = read_tree(stream, packed.size_bytes)
        paths = {str(path.relative_to(Path(name) / "one")) for path in (Path(name) / "one").rglob("*")}
        assert len(nodes) == packed.members
        assert set(nodes) == paths
