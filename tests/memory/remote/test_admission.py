"""What is written to a shared store, and how much of it: FLEET's figures."""

import math
import random

import pytest
from fakes import FakeClock

from hotset.memory.remote.admission import Admission, Credit

RATE, PAYLOAD = 1_200_000_000, 2 * 2**20
HOUR = 3600.0


def spent(credit: Credit, clock: FakeClock, seconds: float) -> int:
    """Bytes written by one who writes all that it may, each second."""
    total = 0
    for _ in range(int(seconds)):
        clock.now_s += 1
        num = max(0, int(credit.num_bytes // PAYLOAD))
        credit.spend(num * PAYLOAD)
        total += num * PAYLOAD
    return total


def test_without_a_reader_29_gb_are_written_in_all_then_a_gb_per_hour() -> None:
    clock = FakeClock()
    credit = Credit(PAYLOAD, RATE, clock)
    first = spent(credit, clock, 3 * HOUR)
    assert 28.0e9 < first < 30.5e9
    assert 0.9e9 < spent(credit, clock, HOUR) < 0.96e9


def test_an_hour_of_conversations_that_never_come_back_writes_no_more_than_the_credit() -> None:
    clock, draw, payload = FakeClock(), random.Random(1), 8 * PAYLOAD
    admission = Admission(payload, RATE, clock)
    written = [0.0] * 6  # in each 10 minutes
    for window in range(6):
        for _ in range(600):
            clock.now_s += 1
            for _ in range(5):  # 32 blocks each, the first of which is the same for all
                chain = [draw.randbytes(16) for _ in range(31)] + [bytes(16)]
                written[window] += sum(admission.takes_new(key) for key in chain[:-1]) * payload
                taken = admission.takes_used(chain, chain[::-1], came_back=False)
                written[window] += len(taken) * payload
    earned = [600 * max(payload / 8, 0.02 * RATE / 2**before) for before in range(6)]
    for window in range(6):
        assert sum(written[: window + 1]) <= sum(earned[: window + 1])
    assert sum(written) > 0.5 * sum(earned)  # one conversation of 16 is written nevertheless
    assert admission.declined_bytes == HOUR * 5 * 31 * payload


def test_what_was_read_earns_four_times_as_much() -> None:
    clock = FakeClock()
    credit = Credit(PAYLOAD, RATE, clock)
    credit.was_read(PAYLOAD)
    assert credit.num_bytes == 4 * PAYLOAD


def test_the_trickle_is_halved_while_nothing_is_read_and_comes_back_with_reads() -> None:
    clock = FakeClock()
    credit = Credit(PAYLOAD, RATE, clock)

    def earned(read: int) -> float:
        before = credit.num_bytes
        credit.spend(PAYLOAD)
        credit.was_read(read)
        clock.now_s += 600
        return credit.num_bytes - before + PAYLOAD - 4 * read

    full = 0.02 * RATE * 600
    assert [earned(0), earned(0), earned(0)] == pytest.approx([full, full / 2, full / 4])
    assert [earned(PAYLOAD // 50), earned(PAYLOAD // 50)] == pytest.approx([full / 8, full / 4])
    clock.now_s += 600  # nothing is written: no reason to change it
    credit.spend(0)
    assert earned(0) == pytest.approx(full / 2)


def test_a_chain_is_written_whole_or_not_and_its_beginning_first_once_it_came_back() -> None:
    clock = FakeClock()
    admission = Admission(PAYLOAD, RATE, clock)
    chain = [bytes([0] * 15 + [number]) for number in range(100)]  # the last one is one of 16
    other = [bytes([1]) + key[1:] for key in chain]
    clock.now_s = 200 * PAYLOAD / (0.02 * RATE)
    assert admission.takes_used(other, other[::-1], came_back=False) == ()
    assert admission.takes_used(chain, chain[::-1], came_back=False) == chain[::-1]
    assert admission.takes_used(chain, chain[::-1], came_back=False) == ()  # too long by now
    taken = admission.takes_used(other, other[::-1], came_back=True)
    assert taken == other[::-1][: len(taken)] and 98 <= len(taken) <= 100


def test_a_payload_computed_again_is_written_and_a_new_one_is_not() -> None:
    clock = FakeClock()
    admission = Admission(PAYLOAD, RATE, clock)
    clock.now_s = math.ceil(PAYLOAD / (0.02 * RATE) * 1000) / 1000
    keys = [bytes([number]) * 16 for number in range(3)]
    assert [admission.takes_new(key) for key in keys] == [False] * 3
    assert [admission.takes_new(key) for key in keys] == [True, False, False]  # for want of credit
    assert admission.declined_bytes == 5 * PAYLOAD
