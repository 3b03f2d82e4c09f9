"""Front and replica prove to each other that they have the fleet secret, and agree on keys.

    replica -> front   32 random bytes
    front -> replica   32 random bytes, and its proof: HMAC-SHA256 of both under the secret
    replica -> front   its proof, of another name

Who has no secret gets 32 random bytes from a replica and 64 from a front that calls it, none of
which tell anything. A proof answers the random bytes of one connection, so that it is of no use in
another one; who passes on what both sides send has still no key.

Imports no torch.
"""

import asyncio
import hmac
import secrets
from typing import NamedTuple

_NONCE_BYTES = 32
_PROOF_BYTES = 32


class LinkError(Exception):
    """A link that cannot be opened or goes on no more; one line."""


class Keys(NamedTuple):
    """Of the frames of one link, as one side has them."""

    ours: bytes
    theirs: bytes


def _derive(secret: bytes, what: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, b"hotset link: " + what + b"\0" + nonces, "sha256")


async def prove_replica(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> Keys:
    """The replica's side.

    Raises:
        LinkError: the front has another secret, or none; nothing was told.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    writer.write(nonce)
    nonces = nonce + await exactly(reader, _NONCE_BYTES)
    proof = await exactly(reader, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _derive(secret, b"front", nonces)):
        raise LinkError("the other side has another fleet secret, or none")
    writer.write(_derive(secret, b"replica", nonces))
    return Keys(_derive(secret, b"from replica", nonces), _derive(secret, b"from front", nonces))


async def prove_front(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> Keys:
    """The front's side.

    Raises:
        LinkError: the replica has another secret, or none; nothing was told.
    """
    nonces = await exactly(reader, _NONCE_BYTES)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    nonces += nonce
    writer.write(nonce + _derive(secret, b"front", nonces))
    try:
        proof = await exactly(reader, _PROOF_BYTES)
    except LinkError:
        raise LinkError("it takes no proof of ours; is the fleet secret the same there?") from None
    if not hmac.compare_digest(proof, _derive(secret, b"replica", nonces)):
        raise LinkError("it has another fleet secret, or none")
    return Keys(_derive(secret, b"from front", nonces), _derive(secret, b"from replica", nonces))


async def exactly(reader: asyncio.StreamReader, num_bytes: int) -> bytes:
    """Read that number of bytes. Raises LinkError where the connection ends before."""
    try:
        return await reader.readexactly(num_bytes)
    except (asyncio.IncompleteReadError, OSError):
        raise LinkError("the other side has closed the connection") from None
