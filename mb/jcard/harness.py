"""Harnesses: how a prompt becomes a command of a known agent program. Each is a data file, mb/harnesses/NAME.toml.

A file says the program, its arguments with a prompt and, in a session, without one (`{prompt}` stands for it), its environment, the
variables it takes a key from (documented as secrets), the destinations it needs and the images that have it.
"""

import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fleet.model.sandbox import NetworkMode

PROMPT = "{prompt}"
# Where a guest keeps secrets (docs/guest-link.md).
SECRETS_FOLDER = "/run/secrets"


@dataclass(frozen=True, slots=True)
class Harness:
    """One agent program; `keys` are variables it takes a credential from, any one of them is enough."""

    name: str
    program: str
    arguments: tuple[str, ...]
    interactive: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    keys: tuple[str, ...]
    destinations: tuple[str, ...]
    images: tuple[str, ...]

    def command(self, prompt: str, secrets: Collection[str]) -> tuple[str, ...]:
        """What an agent runs: with `prompt` to its end or, when it is empty, interactively.

        A key among `secrets` reaches the program's environment out of the guest's tmpfs, and no core dump.
        """
        chosen = self.arguments if prompt else self.interactive
        words = (self.program, *(word.replace(PROMPT, prompt) for word in chosen))
        keys = [key for key in self.keys if key in secrets]
        if not keys:
            return words
        reads = "".join(f"{key}=$(cat {SECRETS_FOLDER}/{key}) && export {key} || exit 126; " for key in keys)
        return ("/bin/sh", "-c", f'ulimit -c 0; {reads}exec "$0" "$@"', *words)

    def notes(self, image: str, mode: NetworkMode, known: Collection[str]) -> tuple[str, ...]:
        """What stands in this harness's way, given the image, the network and the names of secrets and variables."""
        found = []
        if image not in self.images:
            missing = f"no image that is known to have program {self.program}"
            found.append(f"harness {self.name}: {image} is {missing}; the agent fails where it is not found")
        if mode in (NetworkMode.CLOSED, NetworkMode.NONE):
            needed = ", ".join(self.destinations)
            found.append(f"harness {self.name}: it needs {needed}, and under mode {mode} nothing leaves the sandbox")
        if not any(key in known for key in self.keys):
            wanted = " or ".join(self.keys)
            found.append(f"harness {self.name}: it has no key; write {wanted} under [secrets]")
        return tuple(found)


@cache
def load_harness(name: str) -> Harness:
    """The harness of that name; `custom` has no file."""
    values = tomllib.loads((files("mb") / "harnesses" / f"{name}.toml").read_text(encoding="utf-8"))
    return Harness(
        name=name,
        program=values["program"],
        arguments=tuple(values["arguments"]),
        interactive=tuple(values["interactive"]),
        env=tuple(values["env"].items()),
        keys=tuple(values["keys"]),
        destinations=tuple(values["destinations"]),
        images=tuple(values["images"]),
    )
