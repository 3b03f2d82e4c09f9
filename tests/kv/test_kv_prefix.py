"""Keys of blocks: by tokens and all before them, by salt, or by request."""

from schedulers import BLOCK, make_request

from hotset.kv.prefix import Prefixes
from hotset.sequence import Tail


def test_requests_that_begin_alike_have_equal_keys_as_far_as_they_do() -> None:
    prefixes = Prefixes("model", BLOCK)
    one = prefixes.findable(make_request([*range(8), 100, 101, 102, 103, 104]))
    other = prefixes.findable(make_request([*range(8), 200, 201, 202, 203, 204]))
    assert len(one) == len(other) == 3
    assert one[:2] == other[:2] and one[2] != other[2]
    assert not set(prefixes.findable(make_request(list(range(9)), salt=b"x"))) & set(one)
    assert not set(Prefixes("other", BLOCK).findable(make_request(list(range(9))))) & set(one)


def test_one_token_is_always_left_to_compute() -> None:
    prefixes = Prefixes("model", BLOCK)
    request = make_request(list(range(8)))
    assert len(prefixes.extend(request)) == 2
    assert len(prefixes.findable(request)) == 1
    request.kv.num_computed_tokens = 4
    assert prefixes.next_key(request) is None
    assert prefixes.next_key(make_request(list(range(8)))) == request.kv.block_hashes[0]


def test_keys_without_sharing_are_of_one_request() -> None:
    prefixes = Prefixes("model", BLOCK, are_shared=False)
    one, other = make_request(list(range(9))), make_request(list(range(9)))
    assert not set(prefixes.findable(one)) & set(prefixes.findable(other))
    one.kv.num_computed_tokens = 7
    assert prefixes.remember_tail(one) is None


def test_a_tail_is_found_by_what_precedes_it_where_a_token_is_left() -> None:
    prefixes = Prefixes("model", BLOCK)
    ended = make_request(list(range(6)))
    ended.kv.num_computed_tokens = 6
    key = prefixes.remember_tail(ended)
    assert key is not None
    longer = make_request(list(range(7)))
    prefixes.extend(longer)
    assert prefixes.tail_at(longer, 1) == Tail(key, 1, 2)
    assert prefixes.tail_at(longer, 0) is None
    same = make_request(list(range(6)))
    prefixes.extend(same)
    assert prefixes.tail_at(same, 1) is None  # all of it would be found
    another = prefixes.tail_at(make_request([*range(4), 50, 51, 52]), 0)
    assert another is None


def test_a_tail_with_too_little_in_it_is_not_remembered() -> None:
    prefixes = Prefixes("model", 16)
    request = make_request(list(range(20)))
    request.kv.num_computed_tokens = 19
    assert prefixes.remember_tail(request) is None  # 3 of 16
    request.kv.num_computed_tokens = 20
    assert prefixes.remember_tail(request) is not None
