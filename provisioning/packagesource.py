"""The machine's own Debian package sources, asked for another release: what they offer and the files themselves.

apt works in a folder of its own and trusts Debian's archive keys only; nothing of the machine's package state is read or changed.
"""

import platform
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import HostFaultError, UnavailableError
from provisioning.command import run_command
from provisioning.lock import LockedPackage

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# 10 MB of indexes, or 200 MB of packages, from a slow mirror.
FETCH_TIMEOUT_S = 900.0
STEP_TIMEOUT_S = 120.0

# Where the machine's sources may name a release instead of its codename.
_ALIASES = ("stable", "oldstable", "testing")
_INSTALLED = re.compile(r"Inst (\S+) (?:\[\S+\] )?\((\S+) .*\[(\S+)\]")


@dataclass(frozen=True, slots=True)
class PackageSource:
    """An apt that knows one release only; lives as long as its folder."""

    folder: Path

    def resolve(self, packages: Iterable[str]) -> list[tuple[str, str, str]]:
        """Name, architecture and version of everything a minimal system with `packages` consists of."""
        wanted = ["?essential", "?priority(required)", "apt", *packages]
        said = self._run(["apt-get", "install", "--simulate", *wanted], STEP_TIMEOUT_S)
        found = [_INSTALLED.match(line) for line in said.splitlines() if line.startswith("Inst ")]
        if not found or None in found:
            raise HostFaultError("packages_unresolved", f"apt answered in another form than expected: {said[-500:]}")
        return sorted((one[1].partition(":")[0], one[3], one[2]) for one in found if one)

    def offered(self, names: Iterable[str]) -> set[LockedPackage]:
        """Every version on offer of the packages `names`; unknown names are left out."""
        # apt-cache shows nothing at all when one name of many is unknown, so the indexes are read.
        wanted = {f"Package: {name}" for name in names}
        found = set()
        for index in (self.folder / "lists").glob("*_Packages"):
            stanzas = index.read_text().split("\n\n")
            found |= {_parse_stanza(stanza) for stanza in stanzas if stanza.partition("\n")[0] in wanted}
        return {one for one in found if one}

    def fetch(self, packages: Iterable[LockedPackage], target: Path) -> None:
        """Downloads packages into the folder `target`; apt checks each against the signed index."""
        names = [f"{one.name}:{one.architecture}={one.version}" for one in packages]
        self._run(["apt-get", "download", "--quiet", *names], FETCH_TIMEOUT_S, cwd=target)

    def update(self) -> None:
        """Reads what is on offer now."""
        self._run(["apt-get", "update", "--quiet", "--error-on=any"], FETCH_TIMEOUT_S)

    def _run(self, arguments: list[str], timeout_s: float, cwd: Path | None = None) -> str:
        try:
            return run_command(arguments, timeout_s=timeout_s, cwd=cwd, env={"APT_CONFIG": str(self.folder / "conf")})
        except HostFaultError as error:
            step = "see that apt-get update works on this machine"
            raise UnavailableError("package_source_failed", error.message, step) from error


@contextmanager
def open_source(suite: str, architecture: str) -> Iterator[PackageSource]:
    """The machine's package sources, asked for `suite`; raises UnavailableError when it has none or cannot reach them."""
    with tempfile.TemporaryDirectory(prefix="bedplate-apt-") as name:
        folder = Path(name)
        for path in ("lists/partial", "archives/partial"):
            (folder / path).mkdir(parents=True)
        (folder / "status").touch()
        (folder / "sources").write_text("".join(f"{line}\n" for line in _sources(suite)))
        (folder / "conf").write_text(_configuration(folder, architecture))
        source = PackageSource(folder)
        source.update()
        yield source


def parse_targets(text: str, codename: str, suite: str) -> list[str]:
    """The lines of a sources.list for `suite` out of `apt-get indextargets` of a machine that runs `codename`.

    `text` has lines of repository, release and component. Others than Debian's own main component are left out.
    """
    lines = []
    for line in text.splitlines():
        repository, release, component = (*line.split(), "", "", "")[:3]
        base, dash, pocket = release.partition("-")
        is_debian = base in (codename, *_ALIASES) and pocket in ("", "updates", "security")
        if is_debian and component == "main":
            lines.append(f"deb [signed-by={KEYRING}] {repository} {suite}{dash}{pocket} main")
    return sorted(set(lines))


def _sources(suite: str) -> list[str]:
    shape = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    text = run_command(["apt-get", "indextargets", "--format", shape, "Created-By: Packages"], timeout_s=STEP_TIMEOUT_S)
    lines = parse_targets(text, platform.freedesktop_os_release().get("VERSION_CODENAME", ""), suite)
    if not lines:
        message = "this machine's apt sources name no Debian repository"
        raise UnavailableError(
            "package_source_unknown", message, "add Debian's main component to /etc/apt/sources.list"
        )
    return lines


def _configuration(folder: Path, architecture: str) -> str:
    options = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::GzipIndexes": "false",
        "Acquire::Languages": "none",
        "Dir::Cache": str(folder),
        "Dir::Cache::archives": str(folder / "archives"),
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::sourcelist": str(folder / "sources"),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": str(folder),
        "Dir::State::lists": str(folder / "lists"),
        "Dir::State::status": str(folder / "status"),
    }
    # What the machine says of proxies and of the age of indexes holds here too.
    kept = run_command(["apt-config", "dump", "Acquire"], timeout_s=STEP_TIMEOUT_S)
    lines = [line for line in kept.splitlines() if not line.startswith(("Acquire::IndexTargets", "Acquire::Languages"))]
    return "\n".join([*lines, *(f'{name} "{value}";' for name, value in options.items())]) + "\n"


def _parse_stanza(stanza: str) -> LockedPackage | None:
    fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line.startswith(" "))
    names = ("Package", "Architecture", "Version", "SHA256")
    return LockedPackage(*(fields[name] for name in names)) if all(name in fields for name in names) else None
