"""Secret values on their way from their owner to a guest: in memory only, never in a log, a repr or a file.

awaited -- put --> held -- the guest is configured, or the sandbox is over --> dropped
"""

from collections.abc import Iterable, Iterator

from fleet.errors import InvalidSpecError
from fleet.model.admission import SECRET_BYTES_MAX, SECRETS_BYTES_MAX
from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.secret import SecretValue
from fleet.model.units import KIB
from hostd.drivers.ports import LinkMessage


class Vault:
    """The values that wait for their guests, each run's by itself."""

    def __init__(self) -> None:
        self._values: dict[SandboxId, tuple[int, dict[str, SecretValue]]] = {}

    def has_all(self, order: Assignment) -> bool:
        """Whether the order's run lacks no value; true for a spec without secrets."""
        run, values = self._values.get(order.sandbox_id, (0, {}))
        return not order.spec.secrets or (run == order.run and set(values) == set(order.spec.secrets))

    def put(self, order: Assignment, values: Iterable[tuple[str, bytes]]) -> None:
        """Holds all values of a run; raises InvalidSpecError when they are not exactly those of the spec, or too large."""
        given = tuple(values)
        _check(order, given)
        self._values[order.sandbox_id] = (order.run, {name: SecretValue(value) for name, value in given})

    def messages(self, order: Assignment) -> Iterator[LinkMessage]:
        """The frames that give the guest its secrets, in the order of the spec."""
        _, values = self._values.get(order.sandbox_id, (0, {}))
        for name in order.spec.secrets:
            yield LinkMessage("secret", {"name": name}, values[name].reveal())

    def drop(self, sandbox_id: SandboxId) -> None:
        """Forgets a sandbox's values."""
        self._values.pop(sandbox_id, None)


def _check(order: Assignment, values: tuple[tuple[str, bytes], ...]) -> None:
    names, wanted = [name for name, _ in values], order.spec.secrets
    unknown = [name for name in names if name not in wanted]
    if unknown:
        # A name may be a value that was put in the wrong place: it is not repeated.
        message = f"{len(unknown)} of the names sent are not in the spec, which has {', '.join(wanted) or 'none'}"
        raise _invalid("secret_unknown", message, "send exactly those")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise _invalid("secret_missing", f"no value for {', '.join(missing)}", "send all of them at once")
    if len(names) != len(set(names)):
        raise _invalid("secret_repeated", "a name is there twice", "send each once")
    large = [name for name, value in values if len(value) > SECRET_BYTES_MAX]
    if large or sum(len(value) for _, value in values) > SECRETS_BYTES_MAX:
        whose = f"the value of {large[0]}" if large else "all values together"
        most = SECRET_BYTES_MAX if large else SECRETS_BYTES_MAX
        raise _invalid("secret_too_large", f"{whose} has more than {most // KIB} KiB", "put it into a source instead")


def _invalid(code: str, message: str, next_step: str) -> InvalidSpecError:
    return InvalidSpecError(code, message, next_step, field="secrets")
