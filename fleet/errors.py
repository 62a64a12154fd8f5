"""The one tree of errors.

Every error carries a machine-readable `code` (snake_case, stable, documented), a message for people and the
next step to take. `fleet.rpc` maps the five families to gRPC status codes and back; nobody matches texts.
"""


class BedplateError(Exception):
    """An error with a code, a message and a next step."""

    def __init__(self, code: str, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return self.message


class InvalidSpecError(BedplateError):
    """The request cannot be met as it is written; asking again changes nothing. `field` names the culprit."""

    def __init__(self, code: str, message: str, next_step: str = "", *, field: str = "") -> None:
        super().__init__(code, f"{field}: {message}" if field else message, next_step)
        self.field = field


class NotPermittedError(BedplateError):
    """The caller's certificate does not allow this."""


class NotFoundError(BedplateError):
    """What the request names does not exist, or not for this caller."""


class ConflictError(BedplateError):
    """Something moved, or a name is taken: read again, then decide again."""


class UnavailableError(BedplateError):
    """A peer, the store or a host cannot be reached now: try again later."""


class ExhaustedError(UnavailableError):
    """A limit is reached; the message names it. Nothing was done, so the same may be asked again, later or for less."""


class HostFaultError(BedplateError):
    """A host failed at a step: `code` names the step, the message names the subject."""
