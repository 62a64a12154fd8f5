"""What mb's exit codes mean. They are stable, and `mb --help` and docs/cli.md list them."""

from enum import IntEnum

from fleet.errors import BedplateError, InvalidSpecError, UnavailableError


class Exit(IntEnum):
    """How mb ended."""

    OK = 0
    ERROR = 1
    INVALID = 2
    ENDED_BADLY = 3
    UNREACHABLE = 4
    TIMED_OUT = 124
    OWN_ERROR = 125
    INTERRUPTED = 130


MEANINGS = (
    (Exit.OK, "done; for `mb up` and `mb wait`: every agent completed"),
    (Exit.ERROR, "refused or failed; the message says why"),
    (Exit.INVALID, "a wrong or missing jcard or configuration, a wrong command line or spec"),
    (Exit.ENDED_BADLY, "the sandbox ended failed, stopped or removed"),
    (Exit.UNREACHABLE, "the scheduler or a host cannot be reached now: try later"),
    (Exit.TIMED_OUT, "waited as long as --timeout or --wait-timeout said"),
    (Exit.OWN_ERROR, "mb exec, shell, attach: mb's own error, not the program's"),
    (Exit.INTERRUPTED, "interrupted; a sandbox that was started runs on"),
)


# What the user names and is not there is as wrong as what is wrongly written.
_INVALID_CODES = frozenset({"config_unreadable", "jcard_missing"})


def exit_for(error: BedplateError) -> Exit:
    """The exit code that tells this error's family."""
    if isinstance(error, InvalidSpecError) or error.code in _INVALID_CODES:
        return Exit.INVALID
    return Exit.UNREACHABLE if isinstance(error, UnavailableError) else Exit.ERROR
