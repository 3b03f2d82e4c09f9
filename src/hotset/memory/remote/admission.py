"""Which payloads are worth writing to a store that others read, and how many bytes of them.

A store that takes everything is written for nothing: most payloads are never read again. So writes
are paid from a credit in bytes, which grows by what is read.
"""

from array import array
from collections.abc import Sequence

from hotset.clock import Clock

_TRICKLE = 0.02  # of the rate of writes, with no reads yet
_PER_READ = 4.0  # bytes of credit for a byte that was read
_WINDOW_S = 600.0
_LEAST_READ = 0.01  # of what was written in a window, for the trickle not to be halved
_LEAST_PAYLOAD_S = 8.0  # a payload in this time is always allowed
_CHAINS = 16  # of this many conversations that end, one is written whole
_NUM_SEEN = 1 << 20


class Credit:
    """Bytes that may be written: what was read, four times, and a trickle that dries up unread.

    The trickle is 2 % of the rate of writes. It is halved with each 10 minutes in which less than
    1 % of what was written was read, down to one payload per 8 seconds, and doubled again with each
    in which more was.

    Args:
        payload_bytes: of one payload.
        write_bytes_per_s: the rate of writes, as measured.
        clock: what passes.
    """

    def __init__(self, payload_bytes: int, write_bytes_per_s: float, clock: Clock) -> None:
        self._least_per_s = payload_bytes / _LEAST_PAYLOAD_S
        self._most_per_s = max(self._least_per_s, _TRICKLE * write_bytes_per_s)
        self._per_s = self._most_per_s
        self._clock = clock
        self._num_bytes = 0.0
        self._settled_s = clock.now()
        self._window_end_s = self._settled_s + _WINDOW_S
        self._written = self._read = 0  # in this window

    @property
    def num_bytes(self) -> float:
        """What may be written now."""
        self._settle()
        return self._num_bytes

    def spend(self, num_bytes: int) -> None:
        """So much is written."""
        self._settle()
        self._num_bytes -= num_bytes
        self._written += num_bytes

    def refund(self, num_bytes: int) -> None:
        """So much was not written after all."""
        self._num_bytes += num_bytes
        self._written = max(0, self._written - num_bytes)

    def was_read(self, num_bytes: int) -> None:
        """So much was read, and was of use."""
        self._settle()
        self._num_bytes += _PER_READ * num_bytes
        self._read += num_bytes

    def _settle(self) -> None:
        now_s = self._clock.now()
        while now_s >= self._window_end_s:
            self._num_bytes += self._per_s * (self._window_end_s - self._settled_s)
            self._settled_s = self._window_end_s
            self._window_end_s += _WINDOW_S
            if self._read < _LEAST_READ * self._written:
                self._per_s = max(self._least_per_s, self._per_s / 2)
            elif self._read:
                self._per_s = min(self._most_per_s, self._per_s * 2)
            self._written = self._read = 0
        self._num_bytes += self._per_s * (now_s - self._settled_s)
        self._settled_s = now_s


class Seen:
    """Which keys were noted lately: each in one of 2^20 places, which a later key may take.

    8 MB for any number of keys. That a key passes for another is as likely as that 64 bits agree.
    """

    def __init__(self) -> None:
        self._places = array("Q", bytes(8 * _NUM_SEEN))

    def note(self, key: bytes) -> bool:
        """Note a key of 16 bytes; returns whether it was noted before."""
        place = int.from_bytes(key[:8], "little") % _NUM_SEEN
        rest = int.from_bytes(key[8:16], "little") or 1
        was_seen = self._places[place] == rest
        self._places[place] = rest
        return was_seen


class Admission:
    """Decides what is written.

    In this order, as far as the credit goes: what a later request found again; what was computed
    again; and one conversation of 16, whole, as a block without those before it is of no use.

    Args:
        payload_bytes: of one payload.
        write_bytes_per_s: the rate of writes, as measured.
        clock: what passes.

    Attributes:
        credit: what it pays with.
        declined_bytes: of payloads that were offered and not taken.
    """

    def __init__(self, payload_bytes: int, write_bytes_per_s: float, clock: Clock) -> None:
        self.credit = Credit(payload_bytes, write_bytes_per_s, clock)
        self.declined_bytes = 0
        self._payload_bytes = payload_bytes
        self._seen = Seen()

    def takes_new(self, key: bytes) -> bool:
        """Whether a payload that was just computed is written; the credit pays for it."""
        if self._seen.note(key) and self.credit.num_bytes >= self._payload_bytes:
            self.credit.spend(self._payload_bytes)
            return True
        self.declined_bytes += self._payload_bytes
        return False

    def takes_used(
        self, chain: Sequence[bytes], lacking: Sequence[bytes], *, came_back: bool
    ) -> Sequence[bytes]:
        """Which of the `lacking` payloads of a conversation are written; the credit pays for them.

        Args:
            chain: the keys of the conversation, the last one first.
            lacking: those of them that the store lacks, the first one first.
            came_back: a later request found them; else their request has ended.
        """
        num_paid = max(0, int(self.credit.num_bytes // self._payload_bytes))
        taken: Sequence[bytes] = ()
        if came_back:
            taken = lacking[:num_paid]
        elif chain[0][0] % _CHAINS == 0 and 2 * len(lacking) <= num_paid:
            taken = lacking
        self.credit.spend(len(taken) * self._payload_bytes)
        return taken
