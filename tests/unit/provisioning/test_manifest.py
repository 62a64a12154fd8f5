"""The manifest: one byte string for one image, and no other is accepted."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fleet.errors import InvalidSpecError
from provisioning.manifest import (
    FILE_ROLES,
    MANIFEST_MAX_BYTES,
    ImageFile,
    Manifest,
    decode_manifest,
    encode_manifest,
    image_digest,
)

MANIFEST = Manifest(
    name="base",
    architecture="x86_64",
    link_version=2,
    cmdline="console=ttyS0 quiet",
    files={role: ImageFile(f"{role}.img", "sha256:" + "ab" * 32, 7) for role in FILE_ROLES},
    packages=(("git", "1:2.47.3"), ("python3", "3.13.5")),
)


def test_a_manifest_survives_the_round_trip() -> None:
    """What is written is what is read, and writing it again gives the same bytes and so the same name."""
    content = encode_manifest(MANIFEST)
    assert decode_manifest(content) == MANIFEST
    assert image_digest(encode_manifest(decode_manifest(content))) == image_digest(content)


def test_every_field_changes_the_name() -> None:
    """The digest covers the command line and the packages as well as the files."""
    changed = [
        MANIFEST,
        replace(MANIFEST, cmdline="console=ttyS0"),
        replace(MANIFEST, link_version=3),
        replace(MANIFEST, packages=MANIFEST.packages[:1]),
        replace(MANIFEST, files={**MANIFEST.files, "root": ImageFile("root.img", "sha256:" + "cd" * 32, 7)}),
    ]
    assert len({image_digest(encode_manifest(manifest)) for manifest in changed}) == len(changed)


def _edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    table = json.loads(encode_manifest(MANIFEST))
    edit(table)
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        encode_manifest(MANIFEST) + b" ",
        b" " * (MANIFEST_MAX_BYTES + 1),
        _edited(lambda table: table.update(version=2)),
        _edited(lambda table: table.update(extra=1)),
        _edited(lambda table: table.update(link_version="1")),
        _edited(lambda table: table["files"].pop("root")),
        _edited(lambda table: table["files"]["root"].update(path="../root.img")),
        _edited(lambda table: table["files"]["root"].update(path="/etc/passwd")),
        _edited(lambda table: table["files"]["root"].update(digest="sha256:AB")),
        _edited(lambda table: table["files"]["root"].update(size_bytes=-1)),
    ],
    ids=range(13),
)
def test_what_we_would_not_have_written_is_refused(content: bytes) -> None:
    """A manifest comes from a disk: sizes, paths, unknown fields and other spellings are refused, not repaired."""
    with pytest.raises(InvalidSpecError) as refused:
        decode_manifest(content)
    assert refused.value.code == "manifest_invalid"
