from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_fallback_tokenizer import make_fallback_backend
from tiny_tokenizer import make_backend
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hotset.text.token_text import TokenBytes, TokenDecoder

BYTE_LEVEL = make_backend()
FALLBACK = make_fallback_backend()
BOTH = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, FALLBACK], ids=["byte-level", "byte-fallback"]
)
TEXTS = ["the cat", " the", "😀漢字ď", "🏳️‍🌈 naïve 日本", "\n\t \x00", "<s>", "�", "'\\\""]
# What follows is in the middle of a text: some tokenizers drop a space at the start.
START = "a"


class WholeRuns(TokenDecoder):
    """Gives out no run of bytes before its end."""

    def _let_go(self) -> str:
        return ""


def check_bytes(tokenizer: Tokenizer, text: str) -> None:
    tokens = TokenBytes(tokenizer)
    ids = tokenizer.encode(START + text, add_special_tokens=False).ids
    joined = b"".join(tokens.bytes_of(i) for i in ids)
    assert joined.removeprefix(b" ") == (START + text).encode()


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    check_bytes(tokenizer, text)


@BOTH
@given(text=st.text())
def test_the_bytes_of_any_text_join(tokenizer: Tokenizer, text: str) -> None:
    if "<" not in text:  # what is written like a special token is one
        check_bytes(tokenizer, text)


@BOTH
@given(ids=st.lists(st.integers(3, 270), max_size=12))
def test_offsets_index_the_text_whatever_the_tokens(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Also of bytes that are no text: the token after such ones begins where it is in the text."""
    decoder = TokenDecoder(tokenizer, tokenizer.encode(START).ids)
    pieces, offsets = [], []
    for token_id in ids:
        piece, offset = decoder.feed_at(token_id)
        pieces.append(piece)
        offsets.append(offset)
    end = decoder.end
    text = "".join(pieces) + decoder.flush()
    assert end == decoder.num_chars == len(text)
    assert offsets == sorted(offsets) and all(0 <= offset <= len(text) for offset in offsets)
    tokens, is_byte = TokenBytes(tokenizer), False
    for token_id, offset in zip(ids, offsets, strict=True):
        name = tokens.name_of(token_id)
        # A run of byte tokens that is no text is broken as a whole, also what could be read.
        was_byte, is_byte = is_byte, "<0x" in tokenizer.id_to_token(token_id)
        is_part = is_byte or was_byte or name.startswith("bytes:")
        if not is_part and token_id not in tokens.special_ids:
            assert text[offset : offset + len(name)] == name


@BOTH
@given(text=st.text(min_size=1))
def test_offsets_of_a_text_are_those_of_its_characters(tokenizer: Tokenizer, text: str) -> None:
    tokens = TokenBytes(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    decoder = TokenDecoder(tokenizer, tokenizer.encode(START).ids)
    offsets = [decoder.feed_at(i)[1] for i in ids if i not in tokens.special_ids]
    ends = accumulate((tokens.bytes_of(i) for i in ids if i not in tokens.special_ids), initial=b"")
    whole = [len(before.decode(errors="ignore")) for before in ends]
    assert offsets == whole[: len(offsets)]


@BOTH
@given(
    start=st.lists(st.integers(3, 258), min_size=1, max_size=3),
    times=st.integers(60, 150),
    after=st.lists(st.integers(3, 270), max_size=12),
    with_offsets=st.booleans(),
)
def test_a_long_run_of_bytes_is_the_text_it_would_be_at_once(
    tokenizer: Tokenizer, start: list[int], times: int, after: list[int], with_offsets: bool
) -> None:
    context = tokenizer.encode(START).ids
    ids = start * times + after
    decoder = TokenDecoder(tokenizer, context)
    pieces = [decoder.feed_at(i)[0] if with_offsets else decoder.feed(i) for i in ids]
    plain = WholeRuns(tokenizer, context)
    assert "".join(pieces) + decoder.flush() == "".join(map(plain.feed, ids)) + plain.flush()


@BOTH
def test_a_long_run_of_bytes_is_given_out_while_it_grows(tokenizer: Tokenizer) -> None:
    [byte] = [i for i in range(3, 259) if TokenBytes(tokenizer).bytes_of(i) == b"\xf0"]
    decoder = TokenDecoder(tokenizer, tokenizer.encode(START).ids)
    for i in range(1000):
        text, offset = decoder.feed_at(byte)
        assert set(text) <= {"\N{REPLACEMENT CHARACTER}"}
        assert i - 64 < offset <= i and i - 64 < decoder.num_chars <= i
    decoder.flush()
    assert decoder.num_chars == 1000


def test_a_space_after_bytes_that_are_no_text_is_not_lost() -> None:
    """The library's stream ends there, and the start of a new one would lose it."""
    decoder = TokenDecoder(FALLBACK, FALLBACK.encode(START).ids)
    letter, word = (FALLBACK.token_to_id(piece) for piece in ("h", "▁cat"))
    pieces = [decoder.feed(i) for i in (3 + 0x40, 3 + 0xC1, letter, word)]
    assert pieces == ["@", "", "\N{REPLACEMENT CHARACTER}h", " cat"]


def test_part_of_a_character_has_a_name_of_its_own() -> None:
    tokens = TokenBytes(BYTE_LEVEL)
    first, *rest = BYTE_LEVEL.encode("😀").ids
    assert tokens.name_of(first) == r"bytes:\xf0"
    assert [tokens.name_of(i) for i in rest] == [r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"]
    named = [TokenBytes(FALLBACK).name_of(i) for i in (3 + 0xE6, 3 + 0x41)]
    assert named == [r"bytes:\xe6", "A"]


def test_special_and_added_tokens_have_the_bytes_they_decode_to() -> None:
    tokenizer = Tokenizer.from_str(BYTE_LEVEL.to_str())
    tokenizer.add_tokens([AddedToken("▁x y", normalized=False), "\N{REPLACEMENT CHARACTER}q"])
    tokenizer.add_special_tokens(["<|end▁|>"])
    tokens = TokenBytes(tokenizer)
    for name in ("<eos>", "▁x y", "<|end▁|>", "\N{REPLACEMENT CHARACTER}q"):
        token_id = tokenizer.token_to_id(name)
        assert tokens.bytes_of(token_id) == name.encode() and tokens.name_of(token_id) == name
        assert (token_id in tokens.special_ids) == name.startswith("<")
    assert tokens.bytes_of(10**6) == b""


def test_words_keep_the_space_that_a_decoder_takes_off_the_start() -> None:
    vocab = {"▁the": 0, "▁": 1, "cat": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([0]) == "the"
    assert [TokenBytes(tokenizer).bytes_of(i) for i in range(3)] == [b" the", b" ", b"cat"]
    bare = Tokenizer(models.BPE(vocab=vocab, merges=[]))  # without a decoder
    assert [TokenBytes(bare).bytes_of(i).strip() for i in (0, 2)] == ["▁the".encode(), b"cat"]
    words = Tokenizer(models.WordPiece(vocab={"the": 0, "##re": 1}, unk_token="the"))
    words.decoder = decoders.WordPiece()
    assert [TokenBytes(words).bytes_of(i) for i in range(2)] == [b" the", b"re"]
