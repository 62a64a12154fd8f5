"""What stops guestd from going on, as the host is told it: a code (snake_case, stable) and a sentence."""

TEXT_CHARS_MAX = 300


class GuestFault(Exception):  # noqa: N818 (a fault is told to the host, not an error of guestd's own)
    """This sandbox cannot go on; `code` and `message` become the frame `failed`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = clean_text(message)


def clean_text(text: str) -> str:
    """Printable ASCII of bounded length, so that what agents and files are called cannot burst a frame's header."""
    escaped = text.encode("ascii", "backslashreplace").decode()
    return "".join(char if char.isprintable() else " " for char in escaped)[:TEXT_CHARS_MAX]
