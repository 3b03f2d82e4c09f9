"""Events of KV blocks as vLLM publishes them, for routers that read those. Imports no torch.

Source: vLLM, `vllm/distributed/kv_events.py`, as of 0.26: msgpack of an array `[ts, events, rank]`
whose events are maps with a `type`, in ZMQ messages of three parts: topic, number, batch.
"""

import logging
import queue
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from hotset.errors import ConfigError
from hotset.memory.journal import TIERS, JournalPart, rows_of

_log = logging.getLogger(__name__)

MEDIUMS = {"device": "GPU", "host": "CPU", "disk": "STORAGE"}
"""What vLLM calls our tiers; blocks in others are not told of."""
_MOST_FRESH = 2**16  # blocks that were named and are in no tier
_MOST_WAITING = 1024  # batches
_HIGH_WATER = 100_000  # messages that wait for a slow subscriber
_CLOSE_S = 1.0


class BlockStored(msgspec.Struct, omit_defaults=True, tag=True):
    """Blocks, each the next one of the one before it, are in a medium.

    Attributes:
        parent_block_hash: of what precedes the first of them; None where nothing does.
        token_ids: of all of them, in order.
        lora_id, lora_name: there are none here.
        extra_keys: per block, what its hash depends on beside tokens; the salt, in hexadecimal
            digits, of the first block of a prompt that has one.
    """

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[str] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, omit_defaults=True, tag=True):
    """Blocks are no longer in a medium."""

    block_hashes: list[bytes]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, omit_defaults=True, tag=True):
    """What was told before is void."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """The events of one step; `ts` is in seconds of Unix time."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


@dataclass(eq=False, slots=True)
class _Block:
    """A block whose tokens are known, and the tiers that have it, one bit each."""

    parent: bytes | None
    token_ids: "array[int]"
    salt: bytes
    tiers: int = 0


@dataclass(eq=False, slots=True)
class KvEvents:
    """Makes events of a journal's parts and of the tokens that blocks are named by.

    Partial blocks, and those that were on disk before a start until a request names them again,
    have no tokens here and are not told of.

    Args:
        block_size: tokens of a block.
    """

    block_size: int
    _told: dict[bytes, _Block] = field(default_factory=dict)
    _fresh: OrderedDict[bytes, _Block] = field(default_factory=OrderedDict)  # in no tier
    _next: int | None = None
    _is_made_anew: bool = False

    def name(self, key: bytes, parent: bytes | None, token_ids: Sequence[int], salt: bytes) -> None:
        """A block with these tokens, after `parent`, has this key."""
        if key in self._told:
            return
        if key in self._fresh:
            self._fresh.move_to_end(key)
            return
        self._keep(key, _Block(parent, array("i", token_ids), salt if parent is None else b""))

    def take(self, part: JournalPart) -> tuple[list[Event], bool]:
        """Events of a part; and whether changes were lost, so that a snapshot has to come."""
        events: list[Event] = []
        is_lost = self._next is not None and part.first != self._next
        if is_lost or self._next is None:
            events.append(AllBlocksCleared())
            self._is_made_anew = is_lost
            for block in self._told.values():
                block.tiers = 0
        self._next = part.next
        for key, tier, is_there in rows_of(part.changes + (part.content or b"")):
            self._change(events, key, tier, is_there)
        if self._is_made_anew and part.ends:
            self._is_made_anew = False
            for key in [key for key, block in self._told.items() if not block.tiers]:
                self._keep(key, self._told.pop(key))
        return events, is_lost

    def _keep(self, key: bytes, block: _Block) -> None:
        self._fresh[key] = block
        if len(self._fresh) > _MOST_FRESH:
            self._fresh.popitem(last=False)

    def _change(self, events: list[Event], key: bytes, tier: int, is_there: bool) -> None:
        block, bit = self._told.get(key) or self._fresh.get(key), 1 << tier
        medium = MEDIUMS.get(TIERS[tier])
        if block is None or medium is None or bool(block.tiers & bit) is is_there:
            return
        block.tiers ^= bit
        if is_there:
            self._told[key] = block
            self._fresh.pop(key, None)
            self._add_stored(events, key, block, medium)
            return
        if not block.tiers:
            self._keep(key, self._told.pop(key))
        last = events[-1] if events else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes.append(key)
        else:
            events.append(BlockRemoved([key], medium))

    def _add_stored(self, events: list[Event], key: bytes, block: _Block, medium: str) -> None:
        """As a part of the event before where it goes on from there."""
        last = events[-1] if events else None
        if (
            isinstance(last, BlockStored)
            and last.medium == medium
            and last.block_hashes[-1] == block.parent
        ):
            last.block_hashes.append(key)
            last.token_ids += block.token_ids
            if last.extra_keys is not None:
                last.extra_keys.append(None)
            return
        events.append(
            BlockStored(
                [key],
                block.parent,
                block.token_ids.tolist(),
                self.block_size,
                lora_id=None,
                medium=medium,
                lora_name=None,
                extra_keys=[[block.salt.hex()]] if block.salt else None,
            )
        )


class EventPublisher:
    """Sends batches of events by ZMQ from a thread of its own.

    Where it cannot keep up batches are dropped, and their numbers are missing.

    Args:
        address: to bind, `tcp://HOST:PORT` or `ipc://PATH`. Each process that can connect
            sees the tokens of all prompts.
        topic: that subscribers choose by.

    Raises:
        ConfigError: pyzmq is missing, or the address cannot be bound.
    """

    def __init__(self, address: str, topic: str) -> None:
        try:
            import zmq
        except ImportError:
            raise ConfigError(
                "kv_events needs pyzmq; install it: pip install 'hotset[events]'"
            ) from None
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PUB)
        self._socket.set_hwm(_HIGH_WATER)
        self._socket.linger = 0
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            raise ConfigError(
                f"kv_events is {address}, which cannot be bound ({error}); "
                "expected tcp://HOST:PORT of a free port, such as tcp://127.0.0.1:5557"
            ) from None
        self._topic, self._number = topic.encode(), 0
        self._batches: queue.Queue[tuple[int, EventBatch] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._send_all, name="hotset-events", daemon=True)
        self._thread.start()

    def publish(self, events: Iterable[Event]) -> None:
        """Send a batch soon; never waits."""
        number, self._number = self._number, self._number + 1
        batch = EventBatch(time.time(), list(events), data_parallel_rank=0)
        try:
            self._batches.put_nowait((number, batch))
        except queue.Full:
            if number % _MOST_WAITING == 0:
                _log.warning("kv_events: batch %d is dropped: %d wait", number, _MOST_WAITING)

    def close(self) -> None:
        """Send what waits, for a second at most, and end."""
        try:
            self._batches.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return  # it is a daemon
        self._thread.join(_CLOSE_S)

    def _send_all(self) -> None:
        encode = msgspec.msgpack.Encoder().encode
        while (item := self._batches.get()) is not None:
            number, batch = item
            self._socket.send_multipart([self._topic, number.to_bytes(8, "big"), encode(batch)])
        self._socket.close()
        self._context.term()
