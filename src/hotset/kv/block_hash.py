"""Names of blocks by their content: a chain of hashes, one link per block."""

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 16
_BLOCK_DIGEST = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"hotset-block")
_PIECE_DIGEST = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"hotset-state")


def root_hash(fingerprint: str, salt: bytes) -> bytes:
    """The start of a hash chain: equal only for the same model, layout and tenant."""
    return hashlib.blake2b(
        fingerprint.encode() + b"\0" + salt, digest_size=DIGEST_BYTES, person=b"hotset-root"
    ).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one block, full or not: of its tokens and, through `parent`, of all before it."""
    digest = _BLOCK_DIGEST.copy()  # takes a third of the time of making one
    digest.update(parent + array("i", token_ids).tobytes())
    return digest.digest()


def piece_key(state: bytes, index: int) -> bytes:
    """Key of one piece of the state that has the key `state`, the hash of all tokens before it."""
    digest = _PIECE_DIGEST.copy()
    digest.update(state + index.to_bytes(4, "little"))
    return digest.digest()
