"""The packages of a lock as files: downloaded once, kept by content, and laid out as a repository that has nothing else.

<debs_dir>/<sha256>.deb       bytes that have this digest; a file that has not is thrown away and fetched again
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from fleet.errors import NotFoundError, UnavailableError
from provisioning.command import run_command
from provisioning.lock import Lock, LockedPackage, encode_lock, parse_lock, refresh_step
from provisioning.packagesource import PackageSource, open_source
from provisioning.recipe import RECIPES_DIR, Recipe, request_digest

FETCH_PREFIX = ".fetch-"
STEP_TIMEOUT_S = 60.0
# How many packages one error names.
NAMES_MAX = 5


def lock_path(recipe: Recipe, recipes_dir: Path = RECIPES_DIR) -> Path:
    """Where the lock of a recipe is committed."""
    return recipes_dir / f"{recipe.name}.lock"


def load_lock(recipe: Recipe, recipes_dir: Path = RECIPES_DIR) -> Lock:
    """The committed lock of a recipe. Raises NotFoundError without one, UnavailableError when it is for other packages."""
    try:
        lock = parse_lock(lock_path(recipe, recipes_dir).read_text(), recipe.name)
    except FileNotFoundError as error:
        message = f"the recipe {recipe.name} has no lock"
        raise NotFoundError("lock_not_found", message, refresh_step(recipe.name)) from error
    if lock.wanted != request_digest(recipe.rootfs):
        message = f"the packages of the recipe {recipe.name} have changed since its lock was made"
        raise UnavailableError("lock_stale", message, refresh_step(recipe.name))
    return lock


def write_lock(recipe: Recipe, progress: Callable[[str], None]) -> tuple[Path, bool]:
    """Locks a recipe to what the machine's package sources offer now: the lock's path, and whether it changed."""
    rootfs = recipe.rootfs
    progress(f"what {rootfs.suite} offers")
    with open_source(rootfs.suite, rootfs.architecture) as source:
        chosen = source.resolve((*rootfs.packages, *rootfs.build_only))
        offered = {(one.name, one.architecture, one.version): one for one in source.offered(one[0] for one in chosen)}
        lock = Lock(request_digest(rootfs), tuple(offered[one] for one in chosen))
    path, text = lock_path(recipe), encode_lock(lock)
    is_new = not path.exists() or path.read_text() != text
    if is_new:
        path.write_text(text)
    return path, is_new


def ensure_debs(recipe: Recipe, lock: Lock, debs_dir: Path, progress: Callable[[str], None]) -> None:
    """Every package of the lock in `debs_dir`, each with the digest the lock says; asks the sources only for what is missing.

    Raises NotFoundError `package_gone` for versions that are no longer offered, UnavailableError for other bytes.
    """
    debs_dir.mkdir(parents=True, exist_ok=True)
    missing = [one for one in lock.packages if not _is_kept(debs_dir, one)]
    if not missing:
        return
    progress(f"download {len(missing)} packages")
    with open_source(recipe.rootfs.suite, recipe.rootfs.architecture) as source:
        offered = source.offered(one.name for one in missing)
        _check_offered(recipe, missing, offered)
        _fetch(source, missing, debs_dir)


@contextmanager
def local_repository(lock: Lock, debs_dir: Path, folder: Path, suite: str) -> Iterator[str]:
    """A sources.list line for a repository of exactly the lock's packages, in a new folder below `folder`."""
    with tempfile.TemporaryDirectory(prefix=FETCH_PREFIX, dir=folder) as name:
        repository = Path(name)
        repository.chmod(0o755)
        index = "\n".join(_index_entry(debs_dir, one, repository) for one in lock.packages)
        (repository / "Packages").write_text(index)
        digest, size = hashlib.sha256(index.encode()).hexdigest(), len(index.encode())
        release = f"Suite: {suite}\nCodename: {suite}\nSHA256:\n {digest} {size} Packages\n"
        (repository / "Release").write_text(release)
        yield f"deb [trusted=yes] copy://{quote(str(repository))} ./"


def _index_entry(debs_dir: Path, package: LockedPackage, repository: Path) -> str:
    deb = debs_dir / f"{package.sha256}.deb"
    fields = run_command(["dpkg-deb", "--field", str(deb)], timeout_s=STEP_TIMEOUT_S)
    (repository / deb.name).symlink_to(deb.absolute())
    return f"{fields}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {package.sha256}\n"


def _is_kept(debs_dir: Path, package: LockedPackage) -> bool:
    path = debs_dir / f"{package.sha256}.deb"
    if path.is_file() and _digest(path) == package.sha256:
        return True
    path.unlink(missing_ok=True)
    return False


def _check_offered(recipe: Recipe, missing: Iterable[LockedPackage], offered: set[LockedPackage]) -> None:
    places = {(one.name, one.architecture, one.version) for one in offered}
    gone = [one for one in missing if (one.name, one.architecture, one.version) not in places]
    if not gone:
        return
    now: dict[str, list[str]] = {}
    for one in sorted(offered):
        now.setdefault(one.name, []).append(one.version)
    named = [f"{one.name} {one.version} (now {', '.join(now.get(one.name, ['gone']))})" for one in gone[:NAMES_MAX]]
    more = f" and {len(gone) - NAMES_MAX} more" if len(gone) > NAMES_MAX else ""
    message = f"the package sources no longer offer what {recipe.name} is locked to: {', '.join(named)}{more}"
    raise NotFoundError("package_gone", message, refresh_step(recipe.name))


def _fetch(source: PackageSource, missing: list[LockedPackage], debs_dir: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=FETCH_PREFIX, dir=debs_dir) as name:
        source.fetch(missing, Path(name))
        fetched = {_digest(path): path for path in Path(name).glob("*.deb")}
        for one in missing:
            if one.sha256 not in fetched:
                message = f"{one.name} {one.version} came with another content than {one.sha256}"
                step = "do not use it before you know why: the lock and the package sources disagree about one version"
                raise UnavailableError("package_altered", message, step)
            fetched[one.sha256].replace(debs_dir / f"{one.sha256}.deb")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
