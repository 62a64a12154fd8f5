"""An artifact: what a sandbox changed in its sources (docs/guest-link.md, "The artifact"). Written by a guest, so hostile.

Every path is checked again, every change has its member and every member its change, or the whole artifact is refused.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, BinaryIO

from fleet.model.units import MIB
from mb.tarread import Node, NodeKind, check_path, read_nodes, tar_invalid

LISTING = "changes.json"
# 200,000 changes with paths of some hundred bytes.
LISTING_BYTES_MAX = 64 * MIB
CHANGES_MAX = 200_000
# Every value of JSON but the first follows one of these: counting them bounds what parsing may build. A change has four, and a path
# may hold some.
SIGNS_MAX = 10 * CHANGES_MAX


class ChangeKind(StrEnum):
    """What happened to a path."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Change:
    """One changed path of a source: `old` as it went in, `new` as it came out; `is_skipped`: nothing that a tar can carry."""

    path: str
    kind: ChangeKind
    is_skipped: bool
    old: Node | None
    new: Node | None


def read_tree(stream: BinaryIO, size_bytes: int) -> dict[str, Node]:
    """A source's tar, by path."""
    return {node.path: node for node in read_nodes(stream, size_bytes)}


def read_artifact(
    stream: BinaryIO, size_bytes: int, guest_paths: Sequence[str], trees: Sequence[Mapping[str, Node]]
) -> list[list[Change]]:
    """The changes of each source, sorted by path; `guest_paths` are the spec's and `trees` the sources that went in.

    Raises InvalidSpecError `tar_invalid` for anything that an honest guest does not write.
    """
    nodes = read_nodes(stream, size_bytes)
    first = next(nodes, None)
    if first is None or first.path != LISTING or first.kind is not NodeKind.FILE:
        raise tar_invalid(f"its first member is not {LISTING}")
    listing = _parse_listing(read_content(stream, first, LISTING_BYTES_MAX), guest_paths)
    members = {node.path: node for node in _distinct(nodes)}
    found = [
        [_to_change(entry, index, members, trees[index]) for entry in entries] for index, entries in enumerate(listing)
    ]
    if members:
        raise tar_invalid(f"{next(iter(members))[:100]!r} is in no list of changes")
    return [_sorted(changes) for changes in found]


def read_content(stream: BinaryIO, node: Node, bytes_max: int) -> bytes:
    """A file's bytes; raises InvalidSpecError when they are more than `bytes_max`."""
    if node.size_bytes > bytes_max:
        raise tar_invalid(f"{node.path[:100]!r} is larger than {bytes_max} bytes")
    stream.seek(node.offset)
    return stream.read(node.size_bytes)


def _sorted(changes: list[Change]) -> list[Change]:
    if len({change.path for change in changes}) != len(changes):
        raise tar_invalid("a path is listed twice")
    return sorted(changes, key=lambda change: change.path)


def _distinct(nodes: Iterable[Node]) -> list[Node]:
    found = list(nodes)
    if len({node.path for node in found}) != len(found):
        raise tar_invalid("a path is in it twice")
    return found


def _parse_listing(content: bytes, guest_paths: Sequence[str]) -> list[list[dict[str, Any]]]:
    if sum(content.count(sign) for sign in b"{[,") > SIGNS_MAX:
        raise tar_invalid(f"{LISTING} holds too much")
    try:
        listing = json.loads(content)
        sources = listing["sources"]
        if listing["version"] != 1 or [source["guest_path"] for source in sources] != list(guest_paths):
            raise tar_invalid("it is of another version or of other sources")
        entries = [list(source["changes"]) for source in sources]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise tar_invalid(f"{LISTING} is not as it should be") from error
    if sum(len(changes) for changes in entries) > CHANGES_MAX:
        raise tar_invalid("it lists too many changes")
    return entries


def _to_change(entry: Any, index: int, members: dict[str, Node], tree: Mapping[str, Node]) -> Change:
    try:
        path, kind, is_skipped = str(entry["path"]), ChangeKind(entry["kind"]), entry.get("skipped", False) is True
        path.encode("utf-8")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise tar_invalid(f"{LISTING} is not as it should be") from error
    check_path(path)
    new = members.pop(f"{index}/{path}", None)
    if (new is not None) is (is_skipped or kind is ChangeKind.DELETED):
        raise tar_invalid(f"{path[:100]!r} is listed and its member is not as listed")
    return Change(path, kind, is_skipped, tree.get(path), new)
