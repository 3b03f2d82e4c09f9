"""Keys of what sequences begin with: a chain of full blocks, and a last, partial one."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from hotset.kv.block_hash import block_hash, root_hash
from hotset.sequence import Request, Tail

# How many last, partial blocks of ended requests are remembered, and the least filled share that is
# worth a copy: below it recomputing is faster.
_MOST_TAILS = 2**16
LEAST_TAIL = 0.25

OnName = Callable[[bytes, bytes | None, Sequence[int], bytes], None]


class Prefixes:
    """Names the blocks of sequences by their tokens; knows neither blocks nor tiers.

    Attributes:
        on_name: is told the key of each full block that is named, the key before it (None: it is
            the first), its tokens and its salt.

    Args:
        fingerprint: of all that content depends on beside tokens, such as the weights.
        are_shared: whether requests find each other's content. Otherwise each has a chain of its
            own: after a preemption it finds its own blocks again, and no other request's.
        least_tail: share of a last, partial block that has to be filled for it to be found.
    """

    def __init__(
        self,
        fingerprint: str,
        block_size: int,
        *,
        are_shared: bool = True,
        least_tail: float = LEAST_TAIL,
    ) -> None:
        self.fingerprint = fingerprint
        self.block_size = block_size
        self.are_shared = are_shared
        self._fewest_in_tail = max(1, least_tail * block_size)
        # Hash of what precedes it -> tokens of the last block of a request that has ended.
        self._tails: OrderedDict[bytes, int] = OrderedDict()
        self.on_name: OnName | None = None

    def extend(self, request: Request) -> list[bytes]:
        """Keys of the request's full blocks, all whose tokens are known."""
        hashes, size = request.kv.block_hashes, self.block_size
        if hashes or request.num_known_tokens >= size:
            num_named = len(hashes)
            parent = self._parent(request, num_named)
            for start in range(len(hashes) * size, request.num_known_tokens - size + 1, size):
                parent = block_hash(parent, request.token_ids[start : start + size])
                hashes.append(parent)
            if self.on_name is not None:
                for i in range(num_named, len(hashes)):
                    tokens = request.token_ids[i * size : (i + 1) * size]
                    before = hashes[i - 1] if i else None
                    self.on_name(hashes[i], before, tokens, request.salt)
        return hashes

    def findable(self, request: Request) -> list[bytes]:
        """Keys of the leading blocks that may be found instead of computed."""
        return self.extend(request)[: request.num_findable_tokens // self.block_size]

    def next_key(self, request: Request) -> bytes | None:
        """Key of the findable block that starts at the request's next token; None within one."""
        index, offset = divmod(request.kv.num_computed_tokens, self.block_size)
        if offset or (index + 1) * self.block_size > request.num_findable_tokens:
            return None
        hashes = self.extend(request)
        return hashes[index] if index < len(hashes) else None

    def key_within(self, request: Request) -> bytes | None:
        """Key of the full block that the request has computed a part of; None between blocks."""
        index, offset = divmod(request.kv.num_computed_tokens, self.block_size)
        hashes = self.extend(request) if offset else ()
        return hashes[index] if index < len(hashes) else None

    def keys_reached_by(self, request: Request, num_tokens: int) -> list[bytes]:
        """Keys of the full blocks that the next `num_tokens` are in."""
        start, size = request.kv.num_computed_tokens, self.block_size
        return self.extend(request)[start // size : -(-(start + num_tokens) // size)]

    def tail_at(self, request: Request, index: int) -> Tail | None:
        """What a request that has ended left where block `index` of this one begins.

        None where this one has other tokens there, or would have none left to compute.
        """
        parent = self._parent(request, index)
        num_tokens = self._tails.get(parent)
        start = index * self.block_size
        if num_tokens is None or start + num_tokens > request.num_findable_tokens:
            return None
        key = block_hash(parent, request.token_ids[start : start + num_tokens])
        return Tail(key, index, num_tokens)

    def remember_tail(self, request: Request) -> bytes | None:
        """Have the last, partial block of a request that ends be found; returns its key.

        One for what precedes it. None where there is none, or too little in it.
        """
        end = min(request.kv.num_computed_tokens, request.num_known_tokens)
        index, num_tokens = divmod(end, self.block_size)
        if not self.are_shared or num_tokens < self._fewest_in_tail:
            return None
        self.extend(request)
        parent = self._parent(request, index)
        self._tails[parent] = num_tokens
        self._tails.move_to_end(parent)
        if len(self._tails) > _MOST_TAILS:
            self._tails.popitem(last=False)
        return block_hash(parent, request.token_ids[index * self.block_size : end])

    def _parent(self, request: Request, index: int) -> bytes:
        """Hash of all that precedes the request's block `index`."""
        if index:
            return request.kv.block_hashes[index - 1]
        own = f"{request.request_id}#{request.index}".encode()
        return root_hash(self.fingerprint, request.salt if self.are_shared else own)
