"""One store: what is asked of it, read from it and written to it. Imports no torch."""

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hotset.errors import TierError
from hotset.memory.mailbox import Mailbox
from hotset.memory.remote.breaker import Breaker
from hotset.memory.remote.lane import Lane
from hotset.memory.remote.resp import (
    Address,
    Connection,
    RefusedError,
    Reply,
    StoreError,
    command,
    set_command,
)
from hotset.memory.remote.seal import EXPIRY_S, HEADER_BYTES, Seal

REVOKED = "hotset:revoked"  # the set of ids of writers whose payloads are not to be used

_ASK_S = 0.5  # the longest that a store may take for an answer
_LEAST_TRANSFER_S = 0.5
_SLOWER = 4  # times than expected, and a transfer is late
_AT_ONCE = 8  # payloads in flight on a connection
_QUESTIONS_AT_ONCE = 64
_MEASURE_S = 2.0
_MEASURED_PAYLOADS = 8
_MEASURE_EVERY_S = 60.0
_CLOSE_S = 2.0
_ASSUMED_RATE = 100e6  # bytes/s of a store that could not be measured
_SMOOTHING = 0.2  # weight of the newest observation in a running mean
_FORGETS = -1  # as a transfer's id: the payload is to be deleted


@dataclass(eq=False, slots=True)
class Transfer:
    """A payload on its way to a store or from it.

    Attributes:
        deadline_s: by `time.monotonic`: a read is to have ended by then, a write to have begun.
        fault: why it did not come to a good end; None while it has not ended, or where it did.
        is_wanted: whether what is written is to be found.
    """

    transfer_id: int
    key: bytes
    buffer: memoryview
    deadline_s: float
    fault: str | None = None
    is_wanted: bool = True


@dataclass(eq=False, slots=True)
class Question:
    """Whether a store has payloads.

    Attributes:
        found: of each key; empty where the store did not answer.
    """

    keys: list[bytes]
    found: list[bool] = field(default_factory=list)


Event = Transfer | Question


class Store:
    """A store with four connections: one asks, two read, one writes.

    What ended comes to the mailbox, whatever happens, and soon after its deadline at the latest.

    Args:
        address: of the store.
        seal: of the payloads.
        payload_bytes: of one.
        mailbox: takes what ended.
        is_peer: it is another replica, which can be asked and read alone.

    Attributes:
        breaker: whether it is left alone.
        faults: of connections, by kind.
        most_bytes, used_bytes: of its memory, as it said last.
        first_read_bytes: of payloads read that nobody had read before.
        read_bytes_per_s, write_bytes_per_s: of the last transfers.
        measured_bytes_per_s: of reads, as measured while nothing else was read.
    """

    def __init__(
        self,
        address: Address,
        seal: Seal,
        payload_bytes: int,
        mailbox: Mailbox[Event],
        *,
        is_peer: bool = False,
    ) -> None:
        self.address = address
        self.breaker = Breaker()
        self.faults: Counter[str] = Counter()
        self.most_bytes = self.used_bytes = self.first_read_bytes = 0
        self.read_bytes_per_s = self.write_bytes_per_s = _ASSUMED_RATE
        self.measured_bytes_per_s = _ASSUMED_RATE
        self._measured_s, self._num_read = -_MEASURE_EVERY_S, 0
        self._seal, self._payload_bytes, self._mailbox = seal, payload_bytes, mailbox
        self._is_peer = is_peer
        self._scratch = memoryview(bytearray(payload_bytes if not is_peer else 0))

    @property
    def value_bytes(self) -> int:
        """Of a payload with its header."""
        return HEADER_BYTES + self._payload_bytes

    # Called by the thread that polls

    def open(self) -> str | None:
        """Connect, measure and start; returns why the store is of no use yet, or None.

        Raises:
            TierError: the store refuses the login, or its memory has no bound.
        """
        why = None
        try:
            if not self._is_peer:
                connection = self._connect(_MEASURE_S)
                try:
                    self._measure(connection)
                finally:
                    connection.close()
        except StoreError as error:
            if error.fault in ("login", "unbounded"):
                raise TierError(f"the store {self.address.name}: {error}") from error
            self.breaker.failed(at_once=True)
            why = str(error)
        self._asks = Lane(
            "store-ask",
            self._connect,
            self._answer,
            self._leave_open,
            most=_QUESTIONS_AT_ONCE,
            refresh=self._refresh,
            breaker=self.breaker,
            faults=self.faults,
        )
        self._reads = self._transfer_lane("store-read", self._receive_all, num_threads=2)
        if not self._is_peer:
            self._writes = self._transfer_lane("store-write", self._send_all)
        return why

    def _transfer_lane(
        self,
        name: str,
        run: Callable[[Connection, deque[Transfer]], None],
        *,
        num_threads: int = 1,
    ) -> Lane[Transfer]:
        return Lane(
            name,
            self._connect,
            run,
            self._fail,
            most=_AT_ONCE,
            num_threads=num_threads,
            breaker=self.breaker,
            faults=self.faults,
        )

    def ask(self, question: Question) -> None:
        """Find out whether it has payloads."""
        self._asks.put(question)

    def read(self, transfer: Transfer) -> None:
        """Read a payload into the transfer's buffer."""
        self._reads.put(transfer)

    def write(self, transfer: Transfer) -> None:
        """Write a payload from the transfer's buffer."""
        self._writes.put(transfer)

    def forget(self, key: bytes) -> None:
        """Delete the payload of a key, some time soon."""
        self._writes.put(Transfer(_FORGETS, key, memoryview(b""), float("inf")))

    def transfer_s(self, num_payloads: int, bytes_per_s: float) -> float:
        """How long payloads may take, one after another, before the last one is late."""
        return max(_LEAST_TRANSFER_S, _SLOWER * num_payloads * self.value_bytes / bytes_per_s)

    def close(self) -> None:
        """Drop what is queued, and wait 2 seconds at most for what runs."""
        deadline_s = time.monotonic() + _CLOSE_S
        self._asks.close(deadline_s)
        self._reads.close(deadline_s)
        if not self._is_peer:
            self._writes.close(deadline_s)

    # Connections

    def _connect(self, timeout_s: float = _ASK_S) -> Connection:
        connection = Connection(self.address, time.monotonic() + timeout_s)
        try:
            self._look(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _refresh(self, connection: Connection) -> None:
        """Look again, and measure a store that nothing was read from for a while.

        Or one that was slow once, or not there at the start, would be taken for slow for ever.
        """
        connection.deadline_s = time.monotonic() + _ASK_S
        self._look(connection)
        num_read, self._num_read = self._num_read, 0
        is_due = time.monotonic() > self._measured_s + _MEASURE_EVERY_S
        if is_due and not num_read and not self._is_peer:
            self._measure(connection)

    def _look(self, connection: Connection) -> None:
        """How much memory the store has, and whose payloads are not to be used."""
        try:
            if self._is_peer:
                connection.ask("PING")
                return
            info, revoked = connection.ask("INFO", "memory"), connection.ask("SMEMBERS", REVOKED)
        except RefusedError as error:
            raise StoreError("login", str(error)) from error
        lines = info.decode(errors="replace").split("\r\n") if isinstance(info, bytes) else []
        said = {name: value for name, _, value in (line.partition(":") for line in lines)}
        self.most_bytes = _number(said.get("maxmemory"))
        self.used_bytes = _number(said.get("used_memory"))
        if self.most_bytes == 0:
            raise StoreError(
                "unbounded",
                "its memory has no bound, so that it would take all of its machine's; start it "
                "with --maxmemory SIZE --maxmemory-policy allkeys-lru",
            )
        ids = (
            {one for one in revoked if isinstance(one, bytes)} if isinstance(revoked, list) else ()
        )
        self._seal.revoked |= frozenset(ids)

    def _measure(self, connection: Connection) -> None:
        """Take the rates of some payloads that are forgotten again."""
        keys = [secrets.token_bytes(16) for _ in range(_MEASURED_PAYLOADS)]
        buffer = memoryview(bytearray(self._payload_bytes))
        ends_s = connection.deadline_s = time.monotonic() + _MEASURE_S
        rates, first_read_bytes = [], self.first_read_bytes
        for run in (self._send_all, self._receive_all):
            transfers = deque(Transfer(_FORGETS, key, buffer, ends_s) for key in keys)
            ended, started_s = list(transfers), time.monotonic()
            run(connection, transfers)
            num_good = sum(one.fault is None for one in ended)
            rates.append(num_good * self._payload_bytes / (time.monotonic() - started_s))
        for name in self._seal.names(keys):
            self._reply_to(connection, "DEL", name, b"read:" + name)
        self.first_read_bytes, self._num_read = first_read_bytes, 0
        if all(rates):
            self.write_bytes_per_s, self.read_bytes_per_s = rates
            self.measured_bytes_per_s = self.read_bytes_per_s
            self._measured_s = time.monotonic()

    @staticmethod
    def _reply_to(connection: Connection, *words: bytes | str | int) -> Reply | RefusedError:
        connection.send([command(*words)])
        return _reply(connection)

    # Questions

    def _answer(self, connection: Connection, questions: deque[Question]) -> None:
        connection.deadline_s = time.monotonic() + _ASK_S
        while questions:
            names = self._seal.names(questions[0].keys)
            connection.send([b"".join(command("STRLEN", name) for name in names)])
            found = [_reply(connection) == self.value_bytes for _ in names]
            question = questions.popleft()
            question.found = found
            self._mailbox.put(question)

    def _leave_open(self, questions: Iterable[Question], fault: str) -> None:
        for question in questions:
            self._mailbox.put(question)

    # Transfers

    def _end(self, transfer: Transfer, fault: str | None) -> None:
        transfer.fault = fault
        if transfer.transfer_id != _FORGETS:
            self._mailbox.put(transfer)

    def _fail(self, transfers: Iterable[Transfer], fault: str) -> None:
        for transfer in transfers:
            self._end(transfer, fault)

    def _take_on_time(self, transfers: deque[Transfer], fault: str) -> None:
        """End those that had to wait for too long."""
        now_s = time.monotonic()
        for transfer in [one for one in transfers if one.deadline_s < now_s]:
            transfers.remove(transfer)
            self._end(transfer, fault)

    def _receive_all(self, connection: Connection, transfers: deque[Transfer]) -> None:
        self._take_on_time(transfers, "late")
        names = self._seal.names([transfer.key for transfer in transfers])
        connection.deadline_s = max((one.deadline_s for one in transfers), default=0.0)
        started_s, good, bad = time.monotonic(), list[bytes](), list[bytes]()
        if names:
            connection.send([b"".join(command("GET", name) for name in names)])
        for name in names:
            connection.deadline_s = transfers[0].deadline_s
            fault = self._receive(connection, transfers[0])
            self._end(transfers.popleft(), fault)
            if fault is None:
                good.append(name)
            elif fault not in ("missing", "refused"):
                bad.append(name)
        if good:
            self._num_read += len(good)
            rate = len(good) * self._payload_bytes / (time.monotonic() - started_s)
            self.read_bytes_per_s += _SMOOTHING * (rate - self.read_bytes_per_s)
        if not self._is_peer:
            self._note_reads(connection, good, bad)
        if bad and not good:
            raise StoreError("foul", "nothing that the store had could be used")

    def _receive(self, connection: Connection, transfer: Transfer) -> str | None:
        """Read one payload; returns what is wrong with it."""
        try:
            length = connection.payload_length()
        except RefusedError:
            return "refused"
        if length is None:
            return "missing"
        if length != self.value_bytes:
            raise StoreError("foreign", f"{length} bytes came; expected {self.value_bytes}")
        header = bytearray(HEADER_BYTES)
        connection.read(memoryview(header))
        connection.read(transfer.buffer)
        connection.end_payload()
        return self._seal.open(transfer.key, header, transfer.buffer)

    def _note_reads(self, connection: Connection, good: list[bytes], bad: list[bytes]) -> None:
        """Count payloads that nobody had read before, and delete what nobody can use."""
        expiry_ms = EXPIRY_S * 1000
        marks = [command("SET", b"read:" + name, "", "NX", "PX", expiry_ms) for name in good]
        commands = [*marks, *(command("DEL", name) for name in bad)]
        if commands:
            connection.deadline_s = time.monotonic() + _ASK_S
            connection.send([b"".join(commands)])
            replies = [_reply(connection) for _ in commands]
            self.first_read_bytes += replies[: len(good)].count(b"OK") * self._payload_bytes

    def _send_all(self, connection: Connection, transfers: deque[Transfer]) -> None:
        self._take_on_time(transfers, "write_dropped")
        seconds = self.transfer_s(len(transfers), self.write_bytes_per_s)
        connection.deadline_s = time.monotonic() + seconds
        names = self._seal.names([transfer.key for transfer in transfers])
        started_s, num_bytes = time.monotonic(), 0
        for transfer, name in zip(transfers, names, strict=True):
            num_bytes += transfer.buffer.nbytes
            if not transfer.buffer.nbytes:
                connection.send([command("DEL", name)])
                continue
            header, payload = self._seal.seal(transfer.key, transfer.buffer, self._scratch)
            head, tail = set_command(name, self.value_bytes, EXPIRY_S * 1000)
            connection.send([head, header, payload, tail])
        while transfers:
            reply = _reply(connection)
            self._end(transfers.popleft(), _fault_of_write(reply))
        if num_bytes:
            rate = num_bytes / (time.monotonic() - started_s)
            self.write_bytes_per_s += _SMOOTHING * (rate - self.write_bytes_per_s)


def _reply(connection: Connection) -> Reply | RefusedError:
    try:
        return connection.reply()
    except RefusedError as error:
        return error


def _fault_of_write(reply: Reply | RefusedError) -> str | None:
    if isinstance(reply, RefusedError):
        return "full" if str(reply).startswith("OOM") else "refused"
    return None


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
