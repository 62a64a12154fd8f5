"""Makes an image's tree: Debian packages by mmdebstrap (cached by recipe), then everything that makes it ours."""

import shutil
from pathlib import Path

from fleet.errors import HostFaultError
from provisioning.command import run_command
from provisioning.modules import load_order, read_modules
from provisioning.recipe import Recipe, User, rootfs_key

# A slow mirror and a slow disk together; an ordinary build takes under two minutes.
BOOTSTRAP_TIMEOUT_S = 1800.0
STEP_TIMEOUT_S = 300.0
GUEST_DIR = Path(__file__).parent / "guest"
# Only what runs as root reads it; agents see it as everybody does.
BEDPLATE_DIR = "usr/lib/bedplate"


def ensure_rootfs_tar(recipe: Recipe, cache_dir: Path) -> Path:
    """The package tree as a tar, from the cache or made now; needs root (mmdebstrap) and the machine's package sources."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / f"rootfs-{rootfs_key(recipe.rootfs, recipe.epoch_s)[:16]}.tar"
    if target.exists():
        return target
    temporary = target.with_suffix(".part.tar")
    rootfs = recipe.rootfs
    excludes = [f"--dpkgopt=path-exclude={pattern}" for pattern in rootfs.path_exclude]
    arguments = [
        "mmdebstrap",
        "--mode=root",
        "--quiet",
        f"--variant={rootfs.variant}",
        f"--architectures={rootfs.architecture}",
        f"--include={','.join(rootfs.packages)}",
        *excludes,
        rootfs.suite,
        str(temporary),
    ]
    run_command(arguments, timeout_s=BOOTSTRAP_TIMEOUT_S, env={"SOURCE_DATE_EPOCH": str(recipe.epoch_s)})
    temporary.replace(target)
    return target


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


def customise_root(root: Path, recipe: Recipe, guestd: bytes) -> None:
    """Turns the package tree into the image's root; afterwards nothing in it depends on when or where it was built."""
    for user in recipe.users:
        _add_user(root, user)
    for unit in recipe.mask_units:
        _mask(root / "etc/systemd/system" / unit)
    for generator in recipe.mask_generators:
        _mask(root / "etc/systemd/system-generators" / generator)
    _keep_modules(root, recipe)
    for pattern in recipe.remove:
        for found in sorted(root.glob(pattern)):
            _remove(found)
    for package in recipe.build_only:
        _remove(root / "usr/bin" / package.removesuffix("-static"))
    for path, text in recipe.files:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(target)
        target.write_text(text)
        target.chmod(0o644)
    _install_guest(root, guestd)


def compile_python(root: Path) -> None:
    """Compiles the standard library so that its time stamps do not matter (PEP 552): an emulated CPU compiles slowly."""
    program = ["chroot", str(root), "/usr/bin/python3", "-I", "-m", "compileall", "-q", "-f"]
    mode = ["--invalidation-mode", "unchecked-hash", "-x", "/(test|tests|idlelib|lib2to3|turtledemo)/"]
    run_command([*program, *mode, "/usr/lib/python3", *_stdlib(root)], timeout_s=STEP_TIMEOUT_S)


def _stdlib(root: Path) -> list[str]:
    return [f"/usr/lib/{path.name}" for path in sorted((root / "usr/lib").glob("python3.*"))]


def _install_guest(root: Path, guestd: bytes) -> None:
    folder = root / BEDPLATE_DIR
    folder.mkdir(mode=0o755, parents=True)
    (folder / "guestd.pyz").write_bytes(guestd)
    (folder / "guestd.pyz").chmod(0o644)
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
    run_command(["depmod", "-b", str(root / "usr"), modules.release], timeout_s=STEP_TIMEOUT_S)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        raise HostFaultError("rootfs_unexpected", f"{path} is no file, folder or symlink")
