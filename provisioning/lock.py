"""Which exact packages an image is made of: the committed lock beside each recipe. PURE: text in, text out.

    for <64 hex digits: what was asked for>
    <name> <architecture> <version> <sha256 of the .deb>

It names no place: where packages come from is the building machine's choice, what they are is not.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fleet.errors import InvalidSpecError

# The largest image we have asks for 400 packages; what names ten times as many is no lock of ours.
PACKAGES_MAX = 4000

_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_VERSION = re.compile(r"[A-Za-z0-9.+:~-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class LockedPackage:
    """One .deb, by what it says of itself and by the sha256 of its bytes (64 hex digits)."""

    name: str
    architecture: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Lock:
    """The packages of one recipe, sorted; `wanted` is the digest of the request that led to them."""

    wanted: str
    packages: tuple[LockedPackage, ...]


def encode_lock(lock: Lock) -> str:
    """The one text for this lock."""
    lines = [f"{one.name} {one.architecture} {one.version} {one.sha256}" for one in sorted(lock.packages)]
    return "".join(f"{line}\n" for line in (f"for {lock.wanted}", *lines))


def parse_lock(text: str, recipe: str) -> Lock:
    """Reads the lock of `recipe` strictly. Raises InvalidSpecError `lock_invalid`."""
    first, *rest = text.splitlines() or [""]
    packages = [_parse_line(line, recipe) for line in rest]
    lock = Lock(first.removeprefix("for "), tuple(packages))
    if not _SHA256.fullmatch(lock.wanted) or len(packages) > PACKAGES_MAX or encode_lock(lock) != text:
        raise _invalid(recipe, "it was not written by this program")
    return lock


def describe_difference(lock: Lock, found: Iterable[tuple[str, str]], names_max: int = 5) -> str:
    """What tells a tree with the packages `found` (name, version) from the lock; empty when nothing does."""
    wanted, actual = {(one.name, one.version) for one in lock.packages}, set(found)
    missing, extra = sorted(wanted - actual), sorted(actual - wanted)
    parts = [
        f"{word} {', '.join('='.join(one) for one in names[:names_max])}"
        for word, names in (("without", missing), ("with", extra))
        if names
    ]
    return "; ".join(parts)


def _parse_line(line: str, recipe: str) -> LockedPackage:
    words = line.split(" ")
    if (
        len(words) != 4
        or not _NAME.fullmatch(words[0])
        or not _NAME.fullmatch(words[1])
        or not _VERSION.fullmatch(words[2])
        or not _SHA256.fullmatch(words[3])
    ):
        raise _invalid(recipe, f"{line[:80]!r} is no package")
    return LockedPackage(*words)


def _invalid(recipe: str, reason: str) -> InvalidSpecError:
    return InvalidSpecError("lock_invalid", f"the lock of {recipe} cannot be used: {reason}", refresh_step(recipe))


def refresh_step(recipe: str) -> str:
    """What to do about a lock that does not fit."""
    return f"python -m provisioning lock --recipe {recipe}, look at the difference, and commit it"
