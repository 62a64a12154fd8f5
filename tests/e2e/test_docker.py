"""Docker inside a sandbox, as its users meet it: the image `docker`, an agent, and docker compose."""

import os
import shutil
from pathlib import Path

import pytest

from provisioning.build import ensure_image
from provisioning.embedded.fleet import EmbeddedFleet
from provisioning.imagestore import image_path, write_tag
from provisioning.recipe import load_recipe
from tests.e2e.operate import Tenant, wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(1200)]

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
# No network: the container's image is made of the guest's own shell. dockerd starts after the agent, which asks for it.
AGENT = """
set -eu
tries=0
until docker version >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 200 ] || { docker version; exit 1; }
    sleep 1
done
mkdir -p /tmp/tiny/bin /tmp/tiny/lib64 /tmp/tiny/lib/x86_64-linux-gnu
cp /usr/bin/dash /tmp/tiny/bin/sh
cp -L /lib64/ld-linux-x86-64.so.2 /tmp/tiny/lib64/
cp -L /lib/x86_64-linux-gnu/libc.so.6 /tmp/tiny/lib/x86_64-linux-gnu/
tar -C /tmp/tiny -c . | docker import - tiny:1
docker compose up --no-color --abort-on-container-exit
docker info --format 'driver {{.Driver}} below {{.DockerRootDir}}'
"""
COMPOSE = """
services:
  hello:
    image: tiny:1
    command: ["/bin/sh", "-c", "echo this is process $$$$ of a container"]
"""


@pytest.fixture
def docker_image(fleet: EmbeddedFleet, tenant: Tenant) -> str:
    """The image `docker` on the fleet's host, offered by it."""
    digest = ensure_image(load_recipe("docker"), CACHE / "images", CACHE, print)[0]
    images_dir = fleet.folder.parent / "images"
    shutil.copytree(image_path(CACHE / "images", digest), image_path(images_dir, digest))
    write_tag(images_dir, "docker:latest", digest)
    operator = Tenant(fleet, tenant.folder, fleet.operator_config)
    wait_until(
        lambda: operator.run("host", "ls", "--json").json(),
        lambda hosts: any(image["name"] == "docker:latest" for host in hosts for image in host["record"]["images"]),
    )
    return "docker:latest"


def test_compose_brings_a_container_up(tenant: Tenant, docker_image: str) -> None:
    """An unprivileged agent runs docker compose in its VM, without a network, and reads its container's output."""
    folder = tenant.write_project(
        "composed",
        ["bash", "agent.sh"],
        {"agent.sh": AGENT, "compose.yaml": COMPOSE},
        mixtape=docker_image,
        cpus="2",
        memory="1536MiB",
        disk="2GiB",
    )
    done = tenant.run("up", str(folder), "--rm")
    assert done.code == 0, done
    assert "| this is process 1 of a container\n" in done.out
    assert done.out.endswith("driver overlay2 below /run/bedplate/scratch/docker\n")
