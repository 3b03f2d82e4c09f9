"""vLLM's events of KV blocks, read as its subscribers read them."""

import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from servers import build

from hotset.engine.completion import gather
from hotset.engine.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    KvEvents,
)
from hotset.engine.service import EngineService
from hotset.errors import ConfigError
from hotset.kv.block_hash import block_hash, root_hash
from hotset.memory.journal import JournalPart
from hotset.options import Options
from hotset.request import SamplingParams

GPU, CPU, DISK = 0, 1, 2  # tiers
THERE, GONE = 1, 0


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Feed:
    """Events of parts whose changes are `(key, tier, there)`; blocks have two tokens."""

    def __init__(self, *chains: list[int], salt: bytes = b"") -> None:
        self.events, self.first = KvEvents(2), 0
        for chain in chains:
            for i, number in enumerate(chain):
                parent = key(chain[i - 1]) if i else None
                self.events.name(key(number), parent, [number, 100 + number], salt)

    def take(self, *changes: tuple[int, int, int], lost: int = 0, **part: Any) -> list[Event]:
        rows = b"".join(key(k) + bytes([2 * tier + there]) for k, tier, there in changes)
        self.first += lost
        events, is_lost = self.events.take(JournalPart(self.first, rows, **part))
        self.first += len(changes)
        assert is_lost is bool(lost)
        return events


def stored(numbers: list[int], parent: int | None, medium: str = "GPU", **rest: Any) -> BlockStored:
    tokens = [token for number in numbers for token in (number, 100 + number)]
    before = None if parent is None else key(parent)
    return BlockStored([*map(key, numbers)], before, tokens, 2, None, medium, None, **rest)


def test_blocks_that_follow_one_another_are_one_event() -> None:
    feed = Feed([1, 2, 3], [1, 2, 4])
    assert feed.take((1, GPU, THERE), (2, GPU, THERE), (3, GPU, THERE), (4, GPU, THERE)) == [
        AllBlocksCleared(),
        stored([1, 2, 3], None),
        stored([4], 2),
    ]
    assert feed.take((1, CPU, THERE), (2, CPU, THERE), (3, DISK, THERE), (3, GPU, GONE)) == [
        stored([1, 2], None, "CPU"),
        stored([3], 2, "STORAGE"),
        BlockRemoved([key(3)], "GPU"),
    ]
    assert feed.take((4, GPU, GONE), (2, GPU, GONE), (2, CPU, GONE)) == [
        BlockRemoved([key(4), key(2)], "GPU"),
        BlockRemoved([key(2)], "CPU"),
    ]
    assert feed.take((2, GPU, THERE)) == [stored([2], 1)]  # its tokens are still known


def test_what_has_no_tokens_or_is_told_already_is_not_told() -> None:
    feed = Feed([1], salt=b"\x0a\xff")
    assert feed.take((9, GPU, THERE), (1, 3, THERE)) == [AllBlocksCleared()]
    assert feed.take((9, GPU, GONE)) == []
    salted = stored([1], None, extra_keys=[["0aff"]])
    assert feed.take((1, GPU, THERE), (1, GPU, THERE)) == [salted]
    content = key(1) + bytes([THERE])
    assert feed.take(content=content, begins=True, ends=True) == []  # another follower's snapshot


def test_after_lost_changes_all_is_told_anew() -> None:
    feed = Feed([1, 2, 3])
    feed.take((1, GPU, THERE), (2, GPU, THERE), (3, GPU, THERE))
    assert feed.take(lost=4) == [AllBlocksCleared()]
    content = b"".join(key(number) + bytes([THERE]) for number in (1, 3))
    assert feed.take(content=content, begins=True, ends=True) == [stored([1], None), stored([3], 2)]
    assert feed.take((2, GPU, GONE)) == []
    assert feed.take((2, GPU, THERE)) == [stored([2], 1)]


def test_batches_are_as_vllm_encodes_them() -> None:
    """An array, whose events are maps with a type; fields with a default of None are left out."""
    events = [stored([1], None), BlockRemoved([key(1)], "CPU"), AllBlocksCleared()]
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(EventBatch(1.5, events, 0)))
    assert raw == [
        1.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": [key(1)],
                "parent_block_hash": None,
                "token_ids": [1, 101],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            },
            {"type": "BlockRemoved", "block_hashes": [key(1)], "medium": "CPU"},
            {"type": "AllBlocksCleared"},
        ],
        0,
    ]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_subscriber_hears_of_the_blocks_of_a_prompt() -> None:
    zmq = pytest.importorskip("zmq", reason="pyzmq is missing (extra `events`)")
    address = f"tcp://127.0.0.1:{free_port()}"
    options = Options.of(hot_gib=0.01, kv_events=address, kv_events_topic="kv@a@tiny")
    service = EngineService(options, build=build)
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(address)
        subscriber.subscribe("kv@")
        numbers, prompts, told = [], [], list[BlockStored]()
        for attempt in range(400):  # what is sent before a subscriber is there is lost
            prompt = [5 + attempt // 50, *(5 + attempt % 50 for _ in range(39))]
            prompts.append(prompt)
            gather(service.submit(prompt, SamplingParams(max_tokens=1)), 1)
            if subscriber.poll(50):
                topic, number, payload = subscriber.recv_multipart()
                batch = msgspec.msgpack.decode(payload, type=EventBatch)
                numbers.append(int.from_bytes(number, "big"))
                told += [one for one in batch.events if isinstance(one, BlockStored)]
                if len(told) > 1:
                    break
        service.close()
    assert topic == b"kv@a@tiny" and numbers == [*range(numbers[0], numbers[-1] + 1)]
    event = told[-1]
    [prompt] = [one for one in prompts if one[:32] == event.token_ids]
    assert event.block_size == 16
    assert abs(batch.ts - time.time()) < 3600 and batch.data_parallel_rank == 0
    first = block_hash(root_hash(service._host.info.fingerprint, b""), prompt[:16])
    assert event.block_hashes == [first, block_hash(first, prompt[16:32])]
    assert event.parent_block_hash is None and event.medium == "GPU"


def test_an_address_that_cannot_be_bound_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("zmq", reason="pyzmq is missing (extra `events`)")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"kv_events is tcp://127.*cannot be bound"):
            EngineService(Options.of(hot_gib=0.01, kv_events=address), build=build)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_events": "127.0.0.1:5557"}, "expected tcp://HOST:PORT or ipc://PATH"),
        ({"kv_events_topic": "kv@"}, "does nothing without events; give kv_events"),
    ],
)
def test_options_of_events_that_make_no_sense_are_refused(
    given: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Options.of(**given)
