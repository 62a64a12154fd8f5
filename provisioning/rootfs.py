"""Makes an image's tree: Debian packages by mmdebstrap (cached by recipe), then everything that makes it ours."""

import shutil
from collections.abc import Callable
from pathlib import Path

from fleet.errors import HostFaultError
from provisioning.command import run_command
from provisioning.lock import encode_lock
from provisioning.modules import load_order, read_modules
from provisioning.packages import ensure_debs, load_lock, local_repository
from provisioning.recipe import Recipe, RootfsRecipe, User, rootfs_key

# A slow mirror and a slow disk together; an ordinary build takes under two minutes.
BOOTSTRAP_TIMEOUT_S = 1800.0
STEP_TIMEOUT_S = 300.0
GUEST_DIR = Path(__file__).parent / "guest"
# Only what runs as root reads it; agents see it as everybody does.
BEDPLATE_DIR = "usr/lib/bedplate"


def _quietly(step: str) -> None:
    """Progress for nobody."""


def ensure_rootfs_tar(recipe: Recipe, cache_dir: Path, progress: Callable[[str], None] = _quietly) -> Path:
    """The tree of exactly the locked packages as a tar, from the cache or made now; making it needs root (mmdebstrap).

    Packages that are not in the cache come from the machine's package sources.
    """
    lock = load_lock(recipe)
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / f"rootfs-{rootfs_key(recipe, encode_lock(lock))[:16]}.tar"
    if target.exists():
        return target
    debs_dir = cache_dir / "debs"
    ensure_debs(recipe, lock, debs_dir, progress)
    progress(f"install {len(lock.packages)} packages")
    temporary = target.with_suffix(".part.tar")
    with local_repository(lock, debs_dir, cache_dir, recipe.rootfs.suite) as line:
        run_command(
            _bootstrap_command(recipe.rootfs, str(temporary), line),
            timeout_s=BOOTSTRAP_TIMEOUT_S,
            env={"SOURCE_DATE_EPOCH": str(recipe.epoch_s)},
        )
    temporary.replace(target)
    return target


def _bootstrap_command(rootfs: RootfsRecipe, target: str, repository: str) -> list[str]:
    return [
        "mmdebstrap",
        "--mode=root",
        "--quiet",
        f"--variant={rootfs.variant}",
        f"--architectures={rootfs.architecture}",
        f"--include={','.join((*rootfs.packages, *rootfs.build_only))}",
        # apt's own user could not read a repository below a private folder.
        '--aptopt=APT::Sandbox::User "root"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in rootfs.path_exclude),
        rootfs.suite,
        target,
        repository,
    ]


def unpack_rootfs(tar: Path, root: Path) -> None:
    """Unpacks the package tree into the empty folder `root`, owners and modes kept."""
    arguments = [
        "tar",
        "--extract",
        "--numeric-owner",
        "--preserve-permissions",
        f"--file={tar}",
        f"--directory={root}",
    ]
    run_command(arguments, timeout_s=STEP_TIMEOUT_S)


def list_packages(root: Path) -> tuple[tuple[str, str], ...]:
    """The installed packages with their versions, by name."""
    arguments = ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show", "--showformat=${Package} ${Version}\n"]
    lines = run_command(arguments, timeout_s=STEP_TIMEOUT_S).splitlines()
    return tuple(sorted((name, version) for name, _, version in (line.partition(" ") for line in lines)))


def purge_packages(root: Path, names: tuple[str, ...]) -> None:
    """Takes packages out of the tree again, and what only they needed."""
    # Triggers of packages that stay run too, and some read /proc.
    inside = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        f"--mount-proc={root / 'proc'}",
        "chroot",
        str(root),
    ]
    options = ["--yes", "--quiet", "--auto-remove", "-oAPT::Sandbox::User=root", "-oDPkg::Use-Pty=0"]
    run_command([*inside, "apt-get", "purge", *options, *names], timeout_s=STEP_TIMEOUT_S)


def customise_root(root: Path, recipe: Recipe, guestd: bytes) -> None:
    """Turns the package tree into the image's root; afterwards nothing in it depends on when or where it was built."""
    for user in recipe.users:
        _add_user(root, user)
    for group, members in recipe.groups:
        for member in members:
            _join(root, group, member)
    for unit in recipe.mask_units:
        _mask(root / "etc/systemd/system" / unit)
    for generator in recipe.mask_generators:
        _mask(root / "etc/systemd/system-generators" / generator)
    _keep_modules(root, recipe)
    for pattern in recipe.remove:
        for found in sorted(root.glob(pattern)):
            _remove(found)
    for path, text in recipe.files:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(target)
        target.write_text(text)
        target.chmod(0o644)
    _install_guest(root, guestd, recipe)


def compile_python(root: Path) -> None:
    """Compiles the standard library so that its time stamps do not matter (PEP 552): an emulated CPU compiles slowly."""
    program = ["chroot", str(root), "/usr/bin/python3", "-I", "-m", "compileall", "-q", "-f"]
    mode = ["--invalidation-mode", "unchecked-hash", "-x", "/(test|tests|idlelib|lib2to3|turtledemo)/"]
    run_command([*program, *mode, "/usr/lib/python3", *_stdlib(root)], timeout_s=STEP_TIMEOUT_S)


def _stdlib(root: Path) -> list[str]:
    return [f"/usr/lib/{path.name}" for path in sorted((root / "usr/lib").glob("python3.*"))]


def _install_guest(root: Path, guestd: bytes, recipe: Recipe) -> None:
    folder = root / BEDPLATE_DIR
    folder.mkdir(mode=0o755, parents=True)
    (folder / "guestd.pyz").write_bytes(guestd)
    (folder / "guestd.pyz").chmod(0o644)
    lines = [f"{key.replace('.', '/')} {value}\n" for key, value in recipe.sysctls]
    (folder / "sysctl").write_text("".join(lines))
    (folder / "sysctl").chmod(0o644)
    for name in ("init", "guestd-loop"):
        shutil.copyfile(GUEST_DIR / name, folder / name)
        (folder / name).chmod(0o755)


def _add_user(root: Path, user: User) -> None:
    line = f"{user.name}:x:{user.uid}:{user.uid}::/home/{user.name}:/bin/bash\n"
    _append(root / "etc/passwd", line)
    _append(root / "etc/group", f"{user.name}:x:{user.uid}:\n")
    _append(root / "etc/gshadow", f"{user.name}:!::\n")
    # "!" is a password that nothing matches; the day of change is fixed, or the image would differ from day to day.
    _append(root / "etc/shadow", f"{user.name}:!:20000:0:99999:7:::\n")
    home = root / "home" / user.name
    shutil.copytree(root / "etc/skel", home)
    for path in (home, *home.rglob("*")):
        shutil.chown(path, user.uid, user.uid)
    home.chmod(0o750)


def _join(root: Path, group: str, member: str) -> None:
    for path in (root / "etc/group", root / "etc/gshadow"):
        lines = path.read_text().splitlines()
        found = [number for number, line in enumerate(lines) if line.startswith(f"{group}:")]
        if len(found) != 1:
            raise HostFaultError("group_not_found", f"{path} has no group {group} for {member}")
        line = lines[found[0]]
        lines[found[0]] = f"{line}{'' if line.endswith(':') else ','}{member}"
        path.write_text("".join(f"{one}\n" for one in lines))


def _append(path: Path, line: str) -> None:
    with path.open("a") as stream:
        stream.write(line)


def _mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/null")


def _keep_modules(root: Path, recipe: Recipe) -> None:
    """Leaves only the modules the running guest may load: the rest is weight."""
    modules = read_modules(root)
    kept = set(load_order(modules, recipe.modules))
    for path in sorted((modules.folder / "kernel").rglob("*.ko*")):
        if str(path.relative_to(modules.folder)) not in kept:
            path.unlink()
    run_command(["chroot", str(root), "depmod", modules.release], timeout_s=STEP_TIMEOUT_S)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        raise HostFaultError("rootfs_unexpected", f"{path} is no file, folder or symlink")
