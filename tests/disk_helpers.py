"""What the tests of the disk tier share: a small store, aligned buffers, waiting for the end."""

import mmap
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import DiskTier, capacity_bytes_for
from hotset.memory.tier import Answer, Completion, CompletionStatus

OK, FAILED, LATE = CompletionStatus.OK, CompletionStatus.FAILED, CompletionStatus.LATE
MODEL = {"model": "tiny", "weights": "ab12", "dtype": "float32", "block_size": "16"}
PAYLOAD = 8192


@contextmanager
def opened(folder: Path, num_payloads: int = 8, **options: Any) -> Iterator[DiskTier]:
    payload_bytes = options.get("payload_bytes", PAYLOAD)
    settings = {
        "payload_bytes": payload_bytes,
        "capacity_bytes": capacity_bytes_for(num_payloads, payload_bytes),
        "fingerprint": MODEL,
        "read_deadline_s": 60.0,
        "write_queue_s": 60.0,
    }
    tier = DiskTier(folder, **{**settings, **options})
    try:
        yield tier
    finally:
        tier.close()


def buffer(size: int = PAYLOAD) -> memoryview:
    """A page-aligned buffer of whole pages."""
    return memoryview(mmap.mmap(-1, slot_bytes_for(size)))


def filled(seed: int, size: int = PAYLOAD) -> memoryview:
    view = buffer(size)
    view[:] = random.Random(seed).randbytes(view.nbytes)
    return view


def finish(tier: DiskTier, transfer_id: int | None) -> Completion:
    """Poll until a transfer has ended; all others must be reported by then or later."""
    assert transfer_id is not None
    while True:
        for completion in tier.poll():
            if completion.transfer_id == transfer_id and completion.status is not LATE:
                return completion
        tier.wait(10.0)


def has(tier: DiskTier, key: bytes) -> bool:
    [answer] = tier.lookup([key])
    return answer is Answer.HIT


def write(tier: DiskTier, key: bytes, seed: int) -> CompletionStatus:
    return finish(tier, tier.submit_write(key, filled(seed, tier.payload_bytes))).status


def read(tier: DiskTier, key: bytes) -> bytes | None:
    into = buffer(tier.payload_bytes)
    completion = finish(tier, tier.submit_read(key, into))
    assert completion.key == key
    return bytes(into) if completion.status is OK else None


def content(seed: int, size: int = PAYLOAD) -> bytes:
    return bytes(filled(seed, size))


class Gate:
    """Holds a tier's transfers of one kind until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        real = getattr(os, call)

        def gated(*args: Any) -> int:
            self.entered.set()
            self.open.wait()
            return int(real(*args))

        monkeypatch.setattr(os, call, gated)
