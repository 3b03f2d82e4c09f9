"""Bytes of what a layer caches, and of what the engine stores in its place."""

from hotset.cost.cache_spec import (
    KeysValues,
    Latent,
    NoCache,
    Shared,
    State,
    default_block_size,
    token_bytes,
)

HEADS = KeysValues(4, 24, 16)


def test_each_kind_counts_its_tokens_and_its_sequences() -> None:
    specs = [KeysValues(2, 16, 16, window=8), Latent(32, 8, HEADS), State((5, 2, 10), (3, 2))]
    specs += [Shared(KeysValues(2, 16, 16)), NoCache()]
    assert [spec.token_values for spec in specs] == [64, 40, 0, 0, 0]
    assert [spec.sequence_bytes for spec in specs] == [0, 0, 412, 0, 0]
    assert token_bytes(specs, 2) == 2 * (64 + 40)
    assert token_bytes([], 2) == 0
    assert State((), (3, 2), conv_itemsize=4).sequence_bytes == 24


def test_the_engine_stores_all_tokens_keys_and_values_at_one_width_and_latents_as_they_are() -> (
    None
):
    assert HEADS.stored == KeysValues(4, 24, 24)
    assert KeysValues(2, 16, 16, window=8).stored == KeysValues(2, 16, 16)
    assert Latent(32, 8, HEADS).stored == Latent(32, 8, HEADS)
    assert Shared(HEADS).stored == HEADS.stored
    assert State((5, 2, 10), (3, 2)).stored == State((5, 2, 10), (3, 2))
    assert NoCache().stored == NoCache()


def test_a_latent_in_fp8_has_a_scale_for_128_values_and_16_bits_for_positions() -> None:
    assert Latent(512, 64, HEADS).ds_mla_token_bytes == 656


def test_a_block_of_latents_has_more_tokens_where_the_user_names_none() -> None:
    assert default_block_size([HEADS, HEADS]) == 16
    assert default_block_size([HEADS, Latent(32, 8, HEADS)]) == 64
