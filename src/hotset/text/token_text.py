"""From single tokens to bytes, names and pieces of text."""

from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from hotset.foreign_text import parse_json

_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Any ordinary token will do before another one; these exist in most vocabularies.
_USUAL = ("a", "e", "0", "A", "▁a", "Ġa")
_TRIED = 2048
# A run of tokens that are no whole character is cut to its last `_KEPT` at each `_LONG_RUN`.
_LONG_RUN, _KEPT = 64, 8


class TokenBytes:
    """What each token of a vocabulary adds to a text, in bytes. May be used from any thread.

    The bytes of the tokens of an output, one after the other, are the UTF-8 bytes of its text:
    a token that is a part of a character has that part's bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A decoder is pickled as its JSON; pickling the whole tokenizer takes 0.4 s.
        decoder = tokenizer.decoder
        kinds = _decoder_kinds(None if decoder is None else parse_json(decoder.__getstate__()))
        self._is_byte_level = "ByteLevel" in kinds
        self._has_fallback = "ByteFallback" in kinds
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        # Some decoders take the space off the start of a text: tokens are looked at after another.
        self._before, self._before_text = self._find_ordinary()
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token within a text, of a special one too; empty for an unknown id."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
        return known

    def name_of(self, token_id: int) -> str:
        r"""The text of one token; `bytes:\xf0\x9f`, as OpenAI writes it, for part of a character.

        Tokens with the same bytes have the same name.
        """
        found = self.bytes_of(token_id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + str(found)[2:-1].replace("\\'", "'")

    def _find(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        text = self._decode([*self._before, token_id])
        if text.startswith(self._before_text):
            text = text[len(self._before_text) :]
        else:
            text = self._decode([token_id])
        if _BROKEN in text:  # what the text has lost is in the vocabulary
            if self._has_fallback and (byte := _fallback_byte(piece)) is not None:
                return bytes([byte])
            if self._is_byte_level and all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
        return text.encode()

    def _find_ordinary(self) -> tuple[list[int], str]:
        """A token to decode others after, and its text; none where no token will do."""
        usual = [self._tokenizer.token_to_id(piece) for piece in _USUAL]
        for token_id in [*(i for i in usual if i is not None), *range(_TRIED)]:
            if token_id in self.special_ids or self._tokenizer.id_to_token(token_id) is None:
                continue
            text = self._decode([token_id])
            if text.strip() and _BROKEN not in text:
                return [token_id], text
        return [], ""

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


class TokenDecoder:
    """Decodes one text token by token, with the library's stream and an end it lacks.

    Args:
        tokenizer: of the model.
        context: the tokens before the text, or the last of them.
        skip_special: whether special tokens are left out of the text.

    Attributes:
        num_chars: how many characters were given out.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: list[int], *, skip_special: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # After a context that ends within a character the stream would repeat the context.
        if self._decode(context).endswith(_BROKEN):
            context = []
        self._context = context
        self._stream = self._new_stream()
        self._pending: list[int] = []  # not yet a whole character
        self._run = 0  # tokens that the stream has read since it last gave out a text
        self.num_chars = 0

    def feed(self, token_id: int) -> str:
        """The text that is certain with this token; empty in the middle of a character."""
        return self._let_go() + self._step(token_id)

    def _step(self, token_id: int) -> str:
        self._pending.append(token_id)
        self._run += 1
        try:
            text: str | None = self._stream.step(self._tokenizer, token_id)
        except Exception as error:
            # This token changes how the ones before it decode, which were sent already. (The
            # library raises plain Exceptions.) Go on with a new stream, after the same context, as
            # the start of a text may lose its space.
            if "prefix" not in str(error).lower():
                raise
            text = self.flush()
            self._stream, self._run = self._new_stream(), 0
            return text
        if text is None:
            return ""
        self._pending.clear()
        self._run = 0
        self.num_chars += len(text)
        return text

    def feed_at(self, token_id: int) -> tuple[str, int]:
        """`feed`, and the index of the token's first character in the whole text.

        A token that goes on within a character has that character's index.
        """
        let_go = self._let_go()
        text, offset = self._step_at(token_id)
        return let_go + text, offset

    def _step_at(self, token_id: int) -> tuple[str, int]:
        start, before = self.num_chars, list(self._pending)
        text = self._step(token_id)
        if not before:
            return text, start
        seen = self._decode(before)
        if not seen and self._pending:  # however many add nothing, each is looked at once
            del self._pending[: len(before)]
        if not text:
            return text, start + len(seen.rstrip(_BROKEN))
        same = next((i for i, (a, b) in enumerate(zip(seen, text, strict=False)) if a != b), None)
        return text, start + (min(len(seen), len(text)) if same is None else same)

    def _let_go(self) -> str:
        """Give out the start of a long run that is no text, such as of the same byte again.

        The library's stream decodes the whole run with each of its tokens. No character has as many
        tokens as are kept.
        """
        if not self._run or self._run % _LONG_RUN:
            return ""
        head, tail = self._pending[:-_KEPT], self._pending[-_KEPT:]
        text = self._decode(head)
        if text + self._decode(tail) != self._decode(self._pending):
            return ""
        stream = self._new_stream()
        if any(stream.step(self._tokenizer, token_id) for token_id in tail):
            return ""
        self._stream, self._pending, self._run = stream, tail, len(tail)
        self.num_chars += len(text)
        return text

    def flush(self) -> str:
        """The text of the tokens that were not a whole character, as far as it goes."""
        text = self._decode(self._pending)
        self._pending.clear()
        self.num_chars += len(text)
        return text

    @property
    def end(self) -> int:
        """The length of the text, with what `flush` would add."""
        return self.num_chars + len(self._decode(self._pending))

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=self._context, skip_special_tokens=self._skip_special)

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
        return text


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The types of a decoder of the tokenizers library, and of those within it."""
    if decoder is None:
        return set()
    kinds = {decoder["type"]}
    for part in decoder.get("decoders", ()):
        kinds |= _decoder_kinds(part)
    return kinds


def _fallback_byte(piece: str) -> int | None:
    """The byte of a piece such as `<0xE6>`; None for any other."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


def _bytes_by_character() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies.

    Source: `bytes_to_unicode` of GPT-2's encoder: printable ones of Latin-1 stand for themselves,
    the others for what follows U+0100, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    found.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return found


_BYTE_OF = _bytes_by_character()
