"""What is known of the tokens that a request begins with: on the device, and in slower tiers."""

from collections.abc import Sequence

from hotset.kv.pool import BlockPool
from hotset.kv.prefix import Prefixes
from hotset.kv.transfers import BlockTransfers, Known
from hotset.memory.tier import Answer
from hotset.sequence import Request, Tail

# Keys of a prefix that tiers are asked for at first; twice as many each time that all are there.
_KEYS_AT_ONCE = 32


class PrefixSearch:
    """Looks for the leading blocks of requests, and holds those that the device has or will have.

    Args:
        pool: the device's blocks.
        prefixes: names blocks.
        transfers: knows what tiers have.
    """

    def __init__(self, pool: BlockPool, prefixes: Prefixes, transfers: BlockTransfers) -> None:
        self._pool, self._prefixes, self._transfers = pool, prefixes, transfers

    def find(self, request: Request) -> tuple[list[Known], bool]:
        """What is known somewhere of the request's leading tokens, block by block.

        At least one token is always left to compute: its logits are what the step is for. Also
        returns whether a tier cannot say yet what it has of the tokens after these.
        """
        known: list[Known] = []
        keys = self._prefixes.findable(request)
        num_asked = _KEYS_AT_ONCE
        while len(known) < len(keys):
            asked = keys[len(known) : len(known) + num_asked]
            num_left = (len(keys) - len(known)) * self._prefixes.block_size
            answers = self._transfers.lookup(asked, num_left)
            for key, found in zip(asked, answers, strict=True):
                if found.answer is not Answer.HIT:
                    break
                known.append(Known(key, found.tier, self._prefixes.block_size))
            else:
                num_asked *= 2
                continue
            if found.answer is Answer.PENDING:
                return known, True
            break
        tail = request.kv.resume or self._unused_tail(request, len(known))
        if tail is None or tail.index != len(known):
            return known, False
        [found] = self._transfers.lookup([tail.key], tail.num_tokens)
        if found.answer is Answer.HIT:
            known.append(Known(tail.key, found.tier, tail.num_tokens))
        return known, found.answer is Answer.PENDING

    def _unused_tail(self, request: Request, index: int) -> Tail | None:
        """What a request that has ended left where block `index` begins.

        None where another request has it: both would write to it, each to a copy of its own.
        """
        tail = self._prefixes.tail_at(request, index)
        if tail is None or self._transfers.loading_block(tail.key) is not None:
            return None
        block = self._pool.lookup(tail.key)
        is_unused = block is None or self._transfers.is_held_by_spills_alone(block)
        return tail if is_unused else None

    def tail_block(self, known: Sequence[Known]) -> int | None:
        """The block of a last, partial part that the device has: the request will write to it."""
        if not known or known[-1].tier is not None:
            return None
        is_full = known[-1].num_tokens == self._prefixes.block_size
        return None if is_full else self._pool.lookup(known[-1].key)

    def num_copied(self, known: Sequence[Known]) -> int:
        """Blocks of these, not held yet, that the request goes on in a copy of.

        The last, partial one is that while its copy down reads it.
        """
        tail = self.tail_block(known)
        return 0 if tail is None else min(1, self._pool.ref_count(tail))

    def hold(self, part: Known) -> int | None:
        """Hold the block that has this content or will have; None where there is none yet."""
        if part.tier is not None:
            block = self._transfers.loading_block(part.key)
            if block is not None:
                self._pool.hold(block)
            return block
        block = self._pool.acquire(part.key)
        assert block is not None, "a block vanished between lookup and acquire"
        return block
