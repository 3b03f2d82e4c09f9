"""Responses that clients asked to be stored, in memory: each tenant's own, the latest ones."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from hotset.server.body import Json
from hotset.server.errors import not_found
from hotset.server.forms import encode
from hotset.server.limits import Limits


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, and the conversation that it ends: the items of input and output."""

    response: Json
    items: list[Json]


class KeptResponses(Protocol):
    """Where responses are: in this process, or at the desk of a fleet.

    Raises EngineError where they are out of reach, but for `put`, which then stores nothing.
    """

    async def put(self, tenant: str, response: Json, items: list[Json]) -> bool:
        """Store a response by its `id`; returns whether it did."""
        ...

    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """What was stored. Raises ApiError (404): it is not there, or another's."""
        ...

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forget a response. Raises ApiError (404)."""
        ...


class ResponseStore:
    """Bounded in count and bytes for each tenant: the least recently used ones are dropped.

    The event loop's thread alone uses it. See `KeptResponses`.

    Attributes:
        most_frame_bytes: of a message that has a response of the largest size.
    """

    def __init__(self, *, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self.most_frame_bytes = 2 * max_bytes + 2**20
        self._stored: dict[str, OrderedDict[str, tuple[StoredResponse, int]]] = {}
        self._num_bytes: dict[str, int] = {}

    @classmethod
    def of(cls, limits: Limits) -> "ResponseStore":
        """As large as the limits of a server have it."""
        return cls(max_count=limits.max_stored, max_bytes=int(limits.max_stored_mib * 2**20))

    async def put(self, tenant: str, response: Json, items: list[Json]) -> bool:
        """See `KeptResponses`; False where it alone is more than the bound."""
        size = len(encode(response).encode("utf-8", "surrogatepass"))
        size += len(encode(items).encode("utf-8", "surrogatepass"))
        if size > self._max_bytes:
            return False
        stored = self._stored.setdefault(tenant, OrderedDict())
        stored[response["id"]] = StoredResponse(response, items), size
        self._num_bytes[tenant] = self._num_bytes.get(tenant, 0) + size
        while len(stored) > self._max_count or self._num_bytes[tenant] > self._max_bytes:
            _, (_, oldest_size) = stored.popitem(last=False)
            self._num_bytes[tenant] -= oldest_size
        return True

    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """See `KeptResponses`."""
        stored = self._stored.get(tenant, OrderedDict())
        if response_id not in stored:
            raise not_found(
                f"there is no response {response_id[:80]!r}; responses are kept where store is "
                "true, the latest ones until the server ends"
            )
        stored.move_to_end(response_id)
        return stored[response_id][0]

    async def delete(self, tenant: str, response_id: str) -> None:
        """See `KeptResponses`."""
        await self.get(tenant, response_id)
        _, size = self._stored[tenant].pop(response_id)
        self._num_bytes[tenant] -= size
