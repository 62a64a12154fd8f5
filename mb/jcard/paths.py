"""Paths and files that a jcard names: relative to it, bounded, never an exception."""

from pathlib import Path

from mb.jcard.table import Table

# A jcard is a page, and admission bounds what it becomes. This only stops a wrong file from being read whole.
FILE_BYTES_MAX = 1024 * 1024


def to_path(text: str, folder: Path) -> Path:
    """The path that `text` means in a jcard in `folder`."""
    try:
        return folder / Path(text).expanduser()
    except RuntimeError:  # no such user's home
        return folder / text


def read_text(table: Table, key: str, path: Path) -> str:
    """The text in the file at `path`, which `key` named; a fault and nothing when it cannot be had."""
    try:
        with path.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
        if len(content) <= FILE_BYTES_MAX:
            return content.decode("utf-8")
        table.fault(key, f"{path} is larger than 1 MiB", "put long texts in a file of the source")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        table.fault(key, f"{path}: {reason}", "name a readable text file", "file_unreadable")
    return ""
