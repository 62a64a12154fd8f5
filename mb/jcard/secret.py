"""Secrets on their way through mb: a value shows itself to nobody who does not ask for it by name."""

from fleet.model.admission import SECRET_BYTES_MAX, SECRETS_BYTES_MAX
from fleet.model.secret import SecretValue
from fleet.model.units import render_bytes
from mb.jcard.table import Table


def read_secrets(root: Table) -> dict[str, SecretValue]:
    """The values under `[secrets]`; an empty one and one past its limit are faults, which repeat none."""
    values = root.variables("secrets", secret=True)
    found = {name: SecretValue(text.encode()) for name, text in values.items()}
    for name, value in found.items():
        field = f"secrets.{name}"
        if not len(value) and not root.reading.is_faulty(field):
            root.fault(field, "its value is empty", "write a value or ${VAR}, or leave the secret out")
        if len(value) > SECRET_BYTES_MAX:
            message = f"its value of {len(value)} bytes is past {render_bytes(SECRET_BYTES_MAX)}"
            root.fault(field, message, "put a large file in a source")
    if sum(map(len, found.values())) > SECRETS_BYTES_MAX:
        limit = render_bytes(SECRETS_BYTES_MAX)
        root.fault("secrets", f"all values together are past {limit}", "keep less in secrets")
    return found
