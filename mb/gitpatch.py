"""Changes of files that are no text, in git's binary form. PURE. Source: git's diff.c, `emit_binary_diff_body`."""

import base64
import hashlib
import zlib
from collections.abc import Iterator

# Bytes of one encoded line; its first letter says how many: A-Z are 1 to 26, a-z 27 to 52.
LINE_BYTES = 52
NO_BLOB = "0" * 40


def render_index(old: bytes | None, new: bytes | None, mode: str) -> str:
    """The line that names both contents, which git demands of a binary patch; `mode` when it stays as it was."""
    return f"index {_blob(old)}..{_blob(new)}" + (f" {mode}" if mode else "")


def render_binary(new: bytes | None) -> Iterator[str]:
    """The new content, whole; there is no way back from it."""
    content = new or b""
    yield "GIT binary patch"
    yield f"literal {len(content)}"
    packed = zlib.compress(content)
    for start in range(0, len(packed), LINE_BYTES):
        piece = packed[start : start + LINE_BYTES]
        length = chr(ord("A") + len(piece) - 1) if len(piece) <= 26 else chr(ord("a") + len(piece) - 27)
        yield length + base64.b85encode(piece, pad=True).decode("ascii")
    yield ""


def _blob(content: bytes | None) -> str:
    if content is None:
        return NO_BLOB
    # git names contents so; nothing is trusted for it.
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
