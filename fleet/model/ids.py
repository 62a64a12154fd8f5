"""Identifiers and the one place that says which strings may be one.

Everything here is used in file names, interface names and etcd keys, so each pattern is closed: no dots
that climb, no slashes, a bounded length.
"""

import base64
import re
from collections.abc import Callable
from typing import NewType

SandboxId = NewType("SandboxId", str)
HostId = NewType("HostId", str)
Tenant = NewType("Tenant", str)
Digest = NewType("Digest", str)

NO_HOST = HostId("")
NO_SANDBOX = SandboxId("")
NO_DIGEST = Digest("")

# 12 characters, because "bp-" and the id together must fit Linux's 15-character interface names.
SANDBOX_ID_LENGTH = 12
_SANDBOX_ID = re.compile(r"[a-z2-7]{12}")
# A DNS label (RFC 1123): usable as host name, certificate name and key segment alike.
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def make_sandbox_id(random_bytes: Callable[[int], bytes]) -> SandboxId:
    """A new sandbox id of 60 random bits from `random_bytes` (for example `secrets.token_bytes`)."""
    text = base64.b32encode(random_bytes(10)).decode("ascii").lower()
    return SandboxId(text[:SANDBOX_ID_LENGTH])


def is_sandbox_id(text: str) -> bool:
    """Whether `text` is 12 characters of a-z and 2-7."""
    return _SANDBOX_ID.fullmatch(text) is not None


def is_dns_label(text: str) -> bool:
    """Whether `text` is a lower-case RFC 1123 label of 1 to 63 characters: sandbox, host, tenant and agent names."""
    return _DNS_LABEL.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Whether `text` is "sha256:" followed by 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def digest_hex(digest: Digest) -> str:
    """The 64 hex digits of a digest, for file names."""
    return digest.removeprefix("sha256:")
