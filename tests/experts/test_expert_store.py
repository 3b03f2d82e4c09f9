"""The store of experts on disk: it gives back what was written, or an error, and never hangs."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_helpers import Gate

from hotset.errors import ExpertReadError, TierError
from hotset.eviction import POLICIES
from hotset.experts.host import ExpertLayout
from hotset.experts.store import FILE, ExpertStore

NUM_LAYERS, NUM_EXPERTS = 3, 6
LAYOUT = ExpertLayout((8, 100), (100, 8), torch.float32)
PAYLOAD = 8192


@contextmanager
def opened(folder: Path, num_slots: int, **options: Any) -> Iterator[ExpertStore]:
    settings: dict[str, Any] = {"read_deadline_s": 60.0, **options}
    store = ExpertStore(
        folder,
        LAYOUT,
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        num_slots=num_slots,
        **settings,
    )
    try:
        yield store
    finally:
        store.close()


def fill(store: ExpertStore) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    layers = []
    for layer in range(NUM_LAYERS):
        up, down = torch.randn(NUM_EXPERTS, 8, 100), torch.randn(NUM_EXPERTS, 100, 8)
        store.write_layer(layer, up, down)
        layers.append((up, down))
        store.check()
    return layers


def is_same(store: ExpertStore, layer: int, expert: int, layers: Any) -> bool:
    with store.take(layer, expert) as payload:
        up, down = LAYOUT.views(payload.unsqueeze(0))
        expected_up, expected_down = layers[layer]
        return torch.equal(up[0], expected_up[expert]) and torch.equal(
            down[0], expected_down[expert]
        )


@pytest.mark.parametrize("num_slots", [2, 3, 5, 9, 14, 18])
def test_what_is_taken_is_what_was_written(tmp_path: Path, num_slots: int) -> None:
    with opened(tmp_path, num_slots) as store:
        layers = fill(store)
        assert store.host_bytes == num_slots * PAYLOAD
        generator = torch.Generator().manual_seed(num_slots)
        for _ in range(40):
            for layer in range(NUM_LAYERS):
                wanted = (torch.rand(NUM_EXPERTS, generator=generator) < 0.6).nonzero().flatten()
                experts: list[int] = wanted.tolist()
                ahead = [(layer + 1, e) for e in range(0, 6, 2)] if layer < 2 else []
                store.expect(layer, experts, ahead)
                for expert in experts:
                    assert is_same(store, layer, expert, layers)
                    store.check()
        counts = store.counts()
        assert counts.reads > 0 and counts.read_bytes == counts.reads * PAYLOAD
        assert (counts.host_hits > 0) == (num_slots > 2)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("eviction", POLICIES)
def test_what_is_taken_is_the_same_by_any_policy(tmp_path: Path, eviction: str) -> None:
    with opened(tmp_path, 9, eviction=eviction) as store:
        layers = fill(store)
        for step in range(12):
            for layer in range(NUM_LAYERS):
                experts = [(step * 5 + layer) % NUM_EXPERTS, (step * 3) % NUM_EXPERTS]
                store.expect(layer, experts)
                assert all(is_same(store, layer, expert, layers) for expert in experts)
                store.check()
        assert store.counts().host_hits > 0 and store.counts().reads > 0


def test_what_nobody_said_would_come_is_read_too(tmp_path: Path) -> None:
    with opened(tmp_path, 2) as store:
        layers = fill(store)
        store.expect(0, [0, 1], [(1, 2), (1, 3)])
        assert is_same(store, 2, 5, layers)  # while other reads hold both slots
        assert is_same(store, 0, 1, layers)
        store.check()


def test_a_layer_keeps_the_experts_of_its_share_and_the_stalest_goes(tmp_path: Path) -> None:
    with opened(tmp_path, 8) as store:  # two in transit, two of each layer
        layers = fill(store)

        def step(*experts: int) -> int:
            """How many came from disk."""
            before = store.counts().reads
            store.expect(0, experts)
            assert all(is_same(store, 0, expert, layers) for expert in experts)
            return store.counts().reads - before

        assert step(0, 1) == 0  # kept since they were written
        assert step(4) == 1  # in the place of 0, which came first
        assert step(1, 4) == 0
        assert step(4, 1, 5) == 1  # both that are kept are of this step: 5 is not
        assert step(4, 1) == 0
        assert step(0) == 1


def test_a_slot_is_not_written_while_its_copy_to_the_device_runs(tmp_path: Path) -> None:
    class Copy:
        def __init__(self) -> None:
            self.has_ended, self.was_waited_for = False, False

        def query(self) -> bool:
            return self.has_ended

        def synchronize(self) -> None:
            self.was_waited_for = self.has_ended = True

    with opened(tmp_path, 2) as store:
        layers = fill(store)
        copies = [Copy(), Copy()]
        store.expect(0, [0, 1, 2])
        slots = []
        for expert, copy in enumerate(copies):
            with store.take(0, expert, until=lambda copy=copy: copy) as payload:
                slots.append((payload, payload.clone()))
        # The third has no slot to be read into before a copy has ended.
        assert all(torch.equal(payload, before) for payload, before in slots)
        assert is_same(store, 0, 2, layers)
        assert copies[0].was_waited_for and not copies[1].was_waited_for
        assert torch.equal(slots[1][0], slots[1][1])


@pytest.mark.parametrize("kind", ["corrupt", "truncated", "io_error", "late"])
def test_a_read_that_fails_is_an_error_and_later_ones_are_not(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline_s = 0.2 if kind == "late" else 60.0
    with opened(tmp_path, 2, read_deadline_s=deadline_s) as store:
        layers = fill(store)
        path = tmp_path / FILE
        content = path.read_bytes()
        place = 1 * NUM_EXPERTS + 4
        gate = None
        with monkeypatch.context() as patch:
            if kind == "corrupt":
                with path.open("r+b") as file:
                    file.seek(place * PAYLOAD + 77)
                    file.write(bytes([content[place * PAYLOAD + 77] ^ 1]))
            elif kind == "truncated":
                os.truncate(path, place * PAYLOAD + 100)
            elif kind == "io_error":

                def broken(*args: Any) -> int:
                    raise OSError(5, "Input/output error")

                patch.setattr(os, "preadv", broken)
            else:
                gate = Gate(patch, "preadv")
            store.expect(1, [4, 5])
            with pytest.raises(ExpertReadError, match=f"expert 4 of layer 1.*expert_disk_{kind}"):
                is_same(store, 1, 4, layers)
            assert store.faults[f"expert_disk_{kind}"] >= 1
            if kind in ("corrupt", "truncated"):
                assert is_same(store, 0, 3, layers)  # others are not touched
        if gate is not None:
            gate.open.set()
        if kind in ("corrupt", "truncated"):
            path.write_bytes(content)
        store.expect(1, [4, 5])
        assert is_same(store, 1, 4, layers) and is_same(store, 1, 5, layers)
        store.check()


def test_a_stuck_disk_does_not_keep_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.experts.store._CLOSE_S", 0.1)
    with opened(tmp_path, 2, read_deadline_s=0.1) as store:
        layers = fill(store)
        gate = Gate(monkeypatch, "preadv")
        for _ in range(3):
            store.expect(0, [1, 2, 3])
            with pytest.raises(ExpertReadError, match="late"):
                is_same(store, 0, 1, layers)
        closing = threading.Thread(target=store.close)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
        gate.open.set()


def test_a_folder_has_one_owner_and_must_have_room(tmp_path: Path) -> None:
    with opened(tmp_path, 2), pytest.raises(TierError, match="in use"), opened(tmp_path, 2):
        pass
    with opened(tmp_path, 2):  # free again
        pass
    (tmp_path / "file").touch()
    with pytest.raises(TierError, match="cannot be used"), opened(tmp_path / "file", 2):
        pass
