"""Secrets that others only carry: sealed to one gateway's key on their way, and locked with the store's key at rest.

    seal(gateway's public key, value, context)   HPKE (RFC 9180: X25519, HKDF-SHA256, AES-256-GCM); opened by that gateway alone
    lock(store's key, value, context)            AES-256-GCM with a key of its own, which the store's key wraps (an envelope)

The context says whose value it is and is authenticated, not stored: what was written for one place opens at no other. Errors say
nothing of values.
"""

import hashlib
import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fleet.errors import InvalidSpecError
from fleet.model.secret import SecretValue

KEY_BYTES = 32
# RFC 5116: what AES-GCM takes and adds.
NONCE_BYTES, TAG_BYTES = 12, 16
KEY_ID_BYTES = 8
# The first byte of everything that is written here: another form will have another.
SEALED_FORM, LOCKED_FORM = b"\x01", b"\x02"
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
# Of a key that is used once a nonce may be fixed.
_ONLY_NONCE = bytes(NONCE_BYTES)
_WRAPPED_BYTES = KEY_BYTES + TAG_BYTES
_NEXT_STEP = "put the secret again"


def seal(public_key: bytes, value: SecretValue, context: str) -> bytes:
    """The value for the holder of `public_key` (32 bytes) alone; raises InvalidSpecError `key_invalid` when it is no such key."""
    try:
        recipient = X25519PublicKey.from_public_bytes(public_key)
        return SEALED_FORM + _HPKE.encrypt(value.reveal(), recipient, _bound(SEALED_FORM, context))
    except ValueError as error:
        # Of another length, or of small order: with those every shared key is the same.
        raise InvalidSpecError("key_invalid", "it is no X25519 public key", "ask the gateway again") from error


class Opener:
    """One process's key, made when it starts and never written down: what was sealed to it ends with it."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public_key = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def open(self, sealed: bytes, context: str) -> SecretValue:
        """What `seal` was given; raises InvalidSpecError `secret_unreadable`."""
        form, content = sealed[:1], sealed[1:]
        if form != SEALED_FORM:
            raise _unreadable()
        try:
            return SecretValue(_HPKE.decrypt(content, self._private, _bound(SEALED_FORM, context)))
        except (InvalidTag, ValueError) as error:
            raise _unreadable() from error


@dataclass(frozen=True, slots=True, repr=False)
class StoreKey:
    """The key that wraps every stored secret's own, 32 bytes from a file or a command; `key_id` names it without telling it."""

    key: SecretValue

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            message = f"it has {len(self.key)} bytes, and {KEY_BYTES} are needed"
            raise InvalidSpecError("key_invalid", message, "make one with `openssl rand 32`", field="secrets.key")

    @property
    def key_id(self) -> bytes:
        """Eight bytes of a hash of the key."""
        return hashlib.sha256(b"bedplate store key id" + self.key.reveal()).digest()[:KEY_ID_BYTES]


def lock(store_key: StoreKey, value: SecretValue, context: str) -> bytes:
    """The value as it is stored: form, key id, nonce, the value's own key wrapped, the value."""
    own, nonce = AESGCM.generate_key(KEY_BYTES * 8), os.urandom(NONCE_BYTES)
    bound = _bound(LOCKED_FORM + store_key.key_id, context)
    wrapped = AESGCM(store_key.key.reveal()).encrypt(nonce, own, bound)
    return LOCKED_FORM + store_key.key_id + nonce + wrapped + AESGCM(own).encrypt(_ONLY_NONCE, value.reveal(), bound)


def unlock(store_key: StoreKey, locked: bytes, context: str) -> SecretValue:
    """What `lock` was given; raises InvalidSpecError `key_unknown` for another store key's, else `secret_unreadable`."""
    head = len(LOCKED_FORM) + KEY_ID_BYTES
    start = head + NONCE_BYTES
    if locked[:1] != LOCKED_FORM or len(locked) < start + _WRAPPED_BYTES + TAG_BYTES:
        raise _unreadable()
    if locked[len(LOCKED_FORM) : head] != store_key.key_id:
        message = (
            f"it was stored under the key {locked[len(LOCKED_FORM) : head].hex()}, this one is {store_key.key_id.hex()}"
        )
        raise InvalidSpecError("key_unknown", message, "configure that key, or put the secret again")
    nonce, rest = locked[head:start], locked[start:]
    bound = _bound(locked[:head], context)
    try:
        own = AESGCM(store_key.key.reveal()).decrypt(nonce, rest[:_WRAPPED_BYTES], bound)
        return SecretValue(AESGCM(own).decrypt(_ONLY_NONCE, rest[_WRAPPED_BYTES:], bound))
    except InvalidTag as error:
        raise _unreadable() from error


def _bound(form: bytes, context: str) -> bytes:
    return form + context.encode()


def _unreadable() -> InvalidSpecError:
    return InvalidSpecError("secret_unreadable", "it was changed, or is another's", _NEXT_STEP)
