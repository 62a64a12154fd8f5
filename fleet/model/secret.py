"""A secret on its way through a program: it shows itself to nobody who does not ask for it."""


class SecretValue:
    """Bytes that no repr, message, pickle or JSON repeats; only `reveal` gives them."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "SecretValue(…)"

    def __len__(self) -> int:
        return len(self._value)

    def __reduce__(self) -> str:
        raise TypeError("a secret value is never written down")

    def reveal(self) -> bytes:
        """The value itself, for the call that sends it."""
        return self._value
