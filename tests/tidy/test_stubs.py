"""bedplate/ is what proto/ says, with the generators that are pinned."""

import subprocess
from pathlib import Path


def contents(folder: Path) -> dict[Path, str]:
    return {
        path.relative_to(folder): path.read_text()
        for path in folder.rglob("*.py*")
        if path.parent.name != "__pycache__"
    }


def test_the_stubs_are_fresh(project: Path, tmp_path: Path) -> None:
    """Generating the stubs again changes nothing; `./dev proto` mends it when this fails."""
    subprocess.run([project / "dev", "proto", tmp_path], check=True)
    assert contents(tmp_path / "bedplate") == contents(project / "bedplate")
