"""Fakes, written once."""

from collections.abc import Sequence

from hotset.memory.kv_cache import EndedTransfer


class FakeTiers:
    """Colder tiers without bytes: transfers end when the test says so, well or not."""

    def __init__(self) -> None:
        self.stored: dict[bytes, str] = {}
        self.spilling: dict[bytes, int] = {}
        self.fetching: list[tuple[bytes, int]] = []
        self.ended: list[EndedTransfer] = []
        self.has_room = True

    def locate(self, key: bytes) -> str | None:
        return "host" if key in self.spilling else self.stored.get(key)

    def spill(self, key: bytes, block: int, *, private: bool = False) -> bool:
        if self.has_room:
            self.spilling[key] = block
        return self.has_room

    def fetch(self, key: bytes, block: int) -> None:
        assert self.locate(key) is not None
        self.fetching.append((key, block))

    def drop(self, key: bytes) -> None:
        self.stored.pop(key, None)

    def touch(self, keys: Sequence[bytes]) -> None:
        pass

    def stage(self, key: bytes) -> bool:
        return False

    def queued_fetch_bytes(self) -> int:
        return len(self.fetching)

    def end_spill(self, key: bytes) -> None:
        block = self.spilling.pop(key)
        self.stored[key] = "host"
        self.ended.append(EndedTransfer(key, block, is_fetch=False, ok=True))

    def end_fetch(self, index: int = 0, *, ok: bool = True) -> None:
        key, block = self.fetching.pop(index)
        self.ended.append(EndedTransfer(key, block, is_fetch=True, ok=ok))

    def end_all(self) -> None:
        for key in list(self.spilling):
            self.end_spill(key)
        while self.fetching:
            self.end_fetch()

    def poll(self) -> list[EndedTransfer]:
        ended, self.ended = self.ended, []
        return ended
