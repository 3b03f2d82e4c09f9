"""Attention of single queries over paged float32 KV on a CPU, in LLVM's language.

Keys and values are read where they lie: nothing is gathered, and no context is padded to another's.
A thread takes a sequence and a KV head at a time, from a common counter. For each block of tokens,
while the next one is prefetched, the scores of the query heads that share the KV head go into
vectors, 16 tokens at once; sums and the largest score so far are carried from block to block
(online softmax: Milakov and Gimelshein, arXiv:1805.02867).
"""

from llvmlite import ir

from hotset.attention.paged_decodes import ADDRESSES, ARGUMENTS, PagedShape
from hotset.linear.native_code import (
    ADDRESS,
    FLOAT,
    FLOATS,
    I64,
    LANES,
    LONGS,
    ZEROS,
    Value,
    Writer,
    number,
)

_MOST_QUERIES = 4  # query heads at once: what registers hold of their sums
_VECTOR_BYTES = 4 * LANES
_LINE_BYTES = 64  # that a processor fetches at once
_LOWEST = ir.Constant(FLOATS, [float("-inf")] * LANES)


def make_module(shape: PagedShape) -> ir.Module:
    """The function `attend`."""
    module = ir.Module("hotset")
    w = Writer(module, "attend", [ADDRESS])
    (arguments,) = w.arguments
    given = {
        name: w.load(ADDRESS if name in ADDRESSES else I64, arguments, 8 * place)
        for place, name in enumerate(ARGUMENTS)
        if name != "counter"
    }
    counter = w.at(arguments, 8 * ARGUMENTS.index("counter"))
    weights = w.b.alloca(ir.ArrayType(FLOAT, _MOST_QUERIES * shape.block_size))
    weights.align = 64
    # An address of any type: llvmlite keeps what memory on the stack was made for.
    weights = w.b.inttoptr(w.b.ptrtoint(weights, I64), ADDRESS)
    head, body, after = (w.function.append_basic_block() for _ in range(3))
    w.b.branch(head)
    w.b.position_at_end(head)
    unit = w.b.atomic_rmw("add", counter, number(1), "monotonic")
    num_units = w.b.mul(given["num_sequences"], given["num_heads"])
    w.b.cbranch(w.b.icmp_signed("<", unit, num_units), body, after)
    w.b.position_at_end(body)
    sequence, kv_head = w.b.udiv(unit, given["num_heads"]), w.b.urem(unit, given["num_heads"])
    for first in range(0, shape.group, _MOST_QUERIES):
        count = min(_MOST_QUERIES, shape.group - first)
        _Heads(w, shape, given, weights, sequence, kv_head, first, count).write()
    w.b.branch(head)
    w.b.position_at_end(after)
    w.end()
    return module


class _Heads:
    """Writes the attention of some query heads of one sequence that share a KV head."""

    def __init__(
        self,
        w: Writer,
        shape: PagedShape,
        given: dict[str, Value],
        weights: Value,
        sequence: Value,
        kv_head: Value,
        first: int,
        count: int,
    ) -> None:
        self.w, self.shape, self.given, self.weights = w, shape, given, weights
        self.count, self.kv_head = count, kv_head
        self.sequence = sequence
        self.head = w.b.add(w.times(kv_head, shape.group), number(first))
        self.row = self._of("rows")

    def _of(self, name: str) -> Value:
        """A number of the sequence."""
        return self.w.load(I64, self.given[name], self.w.times(self.sequence, 8))

    def _vectors(self, address: Value, dim: int) -> list[Value]:
        return [self.w.load(FLOATS, address, i * 4) for i in range(0, dim, LANES)]

    def write(self) -> None:
        """For each block the scores, their weights, and the values in proportion."""
        w, given = self.w, self.given
        queries = self._queries()
        start, end = self._of("starts"), self._of("ends")
        table = w.at(given["tables"], w.b.mul(self.sequence, w.times(given["width"], 8)))
        size, count = self.shape.block_size, self.count
        num_blocks = w.b.udiv(w.b.add(end, number(size - 1)), number(size))
        num_vectors = self.shape.value_dim // LANES
        carried = [_LOWEST] * count + [ZEROS] * (count + num_vectors * count)
        with w.loop(number(0), num_blocks, 1, carried) as (index, state):
            following = w.b.add(index, number(1))
            is_last = w.b.icmp_signed("==", following, num_blocks)
            here, ahead = (
                self._block(w.load(I64, table, w.times(place, 8)))
                for place in (index, w.b.select(is_last, index, following))
            )
            begin = w.times(index, size)
            first = self._at_least_zero(w.b.sub(start, begin))
            last = w.b.sub(end, begin)
            last = w.b.select(w.b.icmp_signed("<", last, number(size)), last, number(size))
            scores = self._score(queries, here[0], ahead[0], first, last)
            self._weigh(state, scores)
            self._add_values(state, here[1], ahead[1], first, last)
        self._store(state)

    def _queries(self) -> list[list[Value]]:
        """The vectors of each query, scaled."""
        w, given = self.w, self.given
        scaling = w.spread(w.load(FLOAT, given["scaling"]))
        at = w.at(
            given["query"],
            w.b.mul(self.row, given["query_row"]),
            w.b.mul(self.head, given["query_head"]),
        )
        addresses = [w.at(at, w.times(given["query_head"], i)) for i in range(self.count)]
        return [
            [w.b.fmul(vector, scaling) for vector in self._vectors(address, self.shape.key_dim)]
            for address in addresses
        ]

    def _block(self, block: Value) -> tuple[Value, Value]:
        """Where the keys and the values of a block are, of the KV head."""
        w, given = self.w, self.given
        offset = w.b.add(w.b.mul(block, given["block"]), w.b.mul(self.kv_head, given["head"]))
        return w.at(given["keys"], offset), w.at(given["values"], offset)

    def _at_least_zero(self, value: Value) -> Value:
        b = self.w.b
        return b.select(b.icmp_signed(">", value, number(0)), value, number(0))

    def _place(self, query: int, *more: Value | int) -> Value:
        """Where the weights of a query head are."""
        return self.w.at(self.weights, 4 * query * self.shape.block_size, *more)

    def _prefetch(self, address: Value, dim: int) -> None:
        for offset in range(0, 4 * dim, _LINE_BYTES):
            self.w.prefetch(address, offset)

    def _score(
        self, queries: list[list[Value]], keys: Value, ahead: Value, first: Value, last: Value
    ) -> list[list[Value]]:
        """Of each query, vectors of the scores of the block's tokens; -inf of those not seen.

        What is in the place of tokens that are not seen may be no numbers.
        """
        w = self.w
        found: list[list[Value]] = [[] for _ in queries]
        for begin in range(0, self.shape.block_size, LANES):
            tokens = ir.Constant(LONGS, list(range(begin, begin + LANES)))
            is_seen = w.b.and_(
                w.b.icmp_signed(">=", tokens, w.spread(first)),
                w.b.icmp_signed("<", tokens, w.spread(last)),
            )
            sums = self._sums(queries, keys, ahead, begin, LANES)
            for scores, own in zip(found, sums, strict=True):
                scores.append(w.b.select(is_seen, own, _LOWEST))
        return found

    def _sums(
        self, queries: list[list[Value]], keys: Value, ahead: Value, first: int, count: int
    ) -> list[Value]:
        """Of each query, its products with `count` keys: lane i has the sum of key i mod `count`.

        Two vectors become one by adding what is left and right in each, half as long every time.
        """
        w = self.w
        if count == 1:
            offset = w.times(self.given["token"], first)
            self._prefetch(w.at(ahead, offset), self.shape.key_dim)
            key = self._vectors(w.at(keys, offset), self.shape.key_dim)
            return [self._products(query, key) for query in queries]
        half = count // 2
        left = self._sums(queries, keys, ahead, first, half)
        right = self._sums(queries, keys, ahead, first + half, half)
        return [w.folded(*pair, half) for pair in zip(left, right, strict=True)]

    def _products(self, query: list[Value], key: list[Value]) -> Value:
        products = self.w.b.fmul(query[0], key[0])
        for one, other in zip(query[1:], key[1:], strict=True):
            products = self.w.fma(one, other, products)
        return products

    def _largest(self, vectors: list[Value]) -> Value:
        b, most = self.w.b, vectors[0]
        for vector in vectors[1:]:
            most = b.select(b.fcmp_ordered(">", vector, most), vector, most)
        largest = self.w.intrinsic(f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, [most])
        return self.w.spread(largest)

    def _weigh(self, state: list[Value], scores: list[list[Value]]) -> None:
        """Turn scores into weights, and bring what is carried to the new largest score."""
        w, count = self.w, self.count
        num_vectors = self.shape.value_dim // LANES
        for query, vectors in enumerate(scores):
            here, before = self._largest(vectors), state[query]
            most = w.b.select(w.b.fcmp_ordered(">", here, before), here, before)
            shrunk = w.exp(w.b.fsub(before, most))
            total = w.b.fmul(state[count + query], shrunk)
            for i, vector in enumerate(vectors):
                weights = w.exp(w.b.fsub(vector, most))
                w.store(weights, self._place(query, i * _VECTOR_BYTES))
                total = w.b.fadd(total, weights)
            state[query], state[count + query] = most, total
            for i in range(num_vectors):
                place = 2 * count + query * num_vectors + i
                state[place] = w.b.fmul(state[place], shrunk)

    def _add_values(
        self, state: list[Value], values: Value, ahead: Value, first: Value, last: Value
    ) -> None:
        w, count, dim = self.w, self.count, self.shape.value_dim
        with w.loop(first, last, 1, state[2 * count :]) as (token, sums):
            offset = w.b.mul(token, self.given["token"])
            self._prefetch(w.at(ahead, offset), dim)
            value = self._vectors(w.at(values, offset), dim)
            for query in range(count):
                weight = w.spread(w.load(FLOAT, self._place(query, w.times(token, 4))))
                for i, vector in enumerate(value):
                    place = query * (dim // LANES) + i
                    sums[place] = w.fma(weight, vector, sums[place])
        state[2 * count :] = sums

    def _store(self, state: list[Value]) -> None:
        w, count, given = self.w, self.count, self.given
        num_vectors = self.shape.value_dim // LANES
        at = w.at(
            given["out"],
            w.b.mul(self.row, given["out_row"]),
            w.b.mul(self.head, given["out_head"]),
        )
        for query in range(count):
            total = w.spread(w.sum(state[count + query]))
            to = w.at(at, w.times(given["out_head"], query))
            for i in range(num_vectors):
                sums = state[2 * count + query * num_vectors + i]
                w.store(w.b.fdiv(sums, total), to, i * _VECTOR_BYTES)
