"""The process in which a source is unpacked: `python -m hostd.drivers.image.unpack_child FOLDER BYTES SECONDS <TAR`.

Limits itself and gives its privileges away before it reads the first byte. Silence and exit code 0 mean that all is unpacked;
otherwise one line of JSON says what is wrong.
"""

import json
import os
import resource
import sys
from pathlib import Path

from fleet.errors import BedplateError, HostFaultError
from hostd.drivers.image.untar import UNPACKED_BYTES_MAX, unpack_source

# The user and group "nobody" of every Linux: owns nothing but what is unpacked.
NOBODY = 65534
# The tree is written file by file, and the tar is stdin.
OPEN_FILES_MAX = 64


def main() -> int:
    """0 when the tar on stdin is in the folder, 1 after an answer."""
    folder, memory_bytes, cpu_s = sys.argv[1:]
    _confine(Path(folder), int(memory_bytes), int(cpu_s))
    try:
        unpack_source(sys.stdin.buffer, Path())
    except BedplateError as error:
        told = {"code": error.code, "message": error.message[:1000], "next_step": error.next_step}
        sys.stdout.write(json.dumps({**told, "is_host_fault": isinstance(error, HostFaultError)}))
        return 1
    return 0


def _confine(folder: Path, memory_bytes: int, cpu_s: int) -> None:
    """Works in `folder` from here on, as a user who can pass to no other."""
    os.chdir(folder)
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, UNPACKED_BYTES_MAX),
        (resource.RLIMIT_NOFILE, OPEN_FILES_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    os.umask(0o022)
    if os.geteuid() == 0:
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


if __name__ == "__main__":
    sys.exit(main())
