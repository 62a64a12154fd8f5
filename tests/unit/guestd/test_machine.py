"""This guest as a machine, as far as it is files."""

import os
from pathlib import Path

from guestd.machine import ensure_text


def test_what_is_right_is_not_written_again(tmp_path: Path) -> None:
    """A disk that agents have filled takes no write, and a guestd that starts again asks it for none. What is wrong is replaced."""
    path = tmp_path / "hostname"
    ensure_text(str(path), "box\n")
    os.utime(path, (1, 1))
    ensure_text(str(path), "box\n")
    assert (path.read_text(), path.stat().st_mtime) == ("box\n", 1)
    path.write_bytes(b"\xff and more")
    ensure_text(str(path), "box\n")
    assert path.read_text() == "box\n"
