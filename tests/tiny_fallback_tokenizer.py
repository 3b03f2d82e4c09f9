"""A small tokenizer of the SentencePiece kind: words with a mark, and bytes for what it lacks."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers

_PIECES = ["▁", "a", "b", "t", "h", "e", "▁t", "he", "▁the", "é", "▁cat", "日"]
_SPECIAL = ["<unk>", "<s>", "</s>"]


@cache
def make_fallback_backend() -> Tokenizer:
    """As Llama 2 has it: a space is a mark, one at the start is dropped when decoding."""
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer
