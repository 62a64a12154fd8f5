"""`build` and `lock`: images out of recipes, and what recipes are locked to."""

import argparse
import json
import sys
import time
from collections.abc import Callable

from provisioning.build import ensure_image
from provisioning.packages import write_lock
from provisioning.recipe import list_recipes, load_recipe


def build(options: argparse.Namespace) -> int:
    """The image of a recipe, built or found up to date."""
    started = time.monotonic()
    digest, is_new = ensure_image(load_recipe(options.recipe), options.images, options.cache, show_progress())
    duration_s = time.monotonic() - started
    if options.json:
        print(json.dumps({"digest": digest, "built": is_new, "duration_s": round(duration_s, 3)}))
    else:
        print(f"{options.recipe}:latest {digest} {'built' if is_new else 'up to date'} in {duration_s:.1f} s")
    return 0


def lock(options: argparse.Namespace) -> int:
    """Locks recipes to what the machine's package sources offer now."""
    written = []
    for name in options.recipe or list_recipes():
        path, is_new = write_lock(load_recipe(name), show_progress())
        written.append({"recipe": name, "path": str(path), "changed": is_new})
        if not options.json:
            print(f"{path} {'changed: look at it and commit it' if is_new else 'is as it was'}")
    if options.json:
        print(json.dumps(written))
    return 0


def show_progress() -> Callable[[str], None]:
    """Writes each step to stderr with the seconds since now."""
    started = time.monotonic()

    def progress(step: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {step}", file=sys.stderr, flush=True)

    return progress
