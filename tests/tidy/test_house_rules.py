"""The rules of tests/conftest.py hold: a skip under CI fails, and so does a `root` test without root."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPING = '''"""Skips."""
import pytest

def test_skipped() -> None:
    """Never runs."""
    pytest.skip("no such device")
'''
SKIPPED_MODULE = '''"""Skips as a whole."""
import pytest

pytest.skip("no such program", allow_module_level=True)
'''
ROOT = '''"""Needs root, says its mark."""
import pytest

@pytest.mark.root
def test_root() -> None:
    """Runs as root only."""
'''


def run_pytest(project: Path, folder: Path, text: str, *, ci: bool) -> str:
    """What pytest says of a test file under the house's conftest and settings."""
    shutil.copy(project / "tests" / "conftest.py", folder)
    (folder / "test_one.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = root: needs root\n")
    env = {name: value for name, value in os.environ.items() if name != "CI"} | ({"CI": "true"} if ci else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_one.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("text", [SKIPPING, SKIPPED_MODULE])
def test_a_skip_under_ci_fails(project: Path, tmp_path: Path, text: str) -> None:
    """Nothing that CI calls green has silently not run."""
    said = run_pytest(project, tmp_path, text, ci=True)
    assert "skipped under CI, where everything must run: no such" in said
    assert "1 error" in said or "1 failed" in said


@pytest.mark.parametrize("text", [SKIPPING, SKIPPED_MODULE])
def test_a_skip_elsewhere_is_a_skip(project: Path, tmp_path: Path, text: str) -> None:
    """On a developer's machine a test may be skipped."""
    assert "1 skipped" in run_pytest(project, tmp_path, text, ci=False)


def test_a_root_test_says_what_it_needs(project: Path, tmp_path: Path) -> None:
    """Whoever runs it without root reads how to run it, or it runs."""
    said = run_pytest(project, tmp_path, ROOT, ci=False)
    assert "1 passed" in said if os.geteuid() == 0 else "./dev test" in said
