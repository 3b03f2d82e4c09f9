"""Have no replica use what a writer wrote to the stores. Imports no torch."""

import time
from collections.abc import Sequence

from hotset.errors import TierError
from hotset.memory.remote.resp import Address, Connection, RefusedError, StoreError
from hotset.memory.remote.seal import writer_id
from hotset.memory.remote.store import REVOKED

_DEADLINE_S = 5.0


def revoke(urls: Sequence[str], writer: str) -> list[str]:
    """Revoke a writer, by its name, in stores; returns the names of these.

    Replicas hear of it within 10 seconds, and remember it until they end. For good, and against one
    who has the password of the stores, a new secret is the means.

    Raises:
        ConfigError: a URL that is none; `TierError`: a store that cannot be told. Those before it
            in the list know.
    """
    addresses = [Address.of(url) for url in urls]
    for address in addresses:
        try:
            connection = Connection(address, time.monotonic() + _DEADLINE_S)
            try:
                connection.ask("SADD", REVOKED, writer_id(writer))
            finally:
                connection.close()
        except (StoreError, RefusedError) as error:
            raise TierError(f"the store {address.name} cannot be told: {error}") from error
    return [address.name for address in addresses]
