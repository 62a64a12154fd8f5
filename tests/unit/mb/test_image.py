"""`mb image`: the store's own program does the work, and its output and end are mb's."""

import json
import subprocess
import sys
from pathlib import Path


def _mb(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mb", "image", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_listing_is_passed_on(tmp_path: Path) -> None:
    """An empty store is an empty list, for programs too."""
    done = _mb("ls", "--json", "--images", str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_an_error_is_passed_on_with_its_code(tmp_path: Path) -> None:
    """Code, message and next step arrive as of any other verb; a name that looks like an option stays a name."""
    done = _mb("rm", "--json", "--images", str(tmp_path), "--", "--force")
    assert (done.returncode, json.loads(done.stderr)["error"]["code"]) == (1, "image_not_found")


def test_a_wrong_argument_is_told_apart(tmp_path: Path) -> None:
    """Exit code 2 is for what the caller wrote wrongly, as everywhere in mb."""
    done = _mb("gc", "--json", "--keep-used-within", "soon", "--images", str(tmp_path))
    assert (done.returncode, json.loads(done.stderr)["error"]["field"]) == (2, "--keep-used-within")
