"""Sources are mounted where their owner said, and nowhere that an agent of an earlier run would like."""

import os
from pathlib import Path

import pytest

from guestd import AGENT_ID
from guestd.configuration import Source
from guestd.fault import GuestFault
from guestd.workspace import ensure_sources


def test_an_agents_symlink_moves_no_source(tmp_path: Path) -> None:
    """An agent that put a symlink in its home before a stop does not find its own files mounted over the system's."""
    home, system = tmp_path / "home", tmp_path / "system"
    home.mkdir()
    system.mkdir()
    (home / "work").symlink_to(system)
    if os.geteuid() == 0:
        os.lchown(home / "work", AGENT_ID, AGENT_ID)
    source = Source({"serial": "source-0", "guest_path": f"{home}/work/etc", "readonly": False})
    with pytest.raises(GuestFault) as caught:
        ensure_sources([source], str(tmp_path / "sources"))
    assert "symlink" in caught.value.message
    assert list(system.iterdir()) == []
