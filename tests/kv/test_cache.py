"""What the KV cache takes as computed."""

from fakes import FakeTiers
from schedulers import make_request, make_scheduler


def test_only_accepted_tokens_are_published_and_the_others_are_written_again(
    fake_tiers: FakeTiers,
) -> None:
    kv = make_scheduler(fake_tiers).kv
    request = make_request(list(range(10)))
    assert kv.admit(request, spare_blocks=0, queued_tokens=0)
    assert kv.tables.reserve(request, 8)
    table = list(request.kv.block_table)

    kv.commit(request, 5)
    assert request.kv.num_computed_tokens == 5
    assert list(fake_tiers.spilling.values()) == table[:1]

    assert kv.tables.reserve(request, 3)
    assert request.kv.block_table == table  # in the same places
    kv.commit(request, 3)
    assert list(fake_tiers.spilling.values()) == table
