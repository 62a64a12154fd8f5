"""`.bedplateignore`: which paths of a folder stay behind. A small part of .gitignore, and an error for the rest of it.

One pattern a line; blank lines and lines that begin with `#` say nothing; spaces at the end are cut. `*` stands for any
characters but `/`, `?` for one of them, `**` as a whole part for any number of folders; all else stands for itself. A pattern
with `/` before its end is matched from the top of the folder, any other against the name at every depth. A `/` at the end means
folders only. What lies in an ignored folder is ignored too. `!` is an error: there is no taking back.
"""

import re
from collections.abc import Callable
from pathlib import Path

from fleet.errors import InvalidSpecError

IGNORE_FILE = ".bedplateignore"
# Each path is matched against every pattern.
PATTERNS_MAX = 500
FILE_BYTES_MAX = 256 * 1024

Ignored = Callable[[str, bool], bool]


def load_ignored(folder: Path) -> Ignored:
    """The question whether a path below `folder` (with `/`, and whether it is a folder) stays behind."""
    path = folder / IGNORE_FILE
    if not path.is_file():
        return lambda _path, _is_folder: False
    with path.open("rb") as stream:
        content = stream.read(FILE_BYTES_MAX)
    return parse_ignored(content.decode("utf-8", "replace"), str(path))


def parse_ignored(text: str, origin: str) -> Ignored:
    """The same question, from the file's text; raises InvalidSpecError `ignore_invalid` that names the line."""
    patterns = []
    for number, line in enumerate(text.splitlines(), start=1):
        pattern = line.rstrip()
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("!"):
            message = f"{origin}, line {number}: patterns cannot be taken back with !"
            raise InvalidSpecError("ignore_invalid", message, "list only what stays behind")
        patterns.append((re.compile(_translate(pattern.rstrip("/"))), pattern.endswith("/")))
    if len(patterns) > PATTERNS_MAX:
        message = f"{origin}: {len(patterns)} patterns are more than {PATTERNS_MAX}"
        raise InvalidSpecError("ignore_invalid", message, "ignore whole folders instead")

    def is_ignored(path: str, is_folder: bool) -> bool:
        return any(
            regex.fullmatch(path) is not None and (is_folder or not folders_only) for regex, folders_only in patterns
        )

    return is_ignored


def _translate(pattern: str) -> str:
    parts = pattern.lstrip("/").split("/")
    start = "" if "/" in pattern else "(?:.*/)?"
    pieces = ["(?:.*/)?" if part == "**" else _translate_part(part) + "/" for part in parts[:-1]]
    last = ".*" if parts[-1] == "**" else _translate_part(parts[-1])
    return "(?s:" + start + "".join(pieces) + last + ")"


def _translate_part(part: str) -> str:
    wild = {"*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(char, re.escape(char)) for char in re.sub(r"\*+", "*", part))
