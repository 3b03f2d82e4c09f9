"""A trace as stages: rows of operations, products, attention; and which memory each buffer has."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

from hotset.executor.rows.nodes import Attend, Buffer, Compute, Embed, Product, Trace, View
from hotset.executor.rows.shapes import RowShape
from hotset.executor.rows.trace import NotTraceable

_MOST_SCRATCH = 16_384  # float32 numbers of a thread's stack


@dataclass(frozen=True, slots=True)
class Rows:
    """A function for rows, and the buffers it is given, in the order of their addresses."""

    shape: RowShape
    given: tuple[int, ...]


Stage: TypeAlias = Rows | Product | Attend
_Node: TypeAlias = Compute | Product | Attend
_Piece: TypeAlias = list[_Node]


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory that buffers take in turn.

    Attributes:
        width: float32 numbers of a row.
        is_of_tail: whether its rows are those whose logits are wanted.
    """

    width: int
    is_of_tail: bool


@dataclass(frozen=True, slots=True)
class Stages:
    """What a step does.

    Attributes:
        embeds: what comes first.
        body: for all tokens.
        tail: for those whose logits are wanted; begins with `tail_input`, which is copied.
        gathered: buffer whose rows are copied, to `tail_input`.
        constants: address of each buffer that is the same for all rows.
        memories: each that is needed.
        place: which of `memories` each other buffer has while it is in use.
    """

    embeds: list[Embed]
    body: list[Stage]
    tail: list[Stage]
    gathered: int
    tail_input: int
    constants: dict[int, int]
    memories: list[Memory]
    place: dict[int, int]


def make_stages(trace: Trace) -> Stages:
    """Stages of a trace; raises `NotTraceable` where its end is not of rows alone."""
    embeds = [node for node in trace.nodes if isinstance(node, Embed)]
    body, product, tail = _split([n for n in trace.nodes if not isinstance(n, Embed)])
    tail_input = len(trace.buffers)
    buffers = [*trace.buffers, Buffer(trace.buffers[product.x].width)]
    pieces: list[_Piece] = [*body, [replace(product, x=tail_input)], *tail]
    given = {embed.out for embed in embeds}
    if trace.positions is not None:
        given.add(trace.positions)
    asked = [given, *({*_buffers_of(piece)} for piece in pieces), {trace.logits.buffer}]
    asked[len(body)].add(product.x)
    lives = _lives(buffers, asked)
    if any(first <= len(body) < last for first, last in lives.values()):
        raise NotTraceable("what its logits are made of is more than one product's input")
    shared = _shared(pieces, buffers, lives, {*given, product.x, trace.logits.buffer})
    stages = [_stage(piece, buffers, shared) for piece in pieces]
    place, memories = _assign(buffers, shared, lives, len(body))
    constants = {
        number: buffer.constant.untyped_storage().data_ptr()
        for number, buffer in enumerate(buffers)
        if buffer.constant is not None
    }
    of_body, of_tail = stages[: len(body)], stages[len(body) :]
    return Stages(embeds, of_body, of_tail, product.x, tail_input, constants, memories, place)


def _split(nodes: list[_Node]) -> tuple[list[_Piece], Product, list[_Piece]]:
    """What is before the product that makes logits, this, and what is behind it."""
    products = [number for number, node in enumerate(nodes) if isinstance(node, Product)]
    last = products[-1] if products else 0
    product, tail = nodes[last], nodes[last + 1 :]
    if not isinstance(product, Product) or any(isinstance(node, Attend) for node in tail):
        raise NotTraceable("its logits are no product with a narrow weight")
    return list(_pieces(nodes[:last])), product, list(_pieces(tail))


def _pieces(nodes: Iterable[_Node]) -> Iterator[_Piece]:
    """Operations that follow one another as one piece, other nodes each as one."""
    for is_compute, group in groupby(nodes, lambda node: isinstance(node, Compute)):
        if is_compute:
            yield list(group)
        else:
            yield from ([node] for node in group)


def _buffers_of(piece: _Piece) -> Iterator[int]:
    for node in piece:
        if isinstance(node, Product):
            yield from (node.x, node.out)
        elif isinstance(node, Attend):
            yield from (node.query.buffer, node.key.buffer, node.value.buffer, node.out)
        else:
            yield node.out.buffer
            yield from (view.buffer for view in node.inputs if isinstance(view, View))


def _lives(buffers: list[Buffer], asked: list[set[int]]) -> dict[int, tuple[int, int]]:
    """Of each buffer that a step computes, the first and the last of `asked` that has it."""
    lives: dict[int, tuple[int, int]] = {}
    for number, used in enumerate(asked):
        for buffer in used:
            if buffers[buffer].constant is None:
                lives[buffer] = lives.get(buffer, (number, number))[0], number
    return lives


def _shared(
    pieces: list[_Piece],
    buffers: list[Buffer],
    lives: dict[int, tuple[int, int]],
    outside: set[int],
) -> set[int]:
    """Buffers that are in memory of the step, as not one function alone uses them.

    Large ones too: others are on the stack.
    """
    shared = outside | {buffer for buffer, (first, last) in lives.items() if first != last}
    for piece in pieces:
        used = dict.fromkeys(buffer for buffer in _buffers_of(piece) if buffer in lives)
        room = _MOST_SCRATCH if isinstance(piece[0], Compute) else 0
        for buffer in used:
            if buffer not in shared and buffers[buffer].width > room:
                shared.add(buffer)
            elif buffer not in shared:
                room -= buffers[buffer].width
    return shared


def _stage(piece: _Piece, buffers: list[Buffer], shared: set[int]) -> Stage:
    if not isinstance(piece[0], Compute):
        return piece[0]
    used = dict.fromkeys(_buffers_of(piece))
    given = [b for b in used if b in shared or buffers[b].constant is not None]
    scratch = [b for b in used if b not in given]
    number = {buffer: i for i, buffer in enumerate([*given, *scratch])}

    def local(view: View) -> View:
        return replace(view, buffer=number[view.buffer])

    computes = tuple(
        Compute(
            node.operation,
            local(node.out),
            tuple(local(each) if isinstance(each, View) else each for each in node.inputs),
        )
        for node in piece
        if isinstance(node, Compute)
    )
    row_bytes = tuple(4 * buffers[b].width if buffers[b].constant is None else 0 for b in given)
    widths = tuple(buffers[b].width for b in scratch)
    return Rows(RowShape(computes, row_bytes, widths), tuple(given))


def _assign(
    buffers: list[Buffer],
    shared: set[int],
    lives: dict[int, tuple[int, int]],
    last_of_body: int,
) -> tuple[dict[int, int], list[Memory]]:
    """Memory of each shared buffer, which another one takes once it was used for the last time."""
    place: dict[int, int] = {}
    memories: list[Memory] = []
    last_use: list[int] = []
    for buffer in sorted(shared, key=lambda b: lives[b]):
        first, last = lives[buffer]
        wanted = Memory(buffers[buffer].width, first > last_of_body)
        fitting = (i for i, m in enumerate(memories) if m == wanted and last_use[i] < first)
        number = next(fitting, len(memories))
        if number == len(memories):
            memories.append(wanted)
            last_use.append(last)
        place[buffer], last_use[number] = number, last
    return place, memories
