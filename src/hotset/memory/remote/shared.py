"""What tiers over stores have in common: what is known of keys, and reads. Imports no torch."""

import time
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from itertools import count

from hotset.clock import Clock
from hotset.memory.journal import OnChange
from hotset.memory.mailbox import Mailbox
from hotset.memory.remote.store import Event, Question, Store, Transfer
from hotset.memory.tier import Answer, Completion, CompletionStatus, TierInfo, TierUsage

_MOST_KNOWN = 1 << 18
_MISSING_S = 1.0  # for so long it counts that something is missing
_ANSWER_S = 0.1  # a store that takes longer for an answer has none


class SharedTier(ABC):
    """A `Tier` whose payloads are elsewhere, in stores; subclasses say in which, and write.

    What a store has is known from its answers and from what was read and written; others write too.
    Where a store does not answer within 0.1 seconds, or is left alone by its breaker, its payloads
    are missing, and computed again: nothing waits for it.

    Args:
        name: of the tier, and what its faults begin with.
        payload_bytes: of one payload.
        clock: of how long an answer counts.

    Attributes:
        on_change: see `journal.Source`: what becomes known to be there, or gone.
    """

    info: TierInfo
    _there_s = 600.0  # for so long it counts that something is there

    def __init__(self, name: str, payload_bytes: int, clock: Clock) -> None:
        self.on_change: OnChange | None = None
        self._name, self._payload_bytes, self._clock = name, payload_bytes, clock
        self._mailbox = Mailbox[Event]()
        self._faults: Counter[str] = Counter()
        self._known: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()  # and until when
        self._asked: dict[bytes, float] = {}
        self._questions: dict[int, tuple[Store, float]] = {}  # not answered, the oldest first
        self._reads: dict[int, Transfer] = {}
        self._writes: dict[int, Transfer] = {}
        self._late: set[int] = set()
        self._ids = count()

    @abstractmethod
    def _stores(self) -> Iterable[Store]:
        """All stores."""

    @abstractmethod
    def _store_of(self, key: bytes) -> Store | None:
        """The store that has the payload of a key if any has."""

    @abstractmethod
    def _ended(self, transfer: Transfer, *, is_read: bool) -> None:
        """Take note of a transfer that ended."""

    def lookup(self, keys: Sequence[bytes], *, may_ask: bool = True) -> list[Answer]:
        """See `Tier`. All keys that nothing is known of are asked for in one round trip."""
        now_s, asked = self._clock.now(), defaultdict[Store, list[bytes]](list)
        answers = []
        for key in keys:
            known = self._known.get(key)
            if known is not None and now_s < known[1]:
                answers.append(Answer.HIT if known[0] else Answer.MISS)
                continue
            store = self._store_of(key) if may_ask else None
            if store is None or not self._answers(store):
                answers.append(Answer.MISS)
                continue
            if key not in self._asked:
                self._asked[key] = now_s
                asked[store].append(key)
            answers.append(Answer.PENDING)
        for store, some in asked.items():
            question = Question(some)
            self._questions[id(question)] = (store, time.monotonic())
            store.ask(question)
        return answers

    def _answers(self, store: Store) -> bool:
        """Whether a store may be waited for."""
        if store.breaker.is_open:
            return False
        asked_s = (since_s for other, since_s in self._questions.values() if other is store)
        return time.monotonic() - next(asked_s, float("inf")) < _ANSWER_S

    def submit_read(self, key: bytes, into: memoryview) -> int:
        """See `Tier`."""
        transfer = Transfer(next(self._ids), key, into.cast("B"), 0.0)
        self._reads[transfer.transfer_id] = transfer
        store = self._store_of(key)
        if store is None or store.breaker.is_open:
            transfer.fault = "down"
            self._mailbox.put(transfer)
            return transfer.transfer_id
        seconds = store.transfer_s(len(self._reads), store.read_bytes_per_s)
        transfer.deadline_s = time.monotonic() + seconds
        store.read(transfer)
        return transfer.transfer_id

    def newest_keys(self, limit: int) -> list[bytes]:
        """See `Tier`: of what is known to be there, what became known last."""
        return [key for key, (is_there, _) in reversed(self._known.items()) if is_there][:limit]

    def poll(self) -> list[Completion]:
        """See `Tier`."""
        completions = []
        for event in self._mailbox.take():
            if isinstance(event, Question):
                self._note_answer(event)
            else:
                completions.append(self._settle(event))
        now_s = time.monotonic()
        for transfer_id, transfer in self._reads.items():
            if transfer.deadline_s < now_s and transfer_id not in self._late:
                self._late.add(transfer_id)
                completions.append(Completion(transfer_id, transfer.key, CompletionStatus.LATE))
        return completions

    def _settle(self, transfer: Transfer) -> Completion:
        transfer_id, key, fault = transfer.transfer_id, transfer.key, transfer.fault
        is_read = transfer_id in self._reads
        del (self._reads if is_read else self._writes)[transfer_id]
        self._late.discard(transfer_id)
        transfer.buffer.release()  # the caller's own view stays
        if fault is not None:
            self._faults[fault] += 1
        if fault is None or is_read:
            self._note(key, fault is None and transfer.is_wanted)
        self._ended(transfer, is_read=is_read)
        status = CompletionStatus.OK if fault is None else CompletionStatus.FAILED
        return Completion(transfer_id, key, status, fault)

    def _note_answer(self, question: Question) -> None:
        del self._questions[id(question)]
        for i, key in enumerate(question.keys):
            self._asked.pop(key, None)
            self._note(key, bool(question.found) and question.found[i])

    def _note(self, key: bytes, is_there: bool) -> None:
        until_s = self._clock.now() + (self._there_s if is_there else _MISSING_S)
        was_there, _ = self._known.get(key, (False, 0.0))
        if is_there is not was_there and self.on_change is not None:
            self.on_change(key, is_there)
        self._known[key] = (is_there, until_s)
        self._known.move_to_end(key)
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)

    def wait(self, timeout_s: float) -> None:
        """See `Tier`."""
        self._mailbox.wait(timeout_s)

    def usage(self) -> TierUsage:
        """See `Tier`. Faults of connections are apart from those of payloads."""
        stores = list(self._stores())
        faults = Counter({f"{self._name}_{kind}": num for kind, num in self._faults.items()})
        for store in stores:
            for kind, num in list(store.faults.items()):
                faults[f"{self._name}_connection_{kind}"] += num
        used = sum(store.used_bytes // store.value_bytes for store in stores)
        most = sum(store.most_bytes // store.value_bytes for store in stores)
        return TierUsage(min(used, most), most, dict(faults))

    def close(self) -> None:
        """See `Tier`. Takes 2 seconds at most per store."""
        for store in self._stores():
            store.close()
