"""Attention of single queries over paged float32 KV on a CPU, in LLVM's language.

Keys and values are read where they lie: nothing is gathered, and no context is padded to another's.
A thread takes a sequence and a KV head at a time, from a common counter. For each block of tokens
the scores of the query heads that share the KV head go into vectors; sums and the largest score so
far are carried from block to block (online softmax: Milakov and Gimelshein, arXiv:1805.02867).
"""

from llvmlite import ir

from hotset.attention.paged_decodes import ADDRESSES, ARGUMENTS, PagedShape
from hotset.linear.native_code import (
    ADDRESS,
    FLOAT,
    FLOATS,
    I32,
    I64,
    LANES,
    ZEROS,
    Value,
    Writer,
    number,
)

_MOST_QUERIES = 4  # query heads at once: what registers hold of their sums
_VECTOR_BYTES = 4 * LANES


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
    scores = w.b.alloca(ir.ArrayType(FLOAT, _MOST_QUERIES * shape.block_size))
    scores.align = 64
    # An address of any type: llvmlite keeps what memory on the stack was made for.
    scores = w.b.inttoptr(w.b.ptrtoint(scores, I64), ADDRESS)
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
        _Heads(w, shape, given, scores, sequence, kv_head, first, count).write()
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
        scores: Value,
        sequence: Value,
        kv_head: Value,
        first: int,
        count: int,
    ) -> None:
        self.w, self.shape, self.given, self.scores = w, shape, given, scores
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
        w, given, dim = self.w, self.given, self.shape.value_dim
        scaling = w.spread(w.load(FLOAT, given["scaling"]))
        at = w.at(
            given["query"],
            w.b.mul(self.row, given["query_row"]),
            w.b.mul(self.head, given["query_head"]),
        )
        queries = [
            [
                w.b.fmul(vector, scaling)
                for vector in self._vectors(
                    w.at(at, w.times(given["query_head"], i)), self.shape.key_dim
                )
            ]
            for i in range(self.count)
        ]
        start, end = self._of("starts"), self._of("ends")
        table = w.at(given["tables"], w.b.mul(self.sequence, w.times(given["width"], 8)))
        size = self.shape.block_size
        num_blocks = w.b.udiv(w.b.add(end, number(size - 1)), number(size))
        lowest, zero = ir.Constant(FLOAT, float("-inf")), ir.Constant(FLOAT, 0.0)
        num_vectors = dim // LANES
        carried = [lowest] * self.count + [zero] * self.count + [ZEROS] * (num_vectors * self.count)
        with w.loop(number(0), num_blocks, 1, carried) as (index, state):
            block = w.load(I64, table, w.times(index, 8))
            offset = w.b.add(w.b.mul(block, given["block"]), w.b.mul(self.kv_head, given["head"]))
            begin = w.times(index, size)
            first = self._at_least_zero(w.b.sub(start, begin))
            last = w.b.sub(end, begin)
            last = w.b.select(w.b.icmp_signed("<", last, number(size)), last, number(size))
            self._score(queries, w.at(given["keys"], offset), first, last)
            self._weigh(state)
            self._add_values(state, w.at(given["values"], offset), first, last)
        self._store(state)

    def _at_least_zero(self, value: Value) -> Value:
        b = self.w.b
        return b.select(b.icmp_signed(">", value, number(0)), value, number(0))

    def _place(self, query: int, *more: Value | int) -> Value:
        """Where the scores of a query head are."""
        return self.w.at(self.scores, 4 * query * self.shape.block_size, *more)

    def _score(self, queries: list[list[Value]], keys: Value, first: Value, last: Value) -> None:
        w, size = self.w, self.shape.block_size
        lowest = ir.Constant(FLOATS, [float("-inf")] * LANES)
        for query in range(self.count):
            for i in range(0, size, LANES):
                w.store(lowest, self._place(query, 4 * i))
        with w.loop(first, last, 1, []) as (token, _):
            key = self._vectors(w.at(keys, w.b.mul(token, self.given["token"])), self.shape.key_dim)
            for query, vectors in enumerate(queries):
                products = w.b.fmul(vectors[0], key[0])
                for one, other in zip(vectors[1:], key[1:], strict=True):
                    products = w.fma(one, other, products)
                score = w.sum(products)
                w.store(score, self._place(query, w.times(token, 4)))

    def _largest(self, vectors: list[Value]) -> Value:
        b, most = self.w.b, vectors[0]
        for vector in vectors[1:]:
            most = b.select(b.fcmp_ordered(">", vector, most), vector, most)
        return self.w.intrinsic(f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, [most])

    def _weigh(self, state: list[Value]) -> None:
        """Turn scores into weights, and bring what is carried to the new largest score."""
        w, count, size = self.w, self.count, self.shape.block_size
        num_vectors = self.shape.value_dim // LANES
        for query in range(count):
            vectors = [w.load(FLOATS, self._place(query, 4 * i)) for i in range(0, size, LANES)]
            here = self._largest(vectors)
            before = state[query]
            most = w.b.select(w.b.fcmp_ordered(">", here, before), here, before)
            spread = w.spread(most)
            shrunk = w.exp(w.b.fsub(w.spread(before), spread))
            factor = w.b.extract_element(shrunk, ir.Constant(I32, 0))
            total = w.b.fmul(state[count + query], factor)
            for i, vector in enumerate(vectors):
                weights = w.exp(w.b.fsub(vector, spread))
                w.store(weights, self._place(query, i * _VECTOR_BYTES))
                total = w.b.fadd(total, w.sum(weights))
            state[query], state[count + query] = most, total
            for i in range(num_vectors):
                place = 2 * count + query * num_vectors + i
                state[place] = w.b.fmul(state[place], shrunk)

    def _add_values(self, state: list[Value], values: Value, first: Value, last: Value) -> None:
        w, count = self.w, self.count
        num_vectors = self.shape.value_dim // LANES
        with w.loop(first, last, 1, state[2 * count :]) as (token, sums):
            value = self._vectors(
                w.at(values, w.b.mul(token, self.given["token"])), self.shape.value_dim
            )
            for query in range(count):
                weight = w.spread(w.load(FLOAT, self._place(query, w.times(token, 4))))
                for i, vector in enumerate(value):
                    place = query * num_vectors + i
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
            total = w.spread(state[count + query])
            to = w.at(at, w.times(given["out_head"], query))
            for i in range(num_vectors):
                sums = state[2 * count + query * num_vectors + i]
                w.store(w.b.fdiv(sums, total), to, i * _VECTOR_BYTES)
