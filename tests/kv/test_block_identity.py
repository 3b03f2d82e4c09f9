"""Every block that comes back to the device is the one that left it, bit for bit, under load."""

import hashlib
import random
from collections.abc import Iterator

import pytest
import torch
from tiny_models import make_model

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.memory.tier import EndedTransfer
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import FinishReason, SamplingParams
from hotset.units import GIB

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK_SIZE, HEAD_DIM = 4, 128
HOT_BLOCKS, HOST_BLOCKS = 120, 160


class Witness:
    """Notes the hash of each block as it is spilled, and compares it as it comes back."""

    def __init__(self, engine: Engine) -> None:
        assert engine.tiers is not None
        self.num_compared = 0
        self._pool = engine.executor.runner._arena.storage.view(torch.uint8)
        self._hashes: dict[bytes, bytes] = {}
        self._tiers = engine.tiers
        self._spill, self._poll = self._tiers.spill, self._tiers.poll
        self._tiers.spill = self.spill  # type: ignore[method-assign]
        self._tiers.poll = self.poll  # type: ignore[method-assign]

    def hash_of(self, block: int) -> bytes:
        return hashlib.blake2b(self._pool[block].cpu().numpy().tobytes()).digest()

    def spill(self, key: bytes, block: int, *, slowest: int | None = None) -> bool:
        is_spilled = self._spill(key, block, slowest=slowest)
        if is_spilled:  # the steps that filled it were submitted before: this waits for them
            self._hashes[key] = self.hash_of(block)
        return is_spilled

    def poll(self) -> list[EndedTransfer]:
        ended = self._poll()
        for transfer in ended:
            if transfer.is_fetch and transfer.ok:
                assert self.hash_of(transfer.block) == self._hashes[transfer.key]
                self.num_compared += 1
        return ended


@pytest.fixture(params=DEVICES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    dtype = torch.float32 if request.param == "cpu" else torch.bfloat16
    model = make_model("llama", head_dim=HEAD_DIM).to(request.param, dtype)
    config = model.config
    block_bytes = (
        2 * config.num_key_value_heads * HEAD_DIM * dtype.itemsize * config.num_hidden_layers
    ) * BLOCK_SIZE
    engine = build_engine(
        Options.of(
            hot_gib=(HOT_BLOCKS + 0.5) * block_bytes / GIB,
            host_gib=(HOST_BLOCKS + 0.5) * block_bytes / GIB,
            block_size=BLOCK_SIZE,
            max_model_len=96,
            max_num_seqs=256,
            max_num_batched_tokens=128,
            fetch_policy="fetch",
        ),
        LoadedModel(model, None, "llama", f"llama-{request.param}", (2,), 512),
        overlap=True,
    )
    # Each request is let in without room to grow, so that many are preempted.
    engine.scheduler.ahead_tokens = 1
    assert engine.sizes.device_blocks == HOT_BLOCKS
    assert engine.sizes.host_slots == HOST_BLOCKS
    yield engine
    engine.close()


@pytest.mark.filterwarnings("default")  # compiling says what it would rather have
def test_each_block_of_256_users_comes_back_as_it_left(engine: Engine) -> None:
    rng = random.Random(0)
    witness = Witness(engine)
    starts = [[rng.randrange(3, 256) for _ in range(40)] for _ in range(8)]
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    pending = [
        rng.choice(starts) + [rng.randrange(3, 256) for _ in range(rng.randint(1, 20))]
        for _ in range(256)
    ]
    open_ids: set[str] = set()
    reasons: list[FinishReason] = []
    is_host_full = False
    while pending or engine.has_work:
        for _ in range(min(len(pending), 40)):
            open_ids.add(engine.add_request(pending.pop(), params))
        for output in engine.step():
            if output.finish_reason is not None:
                reasons.append(output.finish_reason)
                open_ids.discard(output.request_id)
        if open_ids and rng.random() < 0.05:
            engine.abort(rng.choice(sorted(open_ids)))
        assert engine.tiers is not None
        is_host_full |= engine.tiers.host.num_used == HOST_BLOCKS
        engine.kv.check()

    assert len(reasons) == 256
    assert set(reasons) == {FinishReason.LENGTH, FinishReason.ABORT}
    # The run was what it is for.
    assert engine.metrics.preemptions > 0
    assert is_host_full
    assert witness.num_compared > 200
