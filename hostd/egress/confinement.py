"""Takes from this process whatever a gateway does not need, for good: what a guest makes of it then is little.

Owns no policy. It is called once everything is imported and every listening socket is there:
no core, no ptrace -> memory locked -> another user -> no new privileges -> Landlock -> seccomp
"""

import ctypes

# The C library's resolver asks Python for it by name at the first connection, when files can be read no more.
import encodings.idna  # noqa: F401
import errno
import os
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fleet.errors import HostFaultError

# prctl(2).
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
# mlockall(2): pages that are there, that will be, and each only once it is touched.
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
# landlock_create_ruleset(2) and its two companions have the same numbers on every architecture.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
ACCESS_FS_READ = 1 << 2 | 1 << 3
# How many kinds of access to files each version of Landlock knows of: a ruleset may name no others.
ACCESS_FS_KINDS = {1: 13, 2: 14, 3: 15, 4: 15}
ACCESS_FS_KINDS_NEWEST = 16
# seccomp_init(3) and seccomp_rule_add(3).
SCMP_ACT_ALLOW = 0x7FFF0000
SCMP_ACT_ERRNO = 0x00050000
SCMP_FLTATR_CTL_TSYNC = 4
SCMP_CMP_EQ, SCMP_CMP_GE, SCMP_CMP_MASKED_EQ = 4, 5, 7
SCMP_UNKNOWN = -1
CLONE_THREAD = 0x00010000
AF_UNIX, PAST_AF_INET = 1, 3

# Programs, other processes, the kernel's own tools, mounts and namespaces, other ways to files and memory. A gateway holds sockets.
DENIED_CALLS = (
    *("execve", "execveat", "fork", "vfork"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_open", "pidfd_getfd", "kcmp"),
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "syslog", "acct"),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "move_mount", "open_tree", "fsopen", "fsmount"),
    *("mount_setattr", "swapon", "swapoff", "quotactl", "name_to_handle_at", "open_by_handle_at", "fanotify_init"),
    *("add_key", "request_key", "keyctl", "memfd_create", "memfd_secret", "personality", "modify_ldt"),
    *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname", "iopl", "ioperm"),
)
NEXT_STEP = "the egress gateway runs confined or not at all: use a kernel with seccomp, and install libseccomp2"


def confine(uid: int, gid: int, readable: Sequence[Path]) -> tuple[str, ...]:
    """Gives everything up but `readable` trees, threads, the sockets it has and new IPv4 ones; there is no way back.

    Returns what this machine could not do: `memory_lock` (secrets may be swapped out) and `landlock` (files are held by their
    modes alone). Raises HostFaultError `egress_unconfined` when seccomp, the other user or the rest fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # Before Landlock hides it.
    seccomp = _load_seccomp()
    missing = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not _lock_memory(libc):
        missing.append("memory_lock")
    _become(uid, gid)
    # Only now: a change of user sets it anew.
    _check("prctl(PR_SET_DUMPABLE)", libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    _check("prctl(PR_SET_NO_NEW_PRIVS)", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if not _restrict_files(libc, readable):
        missing.append("landlock")
    _restrict_calls(seccomp)
    return tuple(missing)


def _lock_memory(libc: Any) -> bool:
    """Whether no page of this process will be written to a swap device. Under any limit, memory would end at that: rather not."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return False
    return bool(libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0)


def _become(uid: int, gid: int) -> None:
    if uid == 0:
        raise HostFaultError("egress_unconfined", "its user is root", "set egress.user to another")
    try:
        if os.geteuid() == 0:
            os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        message = f"it cannot become user {uid}, group {gid}: {error.strerror}"
        raise HostFaultError("egress_unconfined", message, "start it as root") from error


def _restrict_files(libc: Any, readable: Sequence[Path]) -> bool:
    """Only `readable` trees may be read, and nothing written; False on a kernel without Landlock."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return False
    handled = (1 << ACCESS_FS_KINDS.get(version, ACCESS_FS_KINDS_NEWEST)) - 1
    attribute = ctypes.c_uint64(handled)
    ruleset = _check(
        "landlock_create_ruleset",
        libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(attribute), ctypes.sizeof(attribute), 0),
    )
    try:
        for path in readable:
            _add_tree(libc, ruleset, path)
        _check("landlock_restrict_self", libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _add_tree(libc: Any, ruleset: int, path: Path) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        # What this user cannot reach it could not have read.
        return
    try:
        # Of a single file a folder's rights are no rights.
        access = ACCESS_FS_READ if path.is_dir() else ACCESS_FS_READ & ~(1 << 3)
        rule = _PathBeneath(access, handle)
        code = libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(rule), 0)
        _check(f"landlock_add_rule for {path}", code)
    finally:
        os.close(handle)


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def _load_seccomp() -> Any:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise HostFaultError("egress_unconfined", f"libseccomp does not load: {error}", NEXT_STEP) from error
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _restrict_calls(library: Any) -> None:
    """Denies DENIED_CALLS, new processes, signals to others and every socket but IPv4's, in all threads."""
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(SCMP_ACT_ALLOW)))
    if context.value is None:
        raise HostFaultError("egress_unconfined", "libseccomp makes no filter", NEXT_STEP)

    def deny(name: str, comparison: _Comparison | None = None, error: int = errno.EPERM) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == SCMP_UNKNOWN:
            # Newer than this libseccomp, and so than what it was written for.
            return
        action = ctypes.c_uint32(SCMP_ACT_ERRNO | error)
        pointer = ctypes.byref(comparison) if comparison else None
        code = library.seccomp_rule_add_array(context, action, number, 1 if comparison else 0, pointer)
        _check_filter(f"rule for {name}", code)

    try:
        _check_filter("threads", library.seccomp_attr_set(context, SCMP_FLTATR_CTL_TSYNC, ctypes.c_uint32(1)))
        for name in DENIED_CALLS:
            deny(name)
        _deny_by_argument(deny)
        _check_filter("load", library.seccomp_load(context))
    finally:
        library.seccomp_release(context)


def _deny_by_argument(deny: Callable[..., None]) -> None:
    deny("socket", _Comparison(0, SCMP_CMP_EQ, AF_UNIX, 0))
    deny("socket", _Comparison(0, SCMP_CMP_GE, PAST_AF_INET, 0))
    deny("clone", _Comparison(0, SCMP_CMP_MASKED_EQ, CLONE_THREAD, 0))
    # Its flags lie in memory, where no filter sees them: the C library takes clone instead.
    deny("clone3", error=errno.ENOSYS)
    for name in ("kill", "tkill"):
        deny(name)


def _check(step: str, code: int) -> int:
    if code < 0:
        message = f"{step}: {os.strerror(ctypes.get_errno())}"
        raise HostFaultError("egress_unconfined", message, NEXT_STEP)
    return code


def _check_filter(step: str, code: int) -> None:
    if code < 0:
        raise HostFaultError("egress_unconfined", f"seccomp, {step}: {os.strerror(-code)}", NEXT_STEP)
