"""Seals of payloads that others keep: who wrote them, of which key, and that nobody changed them.

A sealed payload is a header of 64 bytes and the payload:

    version 4, fingerprint 8, writer 8, bytes of the payload 8, time 8, nonce 12, tag 16

The tag is of AES-256-GMAC over the rest of the header, the payload's key and the payload, or of
AES-256-GCM, which encrypts the payload too. The AES key is made of the fleet's secret, the day, the
fingerprint and the payload's key (HKDF, RFC 5869): as the chain of keys starts at the salt of a
tenant, the payload of another tenant does not even verify, and no key seals more than a few.

Names under which stores keep payloads are their keys, encrypted: they tell nothing without the
secret.
"""

import hashlib
import hmac
import os
import struct
import time
from collections.abc import Callable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

KEY_BYTES = 16
HEADER_BYTES = 64
EXPIRY_S = 24 * 3600  # how long a store keeps a payload

_VERSION, _ENCRYPTED = b"HSG1", b"HSE1"
_HEADER = struct.Struct("<4s8s8sQQ12s")  # all but the tag
_TAG_BYTES = 16
_DAY_S = 24 * 3600
_SKEW_S = 3600  # by which the clocks of two machines may differ
_PIECE_BYTES = 256 * 1024  # at once, as the interpreter's lock is held meanwhile


def writer_id(name: str) -> bytes:
    """The 8 bytes by which headers name a writer."""
    return hashlib.blake2b(name.encode(), digest_size=8, person=b"hotset-writer").digest()


class Seal:
    """Seals payloads, and opens those of the same secret and fingerprint. Safe from any thread.

    Args:
        secret: of the fleet.
        fingerprint: what payloads depend on beside their keys, such as how numbers are rounded.
        writer: the name of this process, for `revoked`.
        encrypts: whether to encrypt what is sealed; opened is either.
        now: seconds since 1970, which machines agree on within the hour.

    Attributes:
        revoked: ids of writers whose payloads are not opened; to be replaced, not changed.
    """

    def __init__(
        self,
        secret: bytes,
        fingerprint: str,
        writer: str,
        *,
        encrypts: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.revoked: frozenset[bytes] = frozenset()
        self._root = hmac.digest(b"hotset", secret, "sha256")
        self._fingerprint = hashlib.blake2b(fingerprint.encode(), digest_size=8).digest()
        self._names = algorithms.AES(self._derive(b"names"))
        self._writer = writer_id(writer)
        self._version = _ENCRYPTED if encrypts else _VERSION
        self._now = now

    def password(self) -> str:
        """A password that those with the same secret and fingerprint share."""
        return self._derive(b"password").hex()

    def names(self, keys: Sequence[bytes]) -> list[bytes]:
        """Of each key of 16 bytes, the name that stores know it by."""
        data = Cipher(self._names, modes.ECB()).encryptor().update(b"".join(keys))
        return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]

    def keys(self, names: Sequence[bytes]) -> list[bytes]:
        """The keys that names of 16 bytes stand for."""
        data = Cipher(self._names, modes.ECB()).decryptor().update(b"".join(names))
        return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]

    def seal(
        self, key: bytes, payload: memoryview, scratch: memoryview
    ) -> tuple[bytes, memoryview]:
        """Header and what follows it: `payload` itself, or `scratch` with it encrypted.

        Args:
            key: of 16 bytes.
            payload: not changed.
            scratch: as long as `payload`; overwritten where payloads are encrypted.
        """
        nonce = os.urandom(12)
        fields = (self._version, self._fingerprint, self._writer, len(payload), int(self._now()))
        head = _HEADER.pack(*fields, nonce)
        aes = algorithms.AES(self._block_key(head, key))
        sealing = Cipher(aes, modes.GCM(nonce)).encryptor()
        sealing.authenticate_additional_data(head + key)
        if self._version == _ENCRYPTED:
            _convert(sealing, payload, scratch)
            payload = scratch
        else:
            for start in range(0, len(payload), _PIECE_BYTES):
                sealing.authenticate_additional_data(payload[start : start + _PIECE_BYTES])
        sealing.finalize()
        return head + sealing.tag, payload

    def open(self, key: bytes, header: bytes | bytearray, payload: memoryview) -> str | None:
        """Check what a store has for `key`, and decrypt it in place; returns what is wrong.

        That is `foreign` (another version, fingerprint or length), `revoked`, `stale` or `forged`.

        Args:
            key: of 16 bytes.
            header: `HEADER_BYTES` long.
            payload: what followed. Undefined unless the result is None.
        """
        head, tag = bytes(header[:-_TAG_BYTES]), bytes(header[-_TAG_BYTES:])
        version, fingerprint, writer, num_bytes, sealed_s, nonce = _HEADER.unpack(head)
        if (
            version not in (_VERSION, _ENCRYPTED)
            or fingerprint != self._fingerprint
            or num_bytes != len(payload)
        ):
            return "foreign"
        if writer in self.revoked:
            return "revoked"
        if not -_SKEW_S <= self._now() - sealed_s <= EXPIRY_S + _SKEW_S:
            return "stale"
        aes = algorithms.AES(self._block_key(head, key))
        opening = Cipher(aes, modes.GCM(nonce, tag)).decryptor()
        opening.authenticate_additional_data(head + key)
        if version == _ENCRYPTED:
            _convert(opening, payload, payload)
        else:
            for start in range(0, len(payload), _PIECE_BYTES):
                opening.authenticate_additional_data(payload[start : start + _PIECE_BYTES])
        try:
            opening.finalize()
        except InvalidTag:
            return "forged"
        return None

    def _derive(self, purpose: bytes) -> bytes:
        """32 bytes for one purpose: HKDF-Expand of one block."""
        return hmac.digest(self._root, b"hotset " + purpose + self._fingerprint + b"\x01", "sha256")

    def _block_key(self, head: bytes, key: bytes) -> bytes:
        version, _, _, _, sealed_s, _ = _HEADER.unpack(head)
        day = (sealed_s // _DAY_S).to_bytes(8, "little")
        return self._derive(b"payload" + version + day + key)


def _convert(cipher: CipherContext, source: memoryview, into: memoryview) -> None:
    """Encrypt or decrypt `source` into `into`, which may be the same memory."""
    for start in range(0, len(source), _PIECE_BYTES):
        piece = slice(start, start + _PIECE_BYTES)
        cipher.update_into(source[piece], into[piece])
