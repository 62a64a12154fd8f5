"""mb's own configuration: which schedulers to ask, and as whom."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from fleet.config import load_config
from fleet.errors import InvalidSpecError, NotFoundError
from fleet.identity import TlsFiles

CONFIG_VARIABLE = "BEDPLATE_CONFIG"
DEFAULT_CONFIG = "~/.config/bedplate/mb.toml"


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """The file's content; only operators name a `tenant`, a tenant's own is in its certificate.

    `scheduler` is one address, `schedulers` are those of one fleet: any of them serves, and whoever answers is asked.
    """

    tls: TlsFiles
    scheduler: str = ""
    schedulers: tuple[str, ...] = ()
    tenant: str = ""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every scheduler's address."""
        return (*((self.scheduler,) if self.scheduler else ()), *self.schedulers)

    @property
    def peer(self) -> str:
        """The schedulers as errors name them."""
        return f"scheduler {' or '.join(self.addresses)}"


def load_client_config(named: Path | None, tenant: str = "") -> ClientConfig:
    """The configuration in `named`, else in $BEDPLATE_CONFIG, else in ~/.config/bedplate/mb.toml; `tenant` replaces its own.

    Paths in it are relative to it. Raises NotFoundError `config_unreadable`, or InvalidSpecError that names the field.
    """
    path = (named or Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG)).expanduser()
    if not path.is_file():
        next_step = f"write it (docs/cli.md shows how), or name one with --config or ${CONFIG_VARIABLE}"
        raise NotFoundError("config_unreadable", f"there is no configuration {path}", next_step)
    config = load_config(ClientConfig, path)
    _check_addresses(config, path)
    folder = path.absolute().parent
    for name in ("ca", "certificate", "key"):
        if not (file := folder / getattr(config.tls, name).expanduser()).exists():
            message = f"there is no file {file} ({path})"
            raise InvalidSpecError("config_invalid", message, "have one issued with mb pki issue", field=f"tls.{name}")
    files = (folder / file.expanduser() for file in (config.tls.ca, config.tls.certificate, config.tls.key))
    return replace(config, tls=TlsFiles(*files), tenant=tenant or config.tenant)


def _check_addresses(config: ClientConfig, path: Path) -> None:
    if not config.addresses:
        message = f"no scheduler is named ({path})"
        raise InvalidSpecError("config_invalid", message, 'write schedulers = ["ip:port"]', field="schedulers")
    for address in config.addresses:
        _, _, port = address.rpartition(":")
        if not (port.isascii() and port.isdigit()):
            message = f"{address!r} is no address ({path})"
            field = "scheduler" if address == config.scheduler else "schedulers"
            raise InvalidSpecError("config_invalid", message, "write ip:port", field=field)
