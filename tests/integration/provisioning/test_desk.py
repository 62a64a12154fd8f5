"""A fleet to play with comes and goes with the program in front of it."""

import os
from pathlib import Path

import pytest

from provisioning.build import ensure_image
from provisioning.embedded.desk import run_desk
from provisioning.recipe import load_recipe

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(600)]

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))


def test_a_program_has_a_fleet_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """`mb` is there and configured, as tenant and as operator; the program's exit code is told, and nothing is left."""
    assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test starts a fleet: run it in private namespaces"
    ensure_image(load_recipe("base"), CACHE / "images", CACHE, print)
    assert run_desk(CACHE / "images", ["sh", "-c", "mb ls; mb --config $OPERATOR host ls; exit 7"]) == 7
    shown = capfd.readouterr()
    assert "no sandboxes" in shown.out
    assert "local  alive" in shown.out
    assert "nothing left behind" in shown.err
