"""Seals: what was sealed opens bit for bit, and nothing else does."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import PAYLOAD_BYTES, content, key, seal

from hotset.memory.remote.seal import HEADER_BYTES, Seal, writer_id

HOUR = 3600


def sealed(by: Seal, number: int = 1) -> bytes:
    scratch = memoryview(bytearray(PAYLOAD_BYTES))
    header, payload = by.seal(key(number), memoryview(content(number)), scratch)
    return header + bytes(payload)


def opened(by: Seal, value: bytes, number: int = 1) -> tuple[str | None, bytes]:
    payload = bytearray(value[HEADER_BYTES:])
    fault = by.open(key(number), value[:HEADER_BYTES], memoryview(payload))
    return fault, bytes(payload)


@pytest.mark.parametrize("encrypts", [False, True])
def test_what_was_sealed_opens_bit_for_bit(encrypts: bool) -> None:
    value = sealed(seal(encrypts=encrypts))
    assert (value[HEADER_BYTES:] == content(1)) is not encrypts
    assert opened(seal(encrypts=not encrypts), value) == (None, content(1))


@pytest.mark.parametrize("encrypts", [False, True])
@given(data=st.data())
def test_a_bit_flipped_anywhere_is_seen(encrypts: bool, data: st.DataObject) -> None:
    value = bytearray(sealed(seal(encrypts=encrypts)))
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    value[bit // 8] ^= 1 << bit % 8
    assert opened(seal(), bytes(value))[0] in ("forged", "foreign", "stale")


@pytest.mark.parametrize(
    ("opens", "fault"),
    [
        (lambda value: opened(seal(), value, number=2), "forged"),  # swapped between keys
        (lambda value: opened(seal(secret=b"another fleet's one"), value), "forged"),
        (lambda value: opened(seal(fingerprint="another model"), value), "foreign"),
        (lambda value: opened(seal(), b"HSG0" + value[4:]), "foreign"),  # an old version
        (lambda value: opened(seal(), value[:-16]), "foreign"),
        (lambda value: opened(seal(now=lambda: time.time() + 26 * HOUR), value), "stale"),
        (lambda value: opened(seal(now=lambda: time.time() - 2 * HOUR), value), "stale"),
    ],
)
def test_what_another_sealed_is_refused_by_name(
    opens: Callable[[bytes], tuple[str | None, bytes]], fault: str
) -> None:
    assert opens(sealed(seal()))[0] == fault


def test_a_writer_that_was_revoked_is_not_believed() -> None:
    by = seal()
    value = sealed(by)
    by.revoked |= {writer_id("another")}
    assert opened(by, value)[0] is None
    by.revoked |= {writer_id("writer")}
    assert opened(by, value)[0] == "revoked"


def test_names_of_keys_can_be_turned_back_with_the_secret_alone() -> None:
    keys = [key(number) for number in range(5)]
    names = seal().names(keys)
    assert seal().keys(names) == keys
    assert len({*keys, *names, *seal(secret=b"another fleet's one").names(keys)}) == 15
    assert seal().names([]) == []
