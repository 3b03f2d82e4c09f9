"""The device blocks that each sequence has, and how many more it needs."""

from collections.abc import Iterable, Sequence

from hotset.cost.cache_spec import KEYS_ALONE
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool
from hotset.sequence import Kind, Request

_HOT_GROWTH = 8  # tokens that a hot request is to have room for, by those of others


class BlockTables:
    """Takes blocks from the pool for sequences and gives them back; knows no keys and no tiers.

    Args:
        pool: the blocks.
        block_size: tokens of a block.
        index_blocks: for the index keys of tokens whose rows are in host memory; None where no
            request can leave rows there.
    """

    def __init__(
        self, pool: BlockPool, block_size: int, index_blocks: IndexBlocks | None = None
    ) -> None:
        self.pool, self.block_size = pool, block_size
        self.index_blocks = index_blocks
        self._copies: list[tuple[int, int]] = []

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free ones, and cached ones that no request holds."""
        return self.pool.num_available

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_short(self, requests: Iterable[Request], more_tokens: int) -> int:
        """Blocks that requests lack for their tokens and `more_tokens` more each, if allowed."""
        size, blocks = self.block_size, 0
        for request in requests:
            num_tokens = len(request.token_ids) + more_tokens
            if num_tokens > request.max_total_tokens:
                num_tokens = request.max_total_tokens
            blocks -= -num_tokens // size + len(request.kv.block_table)
        return blocks

    def spare_for(self, newcomer: Request, running: Sequence[Request], more_tokens: int) -> int:
        """Blocks to be left when `newcomer` is let in, so that it and all that run can grow.

        Each by `more_tokens`, or to its end; what those give back that end before is counted. Hot
        requests by `_HOT_GROWTH` times as many, as those can give back no more for others.
        """
        kept = 0
        if self.index_blocks is not None:
            hot = [one for one in running if one.kv.slot_blocks]
            running = [one for one in running if not one.kv.slot_blocks]
            kept = sum(self._hot_growth(one, _HOT_GROWTH * more_tokens) for one in hot)
        own = self.num_short([newcomer], more_tokens) - self.num_short([newcomer], 0)
        all_grown = self.num_short(running, more_tokens) + own
        return kept + min(all_grown, self._peak_short(newcomer, running, more_tokens))

    def _hot_growth(self, request: Request, more_tokens: int) -> int:
        """Blocks that a hot request needs to grow: for index keys, and one that is copied down."""
        assert self.index_blocks is not None
        num_tokens = min(request.num_tokens + more_tokens, request.max_total_tokens)
        num_index_blocks = self.num_blocks_for(num_tokens) - request.kv.num_index_blocks
        return 1 - (-num_index_blocks // self.index_blocks.fewest_per_block)

    def _peak_short(self, newcomer: Request, running: Sequence[Request], more_tokens: int) -> int:
        """The most blocks that running requests and `newcomer` lack while each grows.

        By `more_tokens`, or to their ends, where decodes give back the blocks that they alone hold;
        what `newcomer` has so far is not counted. Source: Gong et al., "Past-Future Scheduler for
        LLM Serving under SLA Guarantees" (ASPLOS 2025), section 3, for known numbers of tokens.
        """
        size = self.block_size

        def ahead_of(request: Request) -> int:
            return min(more_tokens, request.max_total_tokens - request.num_tokens)

        # In tokens. Those that do not decode yet are taken to grow at once, and to stay.
        lacking = (newcomer.num_tokens - 1) % size + ahead_of(newcomer)
        given_back = 0
        decoding = []
        for request in running:
            num_blocks = len(request.kv.block_table)
            ahead = ahead_of(request)
            # Of its last block it may use any part.
            lacks = request.num_tokens + size - 1 - size * num_blocks
            if request.kind is Kind.PROMPT:
                lacking += lacks + ahead
                continue
            gives = size * (num_blocks - request.kv.num_shared_blocks)
            given_back += gives
            decoding.append((ahead, lacks, gives))
        most = lacking
        decoding.sort(reverse=True)
        for count, (ahead, lacks, gives) in enumerate(decoding, 1):
            # Just before this one ends, those before it in the list are still there.
            lacking += lacks
            given_back -= gives
            most = max(most, lacking + count * ahead - given_back)
        return self.num_blocks_for(most)

    def num_over(self, running: Sequence[Request], more_tokens: int) -> tuple[int, int]:
        """Blocks that running requests will lack in the pool after `more_tokens` more each.

        Also returns those of the largest of them.
        """
        sizes = [one.kv.num_blocks + self.num_short([one], more_tokens) for one in running]
        return max(0, sum(sizes) - self.pool.num_usable), max(sizes)

    def num_runnable_tokens(self, request: Request) -> int:
        """Tokens the request can compute before it meets content that is there or arriving."""
        limit, kv = request.num_tokens, request.kv
        if kv.awaited is not None:
            return 0
        if kv.arriving or kv.arrived:
            limit = min(limit, min((*kv.arriving, *kv.arrived)) * self.block_size)
        return limit - kv.num_computed_tokens

    def num_lacking_tokens(self, request: Request) -> int:
        """Tokens the request has to compute, about: what is there or arriving counts as blocks."""
        num_there = len(request.kv.arriving) + len(request.kv.arrived)
        return max(1, request.num_uncomputed_tokens - num_there * self.block_size)

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Make room to write `num_tokens` more; False (nothing changed) if there is none.

        A block that others hold or can find is replaced by a copy before it is written to.
        """
        table, pool = request.kv.block_table, self.pool
        end = self.num_blocks_for(request.kv.num_computed_tokens + num_tokens)
        first = request.kv.num_computed_tokens // self.block_size
        if first + 1 == end == len(table) and not pool.is_shared(table[first]):
            return True  # within its last block, as most decodes are
        to_copy = [i for i in range(first, min(end, len(table))) if pool.is_shared(table[i])]
        num_new = max(0, end - len(table))
        if len(to_copy) + num_new > pool.num_available:
            return False
        for i, block in zip(to_copy, pool.allocate(len(to_copy)), strict=True):
            self._copies.append((table[i], block))
            pool.release(table[i])
            table[i] = block
        table.extend(pool.allocate(num_new))
        return True

    def is_whole(self, block: int) -> bool:
        """Whether a block of a table is of the pool, not an index block."""
        return not block & KEYS_ALONE

    def can_keep_index_keys(self, request: Request, index: int) -> bool:
        """Whether there is an index block to be had in place of a block."""
        assert self.index_blocks is not None
        block = request.kv.block_table[index]
        is_own = block in request.kv.slot_blocks or self.pool.ref_count(block) == 1
        return is_own or self.index_blocks.can_take

    def keep_index_keys(self, request: Request, index: int) -> None:
        """Give a request's block back to the pool, and have an index block in its place.

        One whose rows serve as the request's slots keeps its index keys where they are.
        """
        assert self.index_blocks is not None
        table = request.kv.block_table
        block = table[index]
        self.pool.release(block)
        if block in request.kv.slot_blocks:
            table[index] = self.index_blocks.keep_own(block)
        else:  # it may be carved itself: copies read all their sources first
            table[index] = self.index_blocks.take()
            self._copies.append((block, table[index]))
        request.kv.num_index_blocks += 1

    def take_copies(self) -> list[tuple[int, int]]:
        """Block copies (from, to) within the device that must run before the next step.

        To an index block index keys are copied alone. Their order counts.
        """
        copies, self._copies = self._copies, []
        return copies

    def fork(self, parent: Request, child: Request) -> int:
        """Let `child` share the blocks of the prompt it has in common with `parent`.

        All but the last token of the prompt counts as computed, so that the child's first step
        yields logits of its own; the block it writes to is copied then (`reserve`). Returns the
        tokens that are shared.
        """
        num_shared, kv = child.prompt_len - 1, child.kv
        kv.block_table = parent.kv.block_table[: self.num_blocks_for(num_shared)]
        kv.num_shared_blocks = len(kv.block_table)
        kv.block_hashes = parent.kv.block_hashes[: num_shared // self.block_size]
        kv.num_computed_tokens = kv.high_water_tokens = num_shared
        kv.num_cached_tokens = parent.kv.num_cached_tokens
        for block in kv.block_table:
            self.pool.hold(block)
        return num_shared

    def give_back(self, request: Request) -> None:
        """Take all blocks from a request."""
        for block in reversed(request.kv.block_table):  # the tail is evicted before the head
            if self.is_whole(block):
                self.pool.release(block)
            elif self.index_blocks is not None:
                self.index_blocks.give_back(block)
        request.kv.block_table = []
        request.kv.num_index_blocks = request.kv.num_computed_tokens = 0
