import pytest

from hotset.kv.seats import DeviceBlock, HostPlace, HostSlot, SeatReset, Seats, SlotBlock


def slots(*blocks: int, start: int | None = None) -> list[SlotBlock]:
    return [SlotBlock(DeviceBlock(block), start) for block in blocks]


def test_the_device_is_told_of_a_seat_once_its_reset_before_its_places() -> None:
    seats = Seats(num_seats=2, num_slots=8, block_size=4)
    seat = seats.take(slots(7, 5))
    seats.place(seat, 3, HostSlot(11))

    updates = seats.take_updates()

    assert updates.resets == [SeatReset(seat.number, slots(7, 5))]
    assert updates.places == [HostPlace(seat.number, 3, HostSlot(11))]
    assert seats.take_updates().resets == [] and seats.take_updates().places == []
    seats.check()


def test_nothing_is_told_of_a_seat_that_is_free_again() -> None:
    seats = Seats(num_seats=1, num_slots=4, block_size=4)
    seat = seats.take(slots(2))
    seats.place(seat, 0, HostSlot(1))
    assert seats.leave(seat) == [2]
    assert seats.take_updates().resets == [] and seats.take_updates().places == []
    other = seats.take(slots(3))
    assert seats.take_updates().resets == [SeatReset(other.number, slots(3))]
    seats.check()


def test_slots_that_are_forgotten_are_empty_and_host_memory_is_told_of_again() -> None:
    seats = Seats(num_seats=2, num_slots=4, block_size=4)
    seat = seats.take(slots(2, start=8))
    seats.place(seat, 0, HostSlot(1))
    seats.take_updates()

    seats.forget_slots()

    updates = seats.take_updates()
    assert updates.resets == [SeatReset(seat.number, slots(2))]
    assert updates.places == [HostPlace(seat.number, 0, HostSlot(1))]


def test_a_seat_is_taken_once() -> None:
    seats = Seats(num_seats=1, num_slots=4, block_size=4)
    seats.take(slots(0))
    assert seats.num_free == 0 and seats.num_taken == 1
    with pytest.raises(IndexError):
        seats.take(slots(1))


def test_a_block_that_serves_two_seats_is_noticed() -> None:
    seats = Seats(num_seats=2, num_slots=4, block_size=4)
    seats.take(slots(1))
    seats.take(slots(1))
    with pytest.raises(AssertionError, match="serves as slots twice"):
        seats.check()
